"""Quantized checkpoints: made, saved, read again, run, and made shallower with their weights as they are."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from console import Outcome, optimum_cli
from optimum.streamline.checkpoints.loading import load, load_stock, load_tokenizer
from optimum.streamline.checkpoints.provenance import changed_files
from optimum.streamline.checkpoints.saving import save_model
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, decoder_layers, submodule
from optimum.streamline.models.layer_list import set_decoder_layers
from optimum.streamline.models.linear_modules import linear_modules_of
from optimum.streamline.models.offloaded_weights import read_parameter
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.models.quantized_weights import enable_cpu_kernel, float_values, quantized_modules
from optimum.streamline.models.removed_sublayers import without
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, mark_skipped, zero_output
from optimum.streamline.pipeline.quantize import quantize
from optimum.streamline.quantization.quantizers import QUANTIZERS
from optimum.streamline.runtime.opening import open_runner
from reference import LIBRARY, REFERENCE
from tiny import KIN, LAYERS, token_ids, wide_model

pytestmark = pytest.mark.quantizers

Save = Callable[..., str]

# For a choice that does not matter here.
_FEW = (*LIBRARY["score"], "--samples", "2", "--length", "16")


@pytest.fixture
def saved(tmp_path: Path) -> Save:
    """Saves a tiny model with a tokenizer; returns its folder."""

    def save(architecture: str = "llama", name: str = "float", **fields: object) -> str:
        folder = tmp_path / name
        wide_model(architecture, **{"vocab_size": 4096, **fields}).save_pretrained(folder)
        AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
        return str(folder)

    return save


def quietly(source: str, out: Path, quantizer: str, *exclude: str) -> str:
    quantize(ModelSource(source), out, quantizer, exclude, notify=lambda _: None)
    return str(out)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(token_ids()).logits.float()
    return found


DIFFERENT = {"llama", "gpt2", "gemma2", "qwen3_moe"}  # where layers differ most: on the others one quantizer is fast


@pytest.mark.parametrize(
    ("architecture", "quantizer"),
    [
        pytest.param(each, quantizer, marks=() if each in DIFFERENT or number % 3 == place else pytest.mark.slow)
        for number, each in enumerate(sorted(ARCHITECTURES.keys() - KIN) + sorted(KIN))
        for place, quantizer in enumerate(QUANTIZERS)
    ],
)
def test_layers_are_removed_from_a_quantized_model_as_from_any(
    saved: Save, tmp_path: Path, architecture: str, quantizer: str
) -> None:
    source = saved(architecture)
    if (quantizer, architecture) == ("torchao-int4", "gpt2"):  # its linear modules are of a class of transformers' own
        with pytest.raises(StreamlineError, match="no module of this model would be quantized"):
            quietly(source, tmp_path / "q", quantizer)
        return
    model = load_stock(ModelSource(quietly(source, tmp_path / "q", quantizer, "3")))
    assert quantization_name(model.config) == quantizer
    row, kept = architecture_of(model.config), [0, 2, 3]
    layers = decoder_layers(model, row)
    before = [logits_of_layer(layers[index], row.attention) for index in kept]
    assert not torch.equal(logits(model), logits(load(source)))  # and it has run before it is saved
    set_decoder_layers(model, row, [layers[index] for index in kept], kept)
    expected = logits(model)
    save_model(model, load_tokenizer(ModelSource(source)), None, tmp_path / "p")
    again = load(str(tmp_path / "p"))
    assert torch.equal(logits(again), expected)
    numbers = {int(part) for name in quantized_modules(again) for part in name.split(".") if part.isdecimal()}
    assert numbers == {0, 1}  # layer 3, which is 2 now, stays in float
    after = [logits_of_layer(layer, row.attention) for layer in decoder_layers(again, row)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def logits_of_layer(layer: torch.nn.Module, attention: str) -> torch.Tensor:
    """What one product of a layer's attention gives, which is its weights' doing alone."""
    product = next(each for each in submodule(layer, attention).modules() if not list(each.children()))
    weight: torch.nn.Parameter = product.weight  # type: ignore[assignment]
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        return dequantize_bnb_weight(weight, getattr(product, "state", None)).clone()
    return (weight.dequantize() if type(weight.data) is not torch.Tensor else weight).detach().clone()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_stock_transformers_computes_the_same(saved: Save, tmp_path: Path, quantizer: str) -> None:
    out = quietly(saved(tie_word_embeddings=True), tmp_path / "q", quantizer)
    ours, stock = load(out), AutoModelForCausalLM.from_pretrained(out).eval()
    enable_cpu_kernel(ours)  # as stock has it, where the processor has such a thing
    assert torch.equal(logits(ours), logits(stock))
    runner = open_runner(out)
    assert torch.equal(torch.from_numpy(runner.prefill(token_ids().numpy())[0]), logits(stock))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_was_run_is_saved_as_it_was(saved: Save, tmp_path: Path, quantizer: str) -> None:
    model = load(quietly(saved(tie_word_embeddings=True), tmp_path / "q", quantizer))
    expected = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(str(tmp_path / "again"))), expected)


def test_a_4_bit_product_that_the_cpu_kernel_cannot_take_is_taken_without_it(saved: Save, tmp_path: Path) -> None:
    out = quietly(saved(intermediate_size=80), tmp_path / "q", "bnb-nf4")  # not whole blocks of 64
    expected = logits(load(out))
    found = torch.from_numpy(open_runner(out).prefill(token_ids().numpy())[0])
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_quantized_weight_is_read_as_the_numbers_it_stands_for(saved: Save, tmp_path: Path, quantizer: str) -> None:
    source = saved()
    model, name = load(quietly(source, tmp_path / "q", quantizer)), "model.layers.1.mlp.up_proj.weight"
    true = load(source).get_parameter(name)
    error = (read_parameter(model, name) - true).abs().max() / true.abs().max()
    assert 0 < error < (0.01 if quantizer == "bnb-int8" else 0.15)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_dead_sublayers_stay_dead(saved: Save, tmp_path: Path, quantizer: str) -> None:
    model = wide_model(vocab_size=4096)
    row = architecture_of(model.config)
    zero_output(decoder_layers(model, row)[1], row, ATTENTION)
    mark_skipped(model.config, {1: [ATTENTION]})
    model.save_pretrained(folder := saved())
    assert set(names := quantized_modules(load(quietly(folder, tmp_path / "q", quantizer))))
    assert not [name for name in names if name.startswith("model.layers.1.self_attn")]
    # Stock transformers quantizes its zeros, and computes with them.
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "q").eval()
    assert "model.layers.1.self_attn.o_proj" in quantized_modules(stock)
    enable_cpu_kernel(ours := load(str(tmp_path / "q")))
    assert torch.equal(logits(ours), logits(stock))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_quantized_model_is_packed_as_any(saved: Save, tmp_path: Path, quantizer: str) -> None:
    checkpoint = quietly(saved(), tmp_path / "q", quantizer, "*.2.mlp.*")
    model, removed = load_stock(ModelSource(checkpoint)), ((1, MLP), (2, ATTENTION))
    with without(model, frozenset(removed)):
        expected = logits(model)
    apply_plan(model, packed_plan(LAYERS, removed), None)
    assert torch.equal(logits(model), expected)
    save_model(model, load_tokenizer(ModelSource(checkpoint)), None, tmp_path / "p")
    again = load(str(tmp_path / "p"))
    assert torch.equal(logits(again), expected)
    # The float MLP of layer 2 is in layer 1 now.
    in_float = {name for name in linear_modules_of(again) if name.startswith("model.layers")} - set(
        quantized_modules(again)
    )
    assert in_float == {f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_either_order_gives_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: Save, tmp_path: Path, quantizer: str
) -> None:
    source, flags = saved(), ("--layers", "1,2", *_FEW, "--quantize", quantizer)
    for steps in ("prune,quantize", "quantize,prune"):
        words = (
            "prune",
            "-m",
            source,
            tmp_path / steps,
            *flags,
            "--steps",
            steps,
            "--quantize-exclude",
            "*.[23].*,lm_head",
        )
        done = optimum_cli(monkeypatch, capsys, "streamline", *words)
        assert (done.code, done.err) == (0, "")
    one, other = (load(str(tmp_path / steps)) for steps in ("prune,quantize", "quantize,prune"))
    assert torch.equal(logits(one), logits(other))
    assert set(quantized_modules(one)) == set(quantized_modules(other))
    assert not [name for name in quantized_modules(one) if ".layers.1." in name]  # it was layer 3
    for steps in ("prune,quantize", "quantize,prune"):
        record = json.loads((tmp_path / steps / "quantization.json").read_text())
        assert (record["quantize"], record["quantize_exclude"]) == (quantizer, ["*.[23].*", "lm_head"])
        assert record["quantized"] == 2 * 7
        assert [name for name in record["float"] if ".layers.1." not in name] == ["lm_head"]
        assert len(record["float"]) == 7 + 1
        assert json.loads((tmp_path / steps / "streamline.json").read_text())["removed"] == [1, 2]
        assert QUANTIZERS[quantizer].description in (tmp_path / steps / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "quantizer"),
    [
        pytest.param(
            method, quantizer, marks=() if quantizer == "bnb-nf4" or method == "shortgpt" else pytest.mark.slow
        )
        for method in (
            "blockpruner",
            "shortgpt",
            "gromov",
            "layerchop",
            "llm-streamline",
            "shifted",
            "shortened-ppl",
            "sleb",
        )
        for quantizer in QUANTIZERS
    ],
)
def test_methods_that_only_remove_take_a_quantized_model(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    saved: Save,
    tmp_path: Path,
    method: str,
    quantizer: str,
) -> None:
    quantized = quietly(saved(), tmp_path / "q", quantizer)
    words = ("--method", method, "--remove", "2", "--replacement", "none", "--heal", "none")
    words += _FEW
    done = optimum_cli(monkeypatch, capsys, "streamline", "prune", "-m", quantized, tmp_path / "p", *words)
    assert (done.code, done.err) == (0, "")
    model = load(str(tmp_path / "p"))
    assert (model.config.num_hidden_layers, quantization_name(model.config)) == (LAYERS - 2, quantizer)
    card = (tmp_path / "p" / "README.md").read_text()
    assert f"The original is quantized ({quantizer}). The layers that stayed keep their quantized weights.\n" in card


_REMOVE = ("--remove", "2", *_FEW)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "method 'auto': tries merges, linear maps and corrections, so it needs float weights, and here they are"),
        (("--method", "come"), "method 'come': merges weights, so it needs float weights"),
        (("--method", "average"), "method 'average': merges weights"),
        (("--method", "blockpruner", "--no-packed"), "method 'blockpruner': zeroes attentions and MLPs"),
        (("--method", "shortened-taylor", "--protect", "0,0"), "method 'shortened-taylor': takes gradients"),
        (("--replacement", "mlp"), "replacement 'mlp': needs float weights"),
        (("--replacement", "linear"), "replacement 'linear': needs float weights"),
        (("--method", "shifted", "--replacement", "corrected"), "replacement 'corrected': needs float weights"),
        (("--method", "shortgpt", "--heal", "lm", "--lora"), "heal 'lm': needs float weights"),
        (("--method", "layerchop"), "heal 'lm': needs float weights"),
        (
            ("--method", "shortgpt", "--dtype", "fp16"),
            "dtype 'fp16': the weights are quantized (bnb-int8) and keep their type",
        ),
        (("--method", "shortgpt", "--quantize", "bnb-nf4"), "the model is quantized already (bnb-int8)"),
    ],
)
def test_what_needs_float_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    saved: Save,
    tmp_path: Path,
    flags: tuple[str, ...],
    said: str,
) -> None:
    quantized = quietly(saved(), tmp_path / "q", "bnb-int8")
    done = optimum_cli(monkeypatch, capsys, "streamline", "prune", "-m", quantized, tmp_path / "p", *_REMOVE, *flags)
    assert_refused(done, said)
    assert not (tmp_path / "p").exists()


def assert_refused(done: Outcome, said: str) -> None:
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert said in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--quantize", "int3"),
            "quantize 'int3': unknown; one of none, bnb-int8, bnb-nf4, torchao-int4, int8, int8-st",
        ),
        (("--quantize", "int4"), "quantize 'int4': quantizes ONNX graphs; use `run` with format 'onnx'"),
        (("--quantize-exclude", "3"), "quantize-exclude '3': nothing is quantized; give quantize too"),
        (("--steps", "quantize,prune"), "steps 'quantize,prune': nothing is quantized; give quantize too"),
        (("--steps", "prune"), "steps is 'prune'"),
        (
            ("--quantize", "bnb-nf4", "--quantize-exclude", "9"),
            "quantize-exclude '9': there is no layer 9; the model has layers 0 to 4",
        ),
        (
            ("--quantize", "bnb-nf4", "--replacement", "ffn", "--method", "llm-streamline"),
            "replacement 'ffn': makes bare layers, which quantize 'bnb-nf4' does not support; use another replacement",
        ),
        (
            ("--quantize", "bnb-nf4", "--steps", "quantize,prune", "--method", "shortgpt", "--dtype", "bf16"),
            "dtype 'bf16': the weights are quantized (bnb-nf4) and keep their type; leave it out",
        ),
        (
            ("--quantize", "bnb-nf4", "--steps", "quantize,prune", "--method", "come"),
            "method 'come': merges weights, so it needs float weights, and here they are quantized (bnb-nf4)",
        ),
    ],
)
def test_wrong_words_about_quantizing_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    saved: Save,
    tmp_path: Path,
    flags: tuple[str, ...],
    said: str,
) -> None:
    words = ("prune", "-m", saved(), tmp_path / "p", "--method", "shortgpt", *_REMOVE, *flags)
    assert_refused(optimum_cli(monkeypatch, capsys, "streamline", *words), said)
    assert not (tmp_path / "p").exists()


def test_the_command_quantizes_what_was_pruned_and_keeps_its_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: Save, tmp_path: Path
) -> None:
    pruned, out = tmp_path / "p", tmp_path / "q"
    flags = ("--layers", "1,2", *_FEW)
    assert optimum_cli(monkeypatch, capsys, "streamline", "prune", "-m", saved(), pruned, *flags).code == 0
    words = ("quantize", "-m", pruned, out, "--quantize", "bnb-nf4", "--quantize-exclude", "2")
    done = optimum_cli(monkeypatch, capsys, "streamline", *words)
    assert (done.code, done.err) == (0, "")
    assert "quantized (bnb-nf4)" in done.out
    said = r"left in float: model\.layers\.\*\.self_attn\.q_proj \(1 of 3\), .*, lm_head \(\d\d\.\d% of the weights"
    assert re.search(said, done.out)
    assert {name.split(".")[2] for name in quantized_modules(load(str(out)))} == {"0", "1"}  # its own layer 2 is not
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert (
        f"optimum-streamline quantized this model from `{Path(pruned).name}`: {QUANTIZERS['bnb-nf4'].description}.\n"
        in card
    )
    assert "| 1 | 3 | kept |" in card
    record, origin = (json.loads((folder / "streamline.json").read_text()) for folder in (out, pruned))
    hashed = record.pop("files")["model.safetensors"]
    assert hashed == hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    configs = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert origin.pop("files").keys() == {"model.safetensors", *configs}
    assert record.pop("edited") == []
    assert record == origin
    edited = shutil.copytree(pruned, tmp_path / "edited")
    (edited / "config.json").write_text((edited / "config.json").read_text() + "\n")
    words_edited = ("quantize", "-m", edited, tmp_path / "of_edited", "--quantize", "bnb-nf4")
    assert optimum_cli(monkeypatch, capsys, "streamline", *words_edited).code == 0
    said = "before it was quantized, config.json is not what streamline.json says was written"
    assert changed_files(ModelSource(str(tmp_path / "of_edited"))) == [said]
    assert "exists already" in optimum_cli(monkeypatch, capsys, "streamline", *words).err
    assert optimum_cli(monkeypatch, capsys, "streamline", *words, "--overwrite").code == 0
    wrong = ("quantize", "-m", pruned, tmp_path / "x", "--quantize", "bnb-nf4", "--quantize-exclude", "3")
    assert_refused(
        optimum_cli(monkeypatch, capsys, "streamline", *wrong),
        "quantize-exclude '3': there is no layer 3; the model has layers 0 to 2",
    )


# The other order is fast for a quantized export, in `test_quantized_checkpoint.py`.
@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("steps", ["prune,quantize", pytest.param("quantize,prune", marks=pytest.mark.slow)])
def test_a_run_quantizes_its_checkpoint_and_is_resumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: Save, tmp_path: Path, steps: str
) -> None:
    few = (*LIBRARY["run"], *_FEW, "--remove", "2", "--eval-samples", "2", "--method", "shortgpt")
    words = ("run", "-m", saved(), tmp_path / "r", *few, "--heal", "none", "--quantize", "bnb-nf4", "--steps", steps)
    done = optimum_cli(monkeypatch, capsys, "streamline", *words)
    assert (done.code, done.err) == (0, "")
    assert "left in float: lm_head (" in done.out
    original, candidate = json.loads((tmp_path / "r" / "report.json").read_text())["rows"]
    assert (original["dtype"], candidate["dtype"], candidate["layers"]) == ("fp32", "bnb-nf4", LAYERS - 2)
    made = (tmp_path / "r" / "model.safetensors").stat().st_mtime_ns
    again = optimum_cli(monkeypatch, capsys, "streamline", *words)
    assert (again.code, again.err) == (0, "")
    assert (tmp_path / "r" / "model.safetensors").stat().st_mtime_ns == made


def test_a_quantized_model_is_not_taken_for_the_float_one_of_its_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: Save, tmp_path: Path
) -> None:
    source, flags = saved(), ("--layers", "1,2", *_FEW)
    assert optimum_cli(monkeypatch, capsys, "streamline", "prune", "-m", source, tmp_path / "p", *flags).code == 0
    quietly(str(tmp_path / "p"), tmp_path / "q", "bnb-nf4")
    done = optimum_cli(
        monkeypatch, capsys, "streamline", "run", "-m", source, tmp_path / "q", *flags, *_FEW[:2], *LIBRARY["validate"]
    )
    assert_refused(done, "quantized since it was made; choose another folder, or pass --overwrite")


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_that_stay_in_float_are_named_with_their_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: Save, tmp_path: Path, architecture: str
) -> None:
    words = ("quantize", "-m", saved(architecture, tie_word_embeddings=True), tmp_path / "q", "--quantize", "bnb-nf4")
    done = optimum_cli(monkeypatch, capsys, "streamline", *words)
    assert (done.code, done.err) == (0, "")
    assert "left in float: model.layers.*.mlp.experts, lm_head (" in done.out
    record = json.loads((tmp_path / "q" / "quantization.json").read_text())
    assert record["float_share"] > 0.5
    model = load(str(tmp_path / "q"))
    read = {name: value for name, value in model.named_parameters() if "norm" not in name and ".gate." not in name}
    left = sum(value.numel() for name, value in read.items() if ".experts." in name or name.startswith("model.embed"))
    every = sum(each.numel() for name, each in load(str(tmp_path / "float")).named_parameters() if name in read)
    assert record["float_share"] == pytest.approx(left / every, abs=0.002)


@pytest.mark.parametrize(
    ("architecture", "fields", "flags", "said"),
    [
        (
            "llama",
            {},
            ("--quantize", "int4"),
            "quantize 'int4': cannot quantize a checkpoint; use one of bnb-int8, bnb-nf4, torchao",
        ),
        (
            "llama",
            {},
            ("--quantize", "bnb-nf4", "--quantize-exclude", "*"),
            "no module of this model would be quantized",
        ),
        ("llama", {}, ("--quantize", "bnb-nf4", "--device", "gpu"), "device 'gpu': unknown; one of cpu, cuda"),
        (
            "llama",
            {"intermediate_size": 80},
            ("--quantize", "torchao-int4"),
            "model.layers.0.mlp.down_proj has 80 inputs, not a multiple of 32",
        ),
        ("gpt2", {}, ("--quantize", "torchao-int4"), "no module of this model would be quantized"),
    ],
)
def test_what_cannot_be_quantized_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    saved: Save,
    tmp_path: Path,
    architecture: str,
    fields: dict[str, object],
    flags: tuple[str, ...],
    said: str,
) -> None:
    words = ("quantize", "-m", saved(architecture, **fields), tmp_path / "q", *flags)
    assert_refused(optimum_cli(monkeypatch, capsys, "streamline", *words), said)
    assert not (tmp_path / "q").exists()


def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: Save, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    words = ("quantize", "-m", saved(), tmp_path / "q", "--quantize", "bnb-nf4")
    said = 'this needs the package bitsandbytes: pip install "optimum-streamline[bitsandbytes]"'
    assert_refused(optimum_cli(monkeypatch, capsys, "streamline", *words), said)


@pytest.mark.usefixtures("untimed")
def test_validation_names_the_quantization_and_counts_its_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(REFERENCE, tmp_path / "model")
    out = quietly(str(tmp_path / "model"), tmp_path / "q", "bnb-nf4")
    words = ("validate", tmp_path / "model", out, "--output", tmp_path / "r", "--eval-samples", "16", "--length", "64")
    words += LIBRARY["validate"]
    done = optimum_cli(monkeypatch, capsys, "streamline", *words)
    assert (done.code, done.err) == (0, "")
    original, row = json.loads((tmp_path / "r" / "report.json").read_text())["rows"]
    assert (original["dtype"], row["dtype"]) == ("fp32", "bnb-nf4")
    assert row["parameters"] == original["parameters"]
    # A tied embedding of 4,096 x 128 numbers in 2 bytes; 3.15 million weights in half a byte each and 4 bytes for 64.
    assert 3.5 < row["ideal_decode_speedup"] < 5
    assert 1 < row["perplexity_ratio"]["value"] < 1.1


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_on_a_gpu_layers_are_removed_and_what_is_saved_is_what_ran(tmp_path: Path, quantizer: str) -> None:
    source = tmp_path / "float"
    model = wide_model(hidden_size=256, intermediate_size=512, vocab_size=4096)
    model.to(torch.bfloat16).save_pretrained(source)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(source)
    ids = token_ids().cuda()
    quantize(ModelSource(str(source)), tmp_path / "q", quantizer, device="cuda", notify=lambda _: None)
    quantized = load_stock(ModelSource(str(tmp_path / "q")), device="cuda")
    names = quantized_modules(quantized)
    assert len(names) == LAYERS * 7
    for name in names:
        module = quantized.get_submodule(name)
        pair = [float_values(module, module.weight).cpu(), model.get_submodule(name).weight]
        assert torch.corrcoef(torch.stack([values.detach().flatten().float() for values in pair]))[0, 1] > 0.98
    row, kept = architecture_of(quantized.config), [0, 2, 4]
    layers = decoder_layers(quantized, row)
    with torch.inference_mode():
        before = quantized(ids).logits
        true = load(str(source), device="cuda")(ids).logits
        set_decoder_layers(quantized, row, [layers[index] for index in kept], kept)
        expected = quantized(ids).logits
    # The weights are random, so rounding them to 4 bits changes the logits much.
    assert 0.7 < torch.corrcoef(torch.stack([before.flatten().float(), true.flatten().float()]))[0, 1] < 1
    save_model(quantized, load_tokenizer(ModelSource(str(source))), None, tmp_path / "p")
    with torch.inference_mode():
        found = load(str(tmp_path / "p"), device="cuda")(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 * expected.abs().max().item())
    runner = open_runner(str(tmp_path / "p"), device="cuda")
    _, cache = runner.prefill(token_ids().numpy())
    assert runner.decode(token_ids(length=1).numpy(), cache)[0].shape == (2, 1, 4096)
