"""Hidden states that are carried from layer to layer in files are the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from optimum.streamline.editing import residual_stream
from optimum.streamline.editing.state_files import carry, write_embeddings
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.text.window_file import WindowFile
from tiny import LAYERS, every, tiny_model, token_ids

IDS = token_ids(20, 16)  # more windows than are computed at once


@pytest.mark.parametrize("architecture", every())
def test_the_states_at_each_depth_are_the_models(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    width = model.config.hidden_size
    states = WindowFile(tmp_path / "states.npy", IDS, width)
    write_embeddings(model, states)
    assert torch.equal(states.read(IDS[3:5]), residual_stream.embeddings(model, IDS[3:5]))
    for depth in range(LAYERS):
        carry(model, states, states, range(depth, depth + 1))
        with torch.no_grad():
            expected = residual_stream.stream_after(model, IDS, depth)
        torch.testing.assert_close(states.read(IDS), expected, rtol=1e-5, atol=1e-5)
    assert states.read(IDS[[7, 0]]).shape == (2, 16, width)


def test_a_window_that_comes_twice_goes_through_each_layer_once(tmp_path: Path) -> None:
    model, ids = tiny_model(), IDS.clone()
    ids[17] = ids[0]  # in another batch
    states = WindowFile(tmp_path / "states.npy", ids, model.config.hidden_size)
    write_embeddings(model, states)
    carry(model, states, states, range(3))
    with torch.no_grad():
        expected = residual_stream.stream_after(model, ids, 2)
    torch.testing.assert_close(states.read(ids), expected, rtol=1e-5, atol=1e-5)


def test_several_layers_go_from_one_file_to_another_and_each_runs_on_all_windows_before_the_next(
    tmp_path: Path,
) -> None:
    model, order = tiny_model(), list[int]()
    source, target = (WindowFile(tmp_path / name, IDS, model.config.hidden_size) for name in ("one.npy", "two.npy"))
    write_embeddings(model, source)
    before = source.read(IDS)

    def note(number: int) -> None:
        order.append(number)

    for number, layer in enumerate(decoder_layers(model, architecture_of(model.config))):
        layer.register_forward_pre_hook(lambda _, args, number=number: note(number))
    carry(model, source, target, range(1, 3))
    assert torch.equal(source.read(IDS), before)
    assert set(order) == {1, 2}
    assert order == sorted(order)
    with torch.no_grad():
        expected = run(model, before, [1, 2])
    torch.testing.assert_close(target.read(IDS), expected, rtol=1e-5, atol=1e-5)


def run(model: nn.Module, hidden: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """The output of layers of a Llama, called by hand."""
    positions = torch.arange(hidden.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    mask = torch.full((hidden.shape[1], hidden.shape[1]), -torch.inf).triu(1)[None, None]
    for layer in layers:
        hidden = model.model.layers[layer](hidden, attention_mask=mask, position_embeddings=rotary)
    return hidden
