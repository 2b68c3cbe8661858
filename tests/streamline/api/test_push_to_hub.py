"""Which files `push_to_hub` uploads where; a fake stands for the Hub."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

from optimum.streamline import StreamlineConfig, StreamlineError, Streamliner
from reference import REFERENCE


class FakeHub:
    """What `HfApi` was asked for."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.token: str | None = None
        self.created: dict[str, Any] = {}
        self.uploaded: dict[str, Any] = {}
        self.files: set[str] = set()

    def __call__(self, token: str | None = None) -> FakeHub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, **how: Any) -> SimpleNamespace:
        if self.refuses:
            raise OSError("403 Forbidden\nmore")
        self.created = {"repo_id": repo_id, **how}
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **how: Any) -> SimpleNamespace:
        names = {file.name for file in folder_path.iterdir()}
        self.files = {name for name in names if any(fnmatch(name, each) for each in allow_patterns)}
        self.uploaded = {"folder": folder_path, **how}
        return SimpleNamespace(commit_url="the commit")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


@pytest.fixture
def pruned() -> Streamliner:
    return Streamliner.from_pretrained(REFERENCE).prune(StreamlineConfig(layers="5-8"))


def test_a_checkpoint_with_record_and_card_goes_up_and_no_log(hub: FakeHub, pruned: Streamliner) -> None:
    url = pruned.push_to_hub("me/small", private=True, token="secret", revision="dev", commit_message="First")
    assert url == "the commit"
    assert hub.token == "secret"
    assert hub.created == {"repo_id": "me/small", "private": True, "exist_ok": True}
    assert hub.files == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "streamline.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    folder = hub.uploaded.pop("folder")
    assert hub.uploaded == {"repo_id": "me/small", "revision": "dev", "commit_message": "First"}
    assert not folder.exists()


def test_what_was_saved_goes_up_unless_it_was_edited_since(hub: FakeHub, pruned: Streamliner, tmp_path: Path) -> None:
    out = pruned.save_pretrained(tmp_path / "out")
    pruned.push_to_hub("me/small")
    assert hub.uploaded["folder"] == out
    (out / "secrets.txt").write_text("a file of the user's own")
    pruned.push_to_hub("me/small")
    assert hub.uploaded["folder"] == out
    assert "secrets.txt" not in hub.files
    assert "model.safetensors" in hub.files
    (out / "config.json").write_text("{}")
    pruned.push_to_hub("me/small")
    assert hub.uploaded["folder"] != out


@pytest.mark.parametrize("how", ["in place", "by its data", "in its config"])
def test_a_model_edited_by_hand_is_saved_anew(hub: FakeHub, pruned: Streamliner, tmp_path: Path, how: str) -> None:
    out = pruned.save_pretrained(tmp_path / "out")
    weight = pruned.model.model.layers[0].mlp.up_proj.weight
    if how == "in place":
        with torch.no_grad():
            weight[0, 0] += 1
    elif how == "by its data":
        weight.data[0, 0] += 1
    else:
        pruned.model.config.initializer_range = 0.5
    pruned.push_to_hub("me/small")
    assert hub.uploaded["folder"] != out


def test_a_refusal_is_one_line(hub: FakeHub, pruned: Streamliner) -> None:
    hub.refuses = True
    with pytest.raises(StreamlineError, match=r"^repo_id 'me/small': cannot be uploaded to \(403 Forbidden\)$"):
        pruned.push_to_hub("me/small")
    assert hub.uploaded == {}
