"""Losses by slices of the vocabulary are those of whole logits, and where weights are on disk the same to the bit."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from cases import make
from optimum.streamline.checkpoints.loading import load_on_disk, load_stock
from optimum.streamline.editing.merging import average_layers
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, decoder_layers
from optimum.streamline.models.removed_sublayers import whole_layer
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP
from optimum.streamline.scoring import ablation, loss
from optimum.streamline.scoring.ablation import removal_window_losses
from optimum.streamline.scoring.loss import stream_gradient, window_losses
from optimum.streamline.scoring.merge_search import candidate_losses
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, every, tiny_model, token_ids

IDS = token_ids(3, 12)
WINDOWS = Windows(IDS, "random")
# Mixed kinds of layers and capped logits, other names and a head without offset, experts that transformers converts.
FAST = {"gemma2", "gpt2", "llama", "mixtral"}
ARCHITECTURE_NAMES = [
    pytest.param(each, marks=() if each in FAST else pytest.mark.slow) for each in sorted(ARCHITECTURES)
]
CANDIDATES = [
    whole_layer(0),
    frozenset({(1, ATTENTION)}),
    frozenset({(2, MLP)}),
    frozenset({(3, MLP), (4, ATTENTION)}),
    whole_layer(LAYERS - 1),
]


@pytest.fixture(params=["whole", "cut"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses by one slice of the vocabulary and all windows, or by uneven slices and one window at a time."""
    if request.param == "cut":
        monkeypatch.setattr(loss, "VOCABULARY_SLICE", 23)
        monkeypatch.setattr(loss, "LOGITS", 1)
        monkeypatch.setattr(ablation, "STREAMS", 1)


def of_whole_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    log_p = model(ids).logits[:, :-1].double().log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0].sum(1)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("architecture", every())
def test_losses_are_those_of_whole_logits(architecture: str) -> None:
    model = tiny_model(architecture)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(window_losses(model, IDS), of_whole_logits(model, IDS), rtol=1e-5, atol=0)
    assert model.get_output_embeddings().weight is head


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("architecture", every())
def test_the_gradient_of_the_last_state_is_that_of_whole_logits(architecture: str) -> None:
    model, seen = tiny_model(architecture).requires_grad_(False), list[torch.Tensor]()
    last = decoder_layers(model, architecture_of(model.config))[-1]

    def leave(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        seen.append(output.requires_grad_(True))
        return output

    with last.register_forward_hook(leave):
        of_whole_logits(model, IDS).sum().backward()
    [stream] = seen
    torch.testing.assert_close(stream_gradient(model, IDS, stream.detach()), stream.grad, rtol=1e-4, atol=1e-5)


def both(source: Path, scratch: Path) -> list[PreTrainedModel]:
    return [
        load_stock(ModelSource(str(source)), torch.float32),
        load_on_disk(ModelSource(str(source)), scratch),
    ]


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
def test_losses_on_disk_are_the_same_to_the_bit(architecture: str, tmp_path: Path) -> None:
    source = make(tmp_path / "in", architecture, torch.bfloat16, num_hidden_layers=LAYERS)
    models = both(source, tmp_path)
    removed = frozenset({(5, MLP), *whole_layer(6)})
    for of_removed in (frozenset(), removed):
        losses = [removal_window_losses(model, IDS, CANDIDATES, of_removed) for model in models]
        assert torch.equal(*losses)
        assert len(losses[0].unique()) == losses[0].numel()
    assert all(parameter.is_meta for parameter in models[1].parameters())


def noting_reads(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weight is read from disk, from now on."""
    read, weights = Counter[str](), type(model.get_input_embeddings()._hf_hook.weights_map.dataset)
    get = weights.__getitem__

    def noted(self: Any, name: str) -> Any:
        read[name] += 1
        return get(self, name)

    monkeypatch.setattr(weights, "__getitem__", noted)
    return read


def test_merges_side_by_side_read_each_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, model = both(make(tmp_path / "in", dtype=torch.bfloat16), tmp_path)
    read = noting_reads(model, monkeypatch)
    losses = [
        candidate_losses(each, 2, [partial(average_layers, each, 2, share) for share in (0.2, 0.5, 0.9)], WINDOWS)
        for each in (whole, model)
    ]
    assert losses[0] == losses[1]
    layers = decoder_layers(model, architecture_of(model.config))
    for number, layer in enumerate(layers):
        for name, _ in layer.named_parameters():
            # The pair is read to be merged only; the layers before it, and those after it, run once.
            assert read[f"model.layers.{number}.{name}"] == 1, (number, name)


def test_candidates_side_by_side_read_each_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = both(make(tmp_path / "in", dtype=torch.bfloat16), tmp_path)
    heads = Counter[tuple[int, ...]]()
    monkeypatch.setattr(loss, "VOCABULARY_SLICE", 23)
    head = model.get_output_embeddings()
    vocabulary = len(head.weight)
    forward = head._old_forward
    head._old_forward = lambda hidden: (heads.update([tuple(head.weight.shape)]), forward(hidden))[1]
    read = noting_reads(model, monkeypatch)
    removal_window_losses(model, IDS, CANDIDATES)
    layers = decoder_layers(model, architecture_of(model.config))
    of_layers = {f"model.layers.{name}" for name, _ in layers.named_parameters()}
    assert {name: count for name, count in read.items() if name in of_layers} == dict.fromkeys(of_layers, 1)
    assert not {name for name in read if "lm_head" in name or "embed" in name}
    slices = {(23, model.config.hidden_size): vocabulary // 23, (vocabulary % 23, model.config.hidden_size): 1}
    assert heads == {shape: count * len(CANDIDATES) for shape, count in slices.items() if shape[0]}
