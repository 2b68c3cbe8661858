"""Every saved checkpoint is loaded again before it is delivered: each kind passes, and each injected fault is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cases import VOCABULARY, edit_config, make, tokenizer
from console import Outcome, optimum_cli
from optimum.streamline.checkpoints import saving
from optimum.streamline.checkpoints.loading import DTYPES, load_stock, load_tokenizer
from optimum.streamline.checkpoints.read_back import read_back
from optimum.streamline.checkpoints.saving import save_model
from optimum.streamline.editing.apply import apply_plan, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import ParityError
from optimum.streamline.model_files import transformers4_tokenizer
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import ARCHITECTURES
from optimum.streamline.pipeline.quantize import quantize
from optimum.streamline.quantization.quantizers import QUANTIZERS
from optimum.streamline.text.windows import Windows
from reference import REFERENCE
from tiny import KIN, LAYERS, tiny_model, token_ids

Cli = Callable[..., Outcome]
QUICK = ("--calibration", "stdlib", "--samples", 4, "--length", 32)
UP, EMBEDDING = "model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return lambda *words: optimum_cli(monkeypatch, capsys, "streamline", *words)


FORMS = [
    pytest.param(
        architecture,
        dtype,
        marks=pytest.mark.slow if architecture in KIN or (dtype != "bf16" and architecture != "llama") else (),
    )
    for architecture in sorted(ARCHITECTURES)
    for dtype in DTYPES
]


@pytest.mark.parametrize(("architecture", "dtype"), FORMS)
def test_what_was_saved_is_read_back(architecture: str, dtype: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, vocab_size=VOCABULARY)
    model.config.save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    own = load_tokenizer(
        ModelSource(str(tmp_path / "source"))
    )  # some architectures have a tokenizer class of their own
    apply_plan(model, Plan(LAYERS, (1, 3)), None)
    save_model(model, own, DTYPES[dtype], tmp_path / "out")
    found = read_back(tmp_path / "out", model, own, token_ids(3, 40))
    assert found["largest_difference"] <= found["allowed"]
    assert next(iter(load_file(tmp_path / "out" / "model.safetensors").values())).dtype == DTYPES[dtype]


def test_reading_back_holds_one_model_at_a_time(tmp_path: Path) -> None:
    model = load_stock(ModelSource(REFERENCE), torch.float32)
    own = load_tokenizer(ModelSource(REFERENCE))
    save_model(model, own, torch.bfloat16, tmp_path)
    read_back(tmp_path, model, own, None)
    assert list(model.parameters()) == []


# Llama 3.1 and later have `llama3`, Phi-3 `longrope`, and models that were trained on longer text one of the others.
SCALED: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 2.0},
    "linear": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [2.0, 3.0, 4.0, 5.0]},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])  # of transformers 5, and of 4 and the Hub
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_embeddings_are_read_back(kind: str, form: str, cli: Cli, tmp_path: Path) -> None:
    source, scaled = tmp_path / "in", {"rope_type": kind, **SCALED[kind]}
    fields = {"original_max_position_embeddings": 16} if kind == "longrope" else {}
    model = tiny_model("phi3" if kind == "longrope" else "llama", vocab_size=VOCABULARY, **fields)
    model.save_pretrained(source)
    tokenizer().save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    if form == "rope_parameters":
        config[form] = {"rope_theta": 50_000.0, **scaled}
    else:
        config |= {form: scaled, "rope_theta": 50_000.0}
    (source / "config.json").write_text(json.dumps(config))
    outcome = cli("prune", "-m", source, tmp_path / "out", "--layers", "2", "--length", 16)
    assert outcome.code == 0, outcome.err
    rope = AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert rope.items() >= {"rope_theta": 50_000.0, **scaled}.items()


@pytest.mark.parametrize("kind", ["layer", "mlp", "ffn", "swiglu", "linear", "corrected"])
def test_every_replacement_is_read_back(kind: str, tmp_path: Path) -> None:
    model = load_stock(ModelSource(REFERENCE), torch.float32)
    plan = Plan(16, (5, 6, 7), kind)
    apply_plan(model, plan, build_replacement(model, plan, Windows(token_ids(4, 64), "random")))
    own = load_tokenizer(ModelSource(REFERENCE))
    save_model(model, own, torch.bfloat16, tmp_path)
    found = read_back(tmp_path, model, own, token_ids(3, 40))
    assert found["largest_difference"] <= found["allowed"]


@pytest.mark.parametrize(
    "method", ["average", "blockpruner", "come", "come-p", "gromov", "layerchop", "shifted", "sleb"]
)
def test_every_edit_is_read_back(method: str, source: Path, cli: Cli, tmp_path: Path) -> None:
    words = ("--method", method, "--remove", 2, "--heal", "none", *QUICK, "--dtype", "bf16")
    outcome = cli("prune", "-m", source, *words, tmp_path / "out")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "out" / "streamline.json").read_text())["read_back"]
    assert found["largest_difference"] <= found["allowed"]


@pytest.mark.quantizers
@pytest.mark.parametrize("how", sorted(QUANTIZERS))
def test_every_quantizer_is_read_back(how: str, cli: Cli, tmp_path: Path) -> None:
    quantize(ModelSource(REFERENCE), tmp_path / "q", how, notify=lambda line: None)
    pruned = cli("prune", "-m", tmp_path / "q", "--layers", "3,5", *QUICK, tmp_path / "out")
    assert pruned.code == 0, pruned.err
    found = json.loads((tmp_path / "out" / "streamline.json").read_text())["read_back"]
    assert found["tokens"] == 3 * 32
    assert found["largest_difference"] <= found["allowed"]


def swap_layers(folder: Path) -> None:
    """Swap the weights of two layers, as a wrong renumbering would."""

    def other(name: str) -> str:
        for one, two in (("layers.1.", "layers.2."), ("layers.2.", "layers.1.")):
            if one in name:
                return name.replace(one, two)
        return name

    edit(folder, lambda weights: {other(name): value for name, value in weights.items()})


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def roll_vocabulary(folder: Path) -> None:
    """Shift every token id by one, as sorting the vocabulary anew could."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    words = fields["model"]["vocab"]
    fields["model"]["vocab"] = {word: (number + 1) % len(words) for word, number in words.items()}
    (folder / "tokenizer.json").write_text(json.dumps(fields))


FAULTS = {
    "a swapped layer": (swap_layers, "weight model.layers.1."),
    "a weight a little off": (
        lambda folder: edit(folder, lambda w: {**w, UP: w[UP] * 1.01}),
        f"weight {UP}, read back, is not what was saved",
    ),
    "embeddings, half of them lost": (
        lambda folder: edit(
            folder, lambda w: {**w, EMBEDDING: w[EMBEDDING] * (torch.arange(VOCABULARY) < 2000)[:, None]}
        ),
        f"weight {EMBEDDING}, read back, is not what was saved",
    ),
    "a lost weight": (
        lambda folder: edit(folder, lambda w: {name: value for name, value in w.items() if name != UP}),
        f"has 1 missing keys, first '{UP}'",
    ),
    "a weight too many": (
        lambda folder: edit(folder, lambda w: {**w, "model.layers.9.mlp.up_proj.weight": w[UP].clone()}),
        "unexpected keys, first 'model.layers.9",
    ),
    "a weight that is no number": (
        lambda folder: edit(folder, lambda w: {**w, UP: torch.full_like(w[UP], torch.nan)}),
        f"weight {UP}, read back, is not what was saved",
    ),
    "truncated weights": (truncate, "cannot be read back by transformers"),
    "a config of another depth": (lambda folder: edit_config(folder, num_hidden_layers=9), "missing keys"),
    "another rotary base": (
        lambda folder: edit_config(folder, rope_parameters={"rope_theta": 77.0, "rope_type": "default"}),
        "rope_parameters in config.json, read back, is",
    ),
    "another end of text": (
        lambda folder: edit_config(folder, "generation_config.json", eos_token_id=7),
        "eos_token_id in generation_config.json, read back, is 7 and not 2",
    ),
    "a chat template from elsewhere": (
        lambda folder: edit_config(folder, "tokenizer_config.json", chat_template="{{ messages }}"),
        "chat_template of its tokenizer, read back",
    ),
    "a tokenizer changed on the way": (roll_vocabulary, "of its tokenizer, read back, is"),
    "a tokenizer lost on the way": (
        lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
        "its tokenizer cannot be read back",
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_way_to_the_disk_is_caught(
    fault: str, source: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, line = FAULTS[fault]
    written = transformers4_tokenizer.save_tokenizer

    def save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        written(tokenizer, folder)
        plant(folder)

    # The tokenizer is written last, so the fault is injected into a complete checkpoint.
    monkeypatch.setattr(saving, "save_tokenizer", save)
    outcome = cli("prune", "-m", source, "--layers", 3, *QUICK, tmp_path / "out")
    assert outcome.code == 1, outcome.err
    assert line in outcome.err
    assert outcome.err.count("\n") == 1
    assert "nothing is delivered" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quantizers
def test_a_lost_scale_of_quantized_weights_is_caught(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = saving.save_weights

    def save(model: PreTrainedModel, folder: Path) -> None:
        written(model, folder)
        scale = "model.layers.0.mlp.up_proj.weight.absmax"
        edit(folder, lambda w: {**w, scale: torch.ones_like(w[scale])})

    monkeypatch.setattr(saving, "save_weights", save)
    outcome = cli("quantize", "-m", REFERENCE, "--quantize", "bnb-nf4", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "computes something else: a logit differs by" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_shard_lost_on_the_way_is_caught(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCABULARY)
    own = tokenizer()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    own.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ParityError, match="cannot be read back by transformers"):
        read_back(tmp_path, model, own, token_ids(3, 40))


def test_numbers_too_large_for_the_stored_type_are_caught_where_they_arise(cli: Cli, tmp_path: Path) -> None:
    folder = make(tmp_path / "source", dtype=torch.bfloat16)
    edit(
        folder,
        lambda w: {name: value * (700 if ".2.mlp." in name and "gate" not in name else 1) for name, value in w.items()},
    )
    outcome = cli("prune", "-m", folder, "--layers", 7, "--dtype", "fp16", *QUICK, tmp_path / "out")
    assert outcome.code == 1
    assert "its logits are not finite in float16" in outcome.err
    assert "give dtype 'bf16' or 'fp32'" in outcome.err
    assert not (tmp_path / "out").exists()
    assert cli("prune", "-m", folder, "--layers", 7, *QUICK, tmp_path / "out").code == 0


def test_the_tokens_of_the_output_are_those_of_the_original(cli: Cli, source: Path, tmp_path: Path) -> None:
    assert cli("prune", "-m", source, "--layers", 3, *QUICK, tmp_path / "out").code == 0
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    text = "A text  with\n\nspaces, ünïcödé and </s> in it."
    assert one(text)["input_ids"] == other(text)["input_ids"]
