"""Every edit of a float model, quantized afterwards: one step gives what two commands give, by every quantizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from console import optimum_cli
from optimum.streamline.checkpoints.loading import load
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.quantized_weights import enable_cpu_kernel, quantized_modules
from optimum.streamline.pipeline.quantize import quantize
from optimum.streamline.quantization.quantizers import QUANTIZERS
from reference import REFERENCE
from tiny import token_ids, wide_model

pytestmark = pytest.mark.quantizers

_TRAINED = ("--heal-tokens", "64", "--heal-batch", "2", "--heal-data", "stdlib")
EDITS = {
    "removed": ("--method", "shortgpt", "--heal", "none"),
    "merged": ("--method", "come", "--heal", "none"),
    "averaged": ("--method", "average", "--heal", "none"),
    "sublayers": ("--method", "blockpruner", "--no-packed", "--heal", "none"),
    "packed": ("--method", "shifted", "--heal", "none"),
    "linear": ("--replacement", "linear", "--heal", "none"),
    "layer": ("--replacement", "layer", *_TRAINED),
    "mlp": ("--replacement", "mlp", *_TRAINED),
    "healed": ("--method", "shortgpt", "--heal", "lm", *_TRAINED),
    "lora": ("--method", "shortgpt", "--heal", "lm", "--lora", *_TRAINED),
}
_COMMON = ("--remove", "2", "--calibration", "stdlib", "--samples", "2", "--length", "16")


# Fast are an edit of each shape with one quantizer, and one edit with every quantizer.
SHAPES = {"removed", "merged", "sublayers", "packed", "linear", "layer", "lora"}
COMBINATIONS = [
    pytest.param(
        edit,
        quantizer,
        marks=() if edit == "merged" or (quantizer == "bnb-nf4" and edit in SHAPES) else pytest.mark.slow,
    )
    for edit in EDITS
    for quantizer in QUANTIZERS
]


@pytest.mark.parametrize(("edit", "quantizer"), COMBINATIONS)
def test_an_edited_model_is_quantized_as_any(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, edit: str, quantizer: str
) -> None:
    wide_model(vocab_size=4096).save_pretrained(source := tmp_path / "float")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(source)
    for name, flags in (("edited", ()), ("together", ("--quantize", quantizer, "--quantize-exclude", "0"))):
        words = ("prune", "-m", source, tmp_path / name, *EDITS[edit], *_COMMON, *flags)
        done = optimum_cli(monkeypatch, capsys, "streamline", *words)
        assert (done.code, done.err) == (0, "")
    quantize(ModelSource(str(tmp_path / "edited")), tmp_path / "after", quantizer, ["0"], notify=lambda _: None)
    together, after, edited = (load(str(tmp_path / name)) for name in ("together", "after", "edited"))
    assert quantized_modules(together) == quantized_modules(after)
    assert not [name for name in quantized_modules(together) if ".layers.0." in name]
    expected = logits(edited)
    assert torch.equal(found := logits(together), logits(after))
    assert 0 < (found - expected).abs().max() < 0.5 * expected.abs().max()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "together").eval()
    enable_cpu_kernel(together)
    torch.testing.assert_close(logits(stock), logits(together), rtol=0, atol=1e-4 * expected.abs().max().item())


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(token_ids()).logits.float()
    return found
