"""Tests of simplifying the nodes around `Attention` and its mask, and of leaving unknown forms unchanged."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from optimum.exporters.streamline.rewriting.attention import append_within_attention, simplify_attention
from optimum.exporters.streamline.rewriting.mask import simplify_mask
from tiny import token_ids

pytestmark = pytest.mark.onnx

LAYER = [
    "RMSNormalization", "MatMul", "MatMul", "MatMul", "RotaryEmbedding", "RotaryEmbedding", "Attention", "MatMul",
    "Add",
    "RMSNormalization", "MatMul", "Sigmoid", "Mul", "MatMul", "Mul", "MatMul",
    "Add",
]  # fmt: skip

# A traced attention: two query heads per key-value head, so that keys and values are repeated; a cache that `Concat`
# extends; a mask; and a `Where` that zeroes the rows that attend to nothing.
TRACED = """
<ir_version: 10, opset_import: ["" : 23]>
traced (float[b,s,32] q, float[b,s,16] k, float[b,s,16] v, bool[b,1,s,t] mask,
        float[b,2,p,8] past_key_values.layers.0.keys, float[b,2,p,8] past_key_values.layers.0.values)
    => (float[b,s,32] out, float[b,2,t,8] new_keys, float[b,2,t,8] new_values)
<int64[4] apart = {0, 0, -1, 8}, int64[1] two = {2}, int64[5] twice = {1, 1, 2, 1, 1}, int64[4] all = {0, 4, -1, 8},
 int64[3] joined = {0, 0, 32}, float least = {-3.4028234663852886e+38}, float zero = {0}, int64[1] last = {3},
 float one = {1}>
{
    q4 = Reshape(q, apart)
    queries = Transpose<perm = [0, 2, 1, 3]>(q4)
    k4 = Reshape(k, apart)
    keys = Transpose<perm = [0, 2, 1, 3]>(k4)
    v4 = Reshape(v, apart)
    values = Transpose<perm = [0, 2, 1, 3]>(v4)
    new_keys = Concat<axis = -2>(past_key_values.layers.0.keys, keys)
    new_values = Concat<axis = -2>(past_key_values.layers.0.values, values)
    k5 = Unsqueeze(new_keys, two)
    k55 = Expand(k5, twice)
    repeated_keys = Reshape(k55, all)
    v5 = Unsqueeze(new_values, two)
    v55 = Expand(v5, twice)
    repeated_values = Reshape(v55, all)
    masked = Not(mask)
    number = Cast<to = 1>(masked)
    scores = Mul(number, least)
    seen = Cast<to = 1>(mask)
    count = ReduceSum<keepdims = 1>(seen, last)
    nothing = Less(count, one)
    attended = Attention<scale = 0.35>(queries, repeated_keys, repeated_values, scores)
    kept = Where(nothing, zero, attended)
    back = Transpose<perm = [0, 2, 1, 3]>(kept)
    out = Reshape(back, joined)
}
"""


def parsed(text: str) -> ir.Model:
    text = text.replace("past_key_values.layers.0.", "past_")  # no dots in the textual form
    model = ir.from_onnx_text(text)
    for value in model.graph.inputs:
        value.name = str(value.name).replace("past_", "past_key_values.layers.0.")
    return ShapeInferencePass()(model).model


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def feeds(past: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    mask = np.tril(np.ones((2, 1, 3, past + 3), bool), past)
    mask[0, :, :, 0] = False  # with no past, the first row's first query sees nothing
    shapes = {"q": (2, 3, 32), "k": (2, 3, 16), "v": (2, 3, 16)}
    cache = {f"past_key_values.layers.0.{name}": (2, 2, past, 8) for name in ("keys", "values")}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in (shapes | cache).items()} | {
        "mask": mask
    }


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("past", [0, 4])
def test_the_simple_form_computes_the_same(past: int) -> None:
    plain, simple = parsed(TRACED), parsed(TRACED)
    simplify_attention(simple)
    append_within_attention(simple)
    assert operators(simple) == {"Attention": 1, "Not": 1, "Cast": 1, "Mul": 1}
    assert [value.name for value in simple.graph.outputs] == ["out", "new_keys", "new_values"]
    expected, got = run(plain, feeds(past)), run(simple, feeds(past))
    seen = feeds(past)["mask"].any(axis=-1)[:, 0]
    np.testing.assert_allclose(got[0][seen], expected[0][seen], atol=1e-6)
    assert np.isfinite(got[0]).all()
    for one, other in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("old", "new", "left"),
    [
        # All heads are repeated as a group, not each in a row, which pairs queries with other heads.
        (
            "two = {2}, int64[5] twice = {1, 1, 2, 1, 1}",
            "two = {1}, int64[5] twice = {1, 2, 1, 1, 1}",
            {"Expand": 2, "Concat": 2},
        ),
        # Masked scores are not the lowest number, so a masked row may have an effect that `Where` removes.
        ("least = {-3.4028234663852886e+38}", "least = {-1e9}", {"Where": 1}),
        # A row that attends to nothing is replaced by 1, not by 0.
        ("zero = {0}", "zero = {1}", {"Where": 1}),
        # New keys come before the past keys.
        ("(past_key_values.layers.0.keys, keys)", "(keys, past_key_values.layers.0.keys)", {"Concat": 2}),
        # The queries are changed after the split into heads.
        (
            "queries = Transpose<perm = [0, 2, 1, 3]>(q4)",
            "q9 = Transpose<perm = [0, 2, 1, 3]>(q4)\n    queries = Neg(q9)",
            {"Transpose": 4, "Concat": 0},
        ),
    ],
)
def test_what_is_not_of_the_form_is_left_alone(old: str, new: str, left: dict[str, int]) -> None:
    assert old in TRACED
    model = parsed(TRACED.replace(old, new))
    expected = run(parsed(TRACED.replace(old, new)), feeds(4))
    simplify_attention(model)
    append_within_attention(model)
    assert {name: operators(model)[name] for name in left} == left
    for one, other in zip(run(model, feeds(4)), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_keys_that_something_else_reads_are_appended_for_it_too() -> None:
    model = parsed(TRACED.replace("float[b,2,t,8] new_values)", "float[b,2,t,8] new_values, float[b,2,t,8] more)")
                   .replace("    back =", "    more = Neg(new_keys)\n    back ="))  # fmt: skip
    simplify_attention(model)
    append_within_attention(model)
    assert operators(model)["Concat"] == 2
    assert run(model, feeds(4))[3].shape == (2, 2, 7, 8)


def test_a_layer_is_little_more_than_its_products(exported) -> None:
    nodes = exported("llama").graph.node
    assert [node.op_type for node in nodes if node.name.startswith("model.layers.1")] == LAYER


@pytest.mark.parametrize("case", ["llama", "fp16"])
def test_padding_is_a_number(exported, case: str) -> None:
    # In half precision the lowest number overflows when anything is added to it.
    ids = token_ids(3, 12).numpy()
    mask = (np.arange(12) >= np.array([[11], [5], [0]])).astype(np.int64)
    logits, cache = exported(case).runner().prefill(ids, mask)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(state.numpy()).all() for state in cache.states)


LOOKED_UP = """
<ir_version: 10, opset_import: ["" : 23]>
traced (int64[b,t] attention_mask, int64 rows, int64 columns) => (bool[b,1,1,t] seen)
<int64 zero = {0}, int64 one = {1}, int64[3] behind = {1, 2, 3}, int64[3] before = {0, 1, 2}, int64[1] last = {-1},
 int64[4] wide = {2, 1, 1, 5}>
{
    mask = Cast<to = 9>(attention_mask)
    r = Range(zero, rows, one)
    r4 = Unsqueeze(r, behind)
    r44 = Expand(r4, wide)
    r5 = Unsqueeze(r44, last)
    c = Range(zero, columns, one)
    c4 = Unsqueeze(c, before)
    c44 = Expand(c4, wide)
    c5 = Unsqueeze(c44, last)
    place = Concat<axis = -1>(r5, c5)
    found = GatherND(mask, place)
    seen = Not(found)
}
"""


@pytest.mark.parametrize(
    ("old", "new", "left"),
    [
        ("", "", False),
        ("c = Range(zero", "c = Range(one", True),  # not all columns
        ("Concat<axis = -1>(r5, c5)", "Concat<axis = -1>(c5, r5)", True),  # rows and columns are swapped
        ("attention_mask", "other_mask", True),  # an input that is not known to be the mask
    ],
)
def test_the_mask_is_looked_up_only_where_it_must_be(old: str, new: str, left: bool) -> None:
    model = ShapeInferencePass()(ir.from_onnx_text(LOOKED_UP.replace(old, new))).model
    simplify_mask(model)
    assert operators(model)["GatherND"] == left
    if not left:
        mask = np.array([[0, 1, 1, 0, 1], [1, 1, 0, 1, 1]])
        (got,) = run(model, {"attention_mask": mask, "rows": np.array(2), "columns": np.array(5)})
        np.testing.assert_array_equal(got, mask[:, None, None] == 0)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2"])
def test_no_exported_mask_is_looked_up(exported, case: str) -> None:
    assert exported(case).count("GatherND") == 0
