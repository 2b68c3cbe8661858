"""Tests of the exported graph: its names, its logits on padded batches and in pieces, and its skipped sublayers."""

import re
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch

from tiny import token_ids

pytestmark = pytest.mark.onnx

# The first attention of gemma2 is dead too. OPT is like GPT-2, but for its modules, which are as Llama's.
SLOW = {
    case: pytest.param(case, marks=pytest.mark.slow) for case in ("dead first", "opt", "gpt2 dead mlp", "opt dead mlp")
}
CASES = ["llama", SLOW["dead first"], "dead middle", "fp16", "gpt2", SLOW["opt"], "gemma2"]
DEAD_MLPS = ["dead mlp", SLOW["gpt2 dead mlp"], SLOW["opt dead mlp"]]
# As a share of the largest logit, against torch in fp32; an fp16 graph also rounds its weights.
TOLERANCE = {"fp32": 5e-5, "fp16": 5e-2}


def dimensions(value):
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def test_names_and_axes_are_those_that_clients_know(exported):
    graph = exported("llama").graph
    past = ["batch_size", 2, "past_sequence_length", 8]
    present = ["batch_size", 2, "total_sequence_length", 8]
    assert {value.name: dimensions(value) for value in graph.input} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{index}.{part}": past for index in (0, 1) for part in ("key", "value")},
    }
    assert {value.name: dimensions(value) for value in graph.output} == {
        "logits": ["batch_size", "sequence_length", 128],
        **{f"present.{index}.{part}": present for index in (0, 1) for part in ("key", "value")},
    }
    assert [value.name for value in graph.input][3:5] == ["past_key_values.0.key", "past_key_values.0.value"]


def test_nodes_are_named_by_their_module(exported):
    names = [node.name for node in exported("llama").graph.node]
    assert "model.layers.1.mlp.up_proj/MatMul" in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES + DEAD_MLPS)
def test_every_row_of_a_padded_batch_is_what_stock_transformers_computes_of_it_alone(exported, case):
    # Neither the trace nor the comparison at export has these rows and lengths. The longest text is longer than
    # gemma2's sliding window.
    lengths, steps = (13, 1, 9, 5), (4, 1, 1)
    export = exported(case)
    texts = [token_ids(1, length + sum(steps), seed=length).numpy() for length in lengths]
    longest = max(lengths)
    ids = np.concatenate(
        [
            np.pad(text[:, : -sum(steps)], ((0, 0), (longest - length, 0)))
            for text, length in zip(texts, lengths, strict=True)
        ]
    )
    mask = (np.arange(longest) >= longest - np.array(lengths)[:, None]).astype(np.int64)

    runner = export.runner()
    logits, cache = runner.prefill(ids, mask)
    parts, start = [logits], -sum(steps)
    for step in steps:
        following = np.concatenate([text[:, start : start + step or None] for text in texts])
        logits, cache = runner.decode(following, cache)
        parts.append(logits)
        start += step

    got, model = np.concatenate(parts, axis=1), export.stock()
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        with torch.inference_mode():
            expected = model(torch.from_numpy(text), use_cache=False).logits.numpy()[0]
        difference = np.abs(got[row, longest - length :] - expected).max()
        assert difference < TOLERANCE[export.artifact.dtype] * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", [(1, 12), (3, 9, 1), (12, 1), (1,) * 13])
def test_a_prompt_in_pieces_is_what_stock_transformers_computes_of_the_whole(exported, case, pieces):
    # Some pieces are longer than the cache before them, some longer than gemma2's sliding window, some have one token.
    export = exported(case)
    ids = token_ids(2, sum(pieces), seed=5).numpy()
    mask = (np.arange(len(ids[0])) >= np.array([[0], [2]])).astype(
        np.int64
    )  # the second row has padding in its first piece
    ends = np.cumsum(pieces)
    mask[:, ends[0] - 1 :] = 1
    runner = export.runner()
    logits, cache = runner.prefill(ids[:, : ends[0]], mask[:, : ends[0]])
    parts = [logits]
    for start, end in pairwise(ends):
        logits, cache = runner.decode(ids[:, start:end], cache)
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    for row, (text, seen) in enumerate(zip(ids, mask.astype(bool), strict=True)):
        with torch.inference_mode():
            expected = export.stock()(torch.from_numpy(text[seen][None]), use_cache=False).logits.numpy()[0]
        difference = np.abs(got[row][seen] - expected).max()
        assert difference < TOLERANCE[export.artifact.dtype] * np.abs(expected).max()


@pytest.mark.parametrize(
    ("case", "live"),
    [pytest.param("dead first", 2, marks=pytest.mark.slow), ("dead middle", 2), ("llama", 2), ("gemma2", 2)],
)
def test_a_dead_attention_leaves_nothing_in_the_graph(exported, case, live):
    export = exported(case)
    cache = [value.name for value in export.graph.input if value.name.startswith("past_key_values.")]
    assert cache == [f"past_key_values.{index}.{part}" for index in range(live) for part in ("key", "value")]
    layers = export.stock().config.num_hidden_layers
    per_attention = 6 if case == "gemma2" else 4  # with its softcap, attention is traced as two matmuls
    assert export.count("MatMul") == live * per_attention + layers * 3 + 1
    if case != "gemma2":
        assert export.count("Attention") == live
    # The residual stream is added to once by each live sublayer, and by no zeros.
    residual = [node for node in export.graph.node if node.op_type == "Add" and node.name.startswith("model.layers.")]
    outside = [node for node in residual if "self_attn" not in node.name and "norm" not in node.name]
    assert len(outside) == live + layers


@pytest.mark.parametrize(
    ("case", "matmuls", "attentions"),
    [
        ("dead mlp", 2 * 4 + 1 * 3 + 1, 2),
        ("gpt2 dead mlp", 2 * 2 + 1 * 2 + 1, 2),  # q, k and v are one product
        pytest.param("opt dead mlp", 2 * 4 + 1 * 2 + 1, 2, marks=pytest.mark.slow),
    ],
)
def test_a_dead_mlp_leaves_nothing_in_the_graph(exported, case, matmuls, attentions):
    export = exported(case)
    assert export.count("MatMul") + export.count("Gemm") == matmuls
    assert export.count("Attention") == attentions
    cache = [value.name for value in export.graph.input if value.name.startswith("past_key_values.")]
    assert cache == [f"past_key_values.{index}.{part}" for index in range(attentions) for part in ("key", "value")]
    assert sum(export.count(activation) for activation in ("Relu", "Sigmoid", "Tanh")) == 1
    # The residual stream is added to once by each live sublayer, and by no zeros.
    names = [node.name for node in export.graph.node if node.op_type == "Add"]
    residual = [name for name in names if re.fullmatch(r"[a-z.]+\.(layers|h)\.\d+/\w+", name)]
    assert len(residual) == attentions + 1


def test_a_tied_weight_is_stored_once(exported):
    export = exported("llama")
    model = export.stock()
    assert model.config.tie_word_embeddings
    weights = sum(parameter.nbytes for parameter in model.parameters())
    stored = (export.folder / "model.onnx.data").stat().st_size
    assert abs(stored - weights) < model.get_input_embeddings().weight.nbytes / 8


def test_fp16_is_fp16_throughout(exported):
    export = exported("fp16")
    half = onnx.TensorProto.FLOAT16
    cache = [value for value in export.graph.input if value.name.startswith("past_key_values.")]
    assert {value.type.tensor_type.elem_type for value in [*cache, *export.graph.output]} == {half}
    matrices = [tensor for tensor in export.graph.initializer if len(tensor.dims) == 2]
    assert {tensor.data_type for tensor in matrices} == {half}
