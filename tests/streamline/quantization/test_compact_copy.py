"""A compact copy takes the memory that its form promises, and computes nearly what the model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum.streamline.checkpoints.loading import load_on_disk
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.quantization.compact_copy import compact_copy
from reference import REFERENCE
from tiny import every, tiny_model, token_ids

pytestmark = pytest.mark.quantizers
FORMS = ("bf16", "int8", "nf4")


@pytest.mark.parametrize("architecture", every())
def test_a_model_on_disk_gives_the_same_copy_as_one_in_memory(architecture: str, tmp_path: Path) -> None:
    model, ids = tiny_model(architecture).eval(), token_ids()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "scratch").mkdir()
    on_disk = load_on_disk(ModelSource(str(tmp_path / "model")), tmp_path / "scratch")
    for form in FORMS:
        copies = [compact_copy(each, form, "cpu") for each in (model, on_disk)]
        with torch.no_grad():
            ours, theirs = (each(ids, use_cache=False).logits for each in copies)
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs), form
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("form", "bytes_each", "error"), [("bf16", 2, 0.01), ("int8", 1, 0.05), ("nf4", 0.52, 0.25)])
def test_a_trained_model_takes_less_memory_and_computes_nearly_the_same(
    form: str, bytes_each: float, error: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    copied = compact_copy(model, form, "cpu")
    ids = token_ids(4, 64) % model.config.vocab_size
    with torch.no_grad():
        expected, found = (each(ids, use_cache=False).logits.float().log_softmax(-1) for each in (model, copied))
    divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean()
    assert 0 < float(divergence) < error
    matrices = [
        [each for each in decoder_layers(own, architecture_of(model.config)).parameters() if each.numel() > 1000]
        for own in (model, copied)
    ]
    taken = sum(each.numel() * each.element_size() for each in matrices[1])
    taken += sum(each.quant_state.absmax.nbytes for each in matrices[1] if hasattr(each, "quant_state"))
    assert taken == pytest.approx(bytes_each * sum(each.numel() for each in matrices[0]), rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_of_weights_on_disk_computes_on_a_gpu(form: str, tmp_path: Path) -> None:
    on_disk = load_on_disk(ModelSource(str(REFERENCE)), tmp_path)
    ids = token_ids(4, 64) % on_disk.config.vocab_size
    copied = compact_copy(on_disk, form, "cuda")
    assert {each.device.type for each in copied.parameters()} == {"cuda"}
    with torch.no_grad():
        expected = on_disk(ids, use_cache=False).logits.log_softmax(-1)
        found = copied(ids.cuda(), use_cache=False).logits.float().cpu().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean()
    assert 0 < float(divergence) < 0.25
