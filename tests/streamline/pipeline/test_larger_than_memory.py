"""A model whose weights stay on disk is scored, pruned and saved as one in memory is: the same scores and bytes."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from cases import edit_weights, make
from console import Outcome, optimum_cli
from optimum.streamline import StreamlineConfig, Streamliner
from optimum.streamline.checkpoints.loading import load_on_disk, load_stock, read_config
from optimum.streamline.checkpoints.saving import save_weights
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.candidate_corrections import fit_candidates
from optimum.streamline.editing.correction import fit_corrections
from optimum.streamline.editing.linear_map import fold
from optimum.streamline.editing.merging import copy_layer, replace_pair
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing import stages
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models import offloaded_weights
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, decoder_layers
from optimum.streamline.models.removed_sublayers import whole_layer
from optimum.streamline.models.skipped_sublayers import MLP, zero_output
from optimum.streamline.pipeline import larger_than_memory
from optimum.streamline.pipeline.larger_than_memory import stays_on_disk, why_in_memory
from optimum.streamline.pipeline.prune import prune, score
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.ablation import removal_losses
from optimum.streamline.scoring.taylor import taylor_importance
from optimum.streamline.system.notify import silent
from optimum.streamline.text.windows import Windows
from reference import REFERENCE
from tiny import LAYERS, every, tiny_model, token_ids

Cli = Callable[..., Outcome]
TEXT: dict[str, Any] = {"calibration": "stdlib:calibration", "samples": 10, "length": 16}
# Mixed kinds of layers, other names of modules, experts that transformers converts, and a tied head.
FAST = {"gemma2", "gpt2", "llama", "mixtral"}
CHANGES: dict[str, dict[str, Any]] = {
    "merge": {"method": "come", "remove": 1},
    "map": {"method": "shortgpt", "replacement": "linear", "remove": 2},
    "correction": {"layers": "1,3", "replacement": "corrected"},
}
TOKENS = Windows(token_ids(6, 8), "random")
LITTLE = {"max_memory": "1MB"}  # less than any process takes


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return lambda *words: optimum_cli(monkeypatch, capsys, "streamline", *words)


def pruned(source: Path | str, out: Path, **fields: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the record of a pruned checkpoint."""
    options: dict[str, Any] = {"overwrite": False, "verbose": False, "notify": silent}
    prune(ModelSource(str(source)), make_recipe({**TEXT, **fields}), out, **options)
    record = json.loads((out / "streamline.json").read_text())
    tensors = [load_file(file) for file in sorted(out.glob("*.safetensors"))]
    return {name: value for each in tensors for name, value in each.items()}, record


def loaded(source: Path, offload: Path | None) -> Any:
    """A checkpoint in fp32: in memory, or with its weights on disk."""
    if offload is None:
        return load_stock(ModelSource(str(source)), torch.float32)
    return load_on_disk(ModelSource(str(source)), offload)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def both_ways(source: Path | str, folder: Path, **fields: Any) -> dict[str, Any]:
    """Prune in memory and on disk, and compare; returns the record of the latter."""
    in_memory, recorded = pruned(source, folder / "in_memory", **fields)
    on_disk, record = pruned(source, folder / "on_disk", **fields, **LITTLE)
    assert_equal(in_memory, on_disk)
    assert record["scores"] == recorded["scores"]
    for key in ("plan", "layers", "data", "tried"):
        assert record.get(key) == recorded.get(key)
    configs = (folder / each / "config.json" for each in ("in_memory", "on_disk"))
    assert len({each.read_text() for each in configs}) == 1
    return record


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each in FAST else pytest.mark.slow) for each in sorted(ARCHITECTURES)],
)
def test_every_architecture_is_pruned_on_disk_as_in_memory(architecture: str, tmp_path: Path) -> None:
    source = make(tmp_path / "in", architecture, torch.bfloat16, num_hidden_layers=LAYERS)
    record = both_ways(source, tmp_path, method="shortgpt", remove=2)
    assert record["scores"] is not None


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"method": "llm-streamline", "replacement": "none"}, marks=pytest.mark.slow),
        pytest.param({"method": "gromov"}, marks=pytest.mark.slow),
        pytest.param({"method": "layerchop", "heal": "none"}, marks=pytest.mark.slow),
        {"method": "sleb"},
        pytest.param({"method": "shortened-ppl"}, marks=pytest.mark.slow),
        {"method": "shifted"},
        pytest.param({"method": "blockpruner"}, marks=pytest.mark.slow),
        pytest.param({"method": "shortgpt", "iterative": True}, marks=pytest.mark.slow),
        {"method": "shortgpt", "dtype": "fp16"},
        {"method": "come", "heal": "none"},
        {"method": "come", "heal": "none", "dtype": "bf16"},
        {"method": "come-p", "heal": "none"},
        pytest.param({"method": "average", "heal": "none"}, marks=pytest.mark.slow),
        {"method": "sleb", "replacement": "linear"},
        pytest.param({"method": "shifted", "replacement": "linear"}, marks=pytest.mark.slow),
        {"method": "sleb", "replacement": "corrected", "remove": 2},
        pytest.param({"method": "shifted", "replacement": "corrected"}, marks=pytest.mark.slow),
        {"method": "shortened-taylor", "remove": 2},
        pytest.param({"method": "blockpruner", "packed": False}, marks=pytest.mark.slow),
        pytest.param({"method": "auto", "heal": "none"}, marks=pytest.mark.slow),
        pytest.param({"method": "blockpruner", "replacement": "corrected"}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_every_method_that_removes_layers_chooses_the_same_on_disk(fields: dict[str, Any], tmp_path: Path) -> None:
    both_ways(make(tmp_path / "in"), tmp_path, **{"remove": 3, **fields})


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each == "gpt2" else pytest.mark.slow) for each in sorted(ARCHITECTURES)],
)
@pytest.mark.parametrize("edit", list(CHANGES))
def test_weights_that_change_are_written_to_disk(architecture: str, edit: str, tmp_path: Path) -> None:
    source = make(tmp_path / "in", architecture, torch.bfloat16, num_hidden_layers=LAYERS)
    recipe = make_recipe({**TEXT, **CHANGES[edit]})
    try:
        METHODS[recipe.resolved_method].check(recipe, read_config(ModelSource(str(source))))
    except StreamlineError as error:
        pytest.skip(str(error))
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    both_ways(source, tmp_path, **CHANGES[edit])
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_what_changes_is_on_disk_again(tmp_path: Path) -> None:
    source = make(tmp_path / "in", dtype=torch.bfloat16)
    model = loaded(source, tmp_path / "scratch")
    architecture, [weights] = architecture_of(model.config), offloaded_weights.weights_on_disk(model)
    replace_pair(model, 1, copy_layer(model, 1))
    fold(model, (0, MLP), 2 * torch.eye(model.config.hidden_size, dtype=torch.float64))
    zero_output(decoder_layers(model, architecture)[3], architecture, MLP)
    assert all(parameter.is_meta for parameter in model.parameters())
    new = {name for name, place in weights.index.items() if str(tmp_path / "scratch") in place["safetensors_file"]}
    assert {name for name in new if not name.startswith("new")} == {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.4.mlp.down_proj.weight",  # the third after the merge
    }
    assert len([name for name in new if name.startswith("new")]) == len(
        [*decoder_layers(model, architecture)[0].parameters()]
    )
    with offloaded_weights.in_memory(decoder_layers(model, architecture)[0]):
        with pytest.raises(ValueError, match="in memory for reading"):
            fold(model, (0, MLP), torch.eye(model.config.hidden_size, dtype=torch.float64))
        assert not any(parameter.is_meta for parameter in decoder_layers(model, architecture)[0].parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sleb", "come"])
def test_a_trained_model_is_pruned_on_disk_as_in_memory(method: str, tmp_path: Path) -> None:
    both_ways(REFERENCE, tmp_path, method=method, heal="none", remove=4, samples=24, length=256)


def test_zeros_are_written_where_weights_are_on_disk(tmp_path: Path) -> None:
    source = make(tmp_path / "in", "starcoder2", num_hidden_layers=LAYERS)  # its projections have biases
    plan = Plan(LAYERS, (1,), skipped=((0, "attention"), (3, "mlp")))
    saved = []
    for offload in (None, tmp_path / "scratch"):
        model = loaded(source, offload)
        apply_plan(model, plan, None)
        save_weights(model, tmp_path / f"out{len(saved)}")
        saved.append(load_file(tmp_path / f"out{len(saved)}" / "model.safetensors"))
    assert_equal(*saved)
    assert not saved[1]["model.layers.2.mlp.c_proj.bias"].any()


@pytest.mark.parametrize("words", [("score",), ("prune", "--method", "shortgpt", "--remove", "1")])
def test_a_command_says_that_weights_stay_on_disk(cli: Cli, tmp_path: Path, words: tuple[str, ...]) -> None:
    source = make(tmp_path / "in")
    text = ("--calibration", "stdlib", "--samples", 4, "--length", 24)
    outcomes = [
        cli(words[0], "-m", source, tmp_path / f"out{len(limit)}", *words[1:], *text, *limit)
        for limit in ((), ("--max-memory", "1MB"))
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert [larger_than_memory.ON_DISK in outcome.out for outcome in outcomes] == [False, True]
    if words == ("score",):
        files = [(tmp_path / folder / "scores.json").read_text() for folder in ("out0", "out2")]
        assert files[0] == files[1]


def test_named_layers_are_removed_without_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum.streamline.pipeline.prune.measure_scores", None)
    record = both_ways(make(tmp_path / "in", dtype=torch.bfloat16), tmp_path, layers="1,3-4")
    assert record["scores"] is None
    assert record["plan"] == "remove layers 1, 3-4: 8 layers become 5"


def test_pickled_weights_are_pruned_on_disk(tmp_path: Path) -> None:
    source = make(tmp_path / "in")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    both_ways(source, tmp_path, layers="2")


def test_a_model_on_disk_is_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum.streamline.checkpoints.saving.OFFLOADED_SHARD", "200KB")
    both_ways(make(tmp_path / "in"), tmp_path, layers="2,5")
    index = json.loads((tmp_path / "on_disk" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2


def forward(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model(TOKENS.ids)


def search_with_corrections(model: PreTrainedModel) -> None:
    candidates = [whole_layer(layer) for layer in (0, 3, 5)]
    fitted = fit_candidates(model, TOKENS, candidates, whole_layer(1))
    removal_losses(model, TOKENS, candidates, whole_layer(1), fitted)


def fit_all_corrections(model: PreTrainedModel) -> None:
    fit_corrections(model, whole_layer(0) | {(3, "mlp"), (4, "attention")}, TOKENS)


def take_gradients(model: PreTrainedModel) -> None:
    taylor_importance(model, TOKENS)


@pytest.mark.parametrize("work", [forward, search_with_corrections, fit_all_corrections, take_gradients])
def test_one_layer_is_in_memory_at_a_time(work: Callable[[PreTrainedModel], None], tmp_path: Path) -> None:
    model = loaded(make(tmp_path / "in"), tmp_path / "scratch")
    layers = decoder_layers(model, architecture_of(model.config))
    seen: list[tuple[int, ...]] = []

    def note(*_: Any) -> None:
        seen.append(tuple(n for n, layer in enumerate(layers) if any(not each.is_meta for each in layer.parameters())))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module._old_forward = noting(module, module._old_forward, note)
    work(model)
    assert [max(len(each) for each in seen), {number for each in seen for number in each}] == [1, set(range(8))]
    assert offloaded_weights.is_offloaded(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    gc.collect()
    assert not list((tmp_path / "scratch").iterdir())  # states and corrections are deleted once they are used


def noting(module: nn.Module, forward: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        assert not module.get_parameter("weight").is_meta
        note()
        return forward(*args, **kwargs)

    return noted


def test_a_copied_layer_gives_its_memory_back_at_once(tmp_path: Path) -> None:
    model = loaded(make(tmp_path / "in"), tmp_path / "scratch")
    gc.disable()
    try:
        copied = weakref.ref(copy_layer(model, 1))
        assert copied() is None
    finally:
        gc.enable()


def test_only_the_rows_of_a_batch_are_read_of_the_embeddings(tmp_path: Path) -> None:
    source = make(tmp_path / "in", dtype=torch.bfloat16)
    whole, model = loaded(source, None), loaded(source, tmp_path / "scratch")
    table, sizes = model.get_input_embeddings(), []
    forward = table._old_forward
    table._old_forward = lambda *args, **kwargs: (sizes.append(len(table.weight)), forward(*args, **kwargs))[1]
    ids = torch.tensor([[5, 9, 5], [7, 9, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert sizes == [3]
    assert table.weight.shape == whole.get_input_embeddings().weight.shape
    assert table.padding_idx == whole.get_input_embeddings().padding_idx


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each in ("gpt2", "llama") else pytest.mark.slow) for each in sorted(ARCHITECTURES)],
)
def test_layers_are_trained_one_by_one_on_disk_as_in_memory(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "in", architecture, torch.bfloat16, num_hidden_layers=LAYERS)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    text = {"heal_data": "stdlib:calibration", "heal_tokens": 16 * 20, "heal_epochs": 1, "heal_lr": 1e-2}
    healing = {**text, "heal": "local", "layers": "1,3", "dtype": "fp32"}
    unhealed, _ = pruned(source, tmp_path / "unhealed", layers="1,3", dtype="fp32")
    in_memory, recorded = pruned(source, tmp_path / "in_memory", **healing)
    monkeypatch.setattr("optimum.streamline.pipeline.prune.stays_on_disk", lambda *_: True)
    train, read = stages.train_model, list[list[int]]()

    def watched(model: PreTrainedModel, *args: Any, **rest: Any) -> Any:
        layers = decoder_layers(model, architecture_of(model.config))
        read.append([index for index, layer in enumerate(layers) if not any(p.is_meta for p in layer.parameters())])
        return train(model, *args, **rest)

    monkeypatch.setattr(stages, "train_model", watched)
    on_disk, record = pruned(source, tmp_path / "on_disk", **healing)
    assert read == [[0], [1]]  # the layer that is trained, and no other
    assert_equal(in_memory, on_disk)
    assert not all(torch.equal(value, unhealed[name]) for name, value in on_disk.items())
    assert record["healing"] == recorded["healing"]
    assert [each["layer"] for each in record["healing"]] == [0, 1]
    assert all(each["best"] < each["before"] for each in record["healing"])
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"method": "come-sp", "remove": 1}, r"trains \(heal distill\)"),
        ({"method": "auto", "remove": 1}, r"trains \(heal distill, method auto\)"),
        (
            {"method": "llm-streamline", "remove": 1, "replacement": "layer", "heal": "none"},
            r"puts in a new layer \(replacement layer\)",
        ),
        ({"method": "sleb", "remove": 1, "heal": "lm"}, r"trains \(heal lm\)"),
        ({"layers": "1", "heal": "local", "heal_data": "self"}, r"lets the original sample text \(heal-data self\)"),
        ({"method": "sleb", "remove": 1, "heal": "local+distill"}, r"trains \(heal local\+distill\)"),
        ({"method": "sleb", "remove": 1, "quantize": "bnb-nf4"}, "quantizes by bnb-nf4"),
    ],
)
def test_what_needs_weights_in_memory_is_refused_in_too_little(
    fields: dict[str, Any], why: str, tmp_path: Path
) -> None:
    source = make(tmp_path / "in")
    with pytest.raises(StreamlineError, match=f"max-memory '1MB': the recipe {why}, so the weights must be in memory"):
        pruned(source, tmp_path / "out", **fields, **LITTLE)
    assert not (tmp_path / "out").exists()
    config = tiny_model().config
    recipe = make_recipe({**TEXT, **fields})
    assert not stays_on_disk(ModelSource(str(source)), recipe, config, why_in_memory(recipe, config))


def test_the_memory_that_is_free_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = ModelSource(str(make(tmp_path / "in"))), make_recipe(TEXT)
    config = read_config(source)
    assert not stays_on_disk(source, recipe, config)
    monkeypatch.setattr(larger_than_memory, "free_memory", lambda: 10**5)
    assert stays_on_disk(source, recipe, config)
    assert not stays_on_disk(source, recipe, config, "trains")  # it may still fit into swap: tried as before
    notes: list[str] = []
    score(source, recipe, notes.append)
    assert larger_than_memory.ON_DISK in notes


@pytest.mark.parametrize("value", ["lots", "0", "-1GB", "1TB", 0])
def test_a_wrong_size_is_one_line(cli: Cli, tmp_path: Path, value: Any) -> None:
    refused = cli(
        "prune",
        "-m",
        make(tmp_path / "in"),
        f"--max-memory={value}",
        "--layers",
        "1",
        "--length",
        "24",
        tmp_path / "out",
    )
    assert (refused.code, refused.out) == (2, "")
    assert "must be a number of bytes, or a size such as 500MB or 1.5GB" in refused.err
    assert refused.err.count("\n") == 1


def test_quantized_weights_are_scored_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(str(make(tmp_path / "in")))
    monkeypatch.setattr(larger_than_memory, "free_memory", lambda: 10**5)
    monkeypatch.setattr("optimum.streamline.pipeline.prune.quantization_name", lambda config: "bnb-nf4")
    score(source, make_recipe(TEXT), silent)  # as ever: bitsandbytes cannot leave its weights on disk


def test_only_one_process_leaves_weights_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(str(make(tmp_path / "in")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StreamlineError, match="max-memory '1MB': the recipe shares its work among processes"):
        stays_on_disk(source, make_recipe({**TEXT, **LITTLE}), read_config(source))
    monkeypatch.setattr(larger_than_memory, "free_memory", lambda: 10**5)
    assert not stays_on_disk(source, make_recipe(TEXT), read_config(source))


@pytest.mark.parametrize(
    ("on_gpu", "in_memory", "stays"), [(10**12, 10**12, False), (10**5, 10**12, True), (10**12, 10**5, True)]
)
def test_what_does_not_fit_on_the_gpu_stays_on_disk(
    on_gpu: int, in_memory: int, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe = ModelSource(str(make(tmp_path / "in"))), make_recipe({**TEXT, "device": "cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (on_gpu, 10**12))
    monkeypatch.setattr(larger_than_memory, "free_memory", lambda: in_memory)
    assert stays_on_disk(source, recipe, read_config(source)) is stays
    assert not stays_on_disk(source, recipe, read_config(source), "trains")
    assert larger_than_memory.why_on_disk(recipe) == larger_than_memory.ON_DISK_FOR_GPU


def test_a_model_on_disk_computes_on_the_device_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "states").mkdir()
    model = load_on_disk(ModelSource(str(make(tmp_path / "in"))), tmp_path / "states")
    offloaded_weights.compute_on(model, "meta")
    assert offloaded_weights.device_of(model).type == "meta"
    assert {each.device.type for each in model.buffers()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", every())
@pytest.mark.parametrize("edit", ["removal", *CHANGES])
def test_weights_go_to_the_gpu_one_by_one(
    architecture: str, edit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "in", architecture, torch.bfloat16, num_hidden_layers=LAYERS)
    fields = {"device": "cuda", **CHANGES.get(edit, {"method": "sleb", "remove": 2})}
    checked = make_recipe({**TEXT, **fields})
    try:
        METHODS[checked.resolved_method].check(checked, read_config(ModelSource(str(source))))
    except StreamlineError as error:
        pytest.skip(str(error))
    whole, recorded = pruned(source, tmp_path / "whole", **fields)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**5, 10**12))
    recipe = make_recipe({**TEXT, **fields})
    assert stays_on_disk(ModelSource(str(source)), recipe, read_config(ModelSource(str(source))))
    streamed, record = pruned(source, tmp_path / "streamed", **fields)
    assert_equal(whole, streamed)
    assert record["scores"] == recorded["scores"]


def test_a_weight_that_is_too_large_for_its_new_type_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "in", dtype=torch.bfloat16)
    edit_weights(source, lambda weights: weights["model.layers.2.mlp.up_proj.weight"].fill_(1e5))
    with pytest.raises(
        StreamlineError, match=r"stored in torch.float16.*model.layers.1.mlp.up_proj.weight holds NaN or inf"
    ):
        pruned(source, tmp_path / "out", layers="0", dtype="fp16", **LITTLE)
    with pytest.raises(StreamlineError, match=r"model.layers.2.mlp.up_proj.weight holds NaN or infinite"):
        load_stock(ModelSource(str(source)), torch.float16, offload=tmp_path / "scratch")


def test_stored_types_that_differ_are_read_in_fp32(tmp_path: Path) -> None:
    source = make(tmp_path / "in", dtype=torch.bfloat16)

    def widen(weights: dict[str, torch.Tensor]) -> None:
        name = "model.layers.2.mlp.up_proj.weight"
        weights[name] = weights[name].float() * 1.001

    edit_weights(source, widen)
    both_ways(source, tmp_path, method="shortgpt", remove=2)


def test_the_python_api_says_that_it_keeps_weights_in_memory(tmp_path: Path) -> None:
    source = str(make(tmp_path / "in"))
    with pytest.raises(StreamlineError, match="max-memory '1GB': the steps keep the weights in memory"):
        Streamliner.from_pretrained(source).plan(
            StreamlineConfig(remove=1, method="shortgpt", max_memory="1GB", **TEXT)
        )


def test_no_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    pruned(make(tmp_path / "in", "mixtral", num_hidden_layers=LAYERS), tmp_path / "out", layers="2", **LITTLE)
    assert list((tmp_path / "temporary").iterdir()) == []
