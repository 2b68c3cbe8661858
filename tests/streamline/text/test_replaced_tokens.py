"""Versions of a text with other tokens: how many are replaced, by what, and that the same call gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optimum.streamline.errors import StreamlineError
from optimum.streamline.text import replaced_tokens
from optimum.streamline.text.replaced_tokens import versions_of
from tiny import VOCABULARY, tiny_model, token_ids

IDS = token_ids(10, 40)


def sure_model() -> Any:
    """A model that is sure of the next token: the last token plus 1, whatever came before."""

    class Sure:
        def __init__(self) -> None:
            self.device, self.config, self.runs = torch.device("cpu"), tiny_model().config, list[int]()

        def __call__(self, ids: torch.Tensor, **_: Any) -> Any:
            self.runs.append(len(ids))
            logits = torch.full((*ids.shape, VOCABULARY), -50.0)
            return type("Output", (), {"logits": logits.scatter(-1, ((ids + 1) % VOCABULARY)[..., None], 50.0)})

    return Sure()


def test_tokens_are_replaced_by_what_the_model_expects_after_the_given_ones() -> None:
    model = sure_model()
    versions = versions_of(model, IDS, 3, 0.3, seed=0)
    assert versions.shape == (3, 10, 40)
    assert sum(model.runs) == 10
    expected = ((IDS[:, :-1] + 1) % VOCABULARY).expand(3, -1, -1)
    replaced = versions[:, :, 1:] != IDS[:, 1:]
    assert torch.equal(versions[:, :, 1:][replaced], expected[replaced])
    assert torch.equal(versions[:, :, 0], IDS[:, 0].expand(3, -1))
    for version in replaced:  # 390 tokens each
        assert version.double().mean().item() == pytest.approx(0.3, abs=0.08)
    assert not torch.equal(replaced[0], replaced[1])
    assert torch.equal(versions_of(model, IDS, 2, 0.0, seed=0), IDS.expand(2, -1, -1))
    assert torch.equal(versions_of(model, IDS, 3, 1.0, seed=0)[:, :, 1:], expected)


def test_tokens_are_drawn_by_their_probability() -> None:
    model, ids = tiny_model(), token_ids(1, 6)
    with torch.no_grad():
        wanted = model(ids).logits[0, :-1].softmax(-1)
    drawn = versions_of(model, ids, 4000, 1.0, seed=1)[:, 0, 1:]
    for place, probabilities in enumerate(wanted):
        counts = torch.bincount(drawn[:, place], minlength=VOCABULARY) / 4000
        assert float((counts - probabilities).abs().sum()) < 0.25
        assert float((counts - probabilities.roll(1)).abs().sum()) > 0.25


def test_one_seed_gives_the_same_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sure_model()
    versions = versions_of(model, IDS, 2, 0.5, seed=2**63 - 1)
    monkeypatch.setattr("optimum.streamline.text.windows.LOGITS", 1)
    model.runs.clear()
    assert torch.equal(versions_of(model, IDS, 2, 0.5, seed=2**63 - 1), versions)
    assert model.runs == [1] * 10
    assert not torch.equal(versions_of(model, IDS, 2, 0.5, seed=3), versions)


def test_logits_that_are_not_finite_are_one_line() -> None:
    model = tiny_model()
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(StreamlineError, match="^model: its logits are not finite on the healing text; check"):
        versions_of(model, IDS, 1, 0.5, seed=0)


def test_every_process_gets_the_versions_of_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = list[torch.Tensor]()
    monkeypatch.setattr(replaced_tokens, "from_main", lambda value: sent.append(value) or value)
    main = versions_of(sure_model(), IDS, 2, 0.5, seed=0)
    received, other = iter(sent), sure_model()
    monkeypatch.setattr(replaced_tokens, "is_main", lambda: False)
    monkeypatch.setattr(replaced_tokens, "from_main", lambda _: next(received))
    assert torch.equal(versions_of(other, IDS, 2, 0.5, seed=0), main)
    assert other.runs == []


def test_a_file_keeps_them(tmp_path: Path) -> None:
    file = tmp_path / "not" / "there" / "versions.safetensors"
    versions = versions_of(sure_model(), IDS, 2, 0.5, 0, file)
    model = sure_model()
    assert torch.equal(versions_of(model, IDS, 2, 0.5, 0, file), versions)
    assert model.runs == []
    assert [each.name for each in file.parent.iterdir()] == [file.name]
