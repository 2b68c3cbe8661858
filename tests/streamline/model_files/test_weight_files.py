"""The weight files of a checkpoint are those that transformers loads, on disk and on the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cases import make
from optimum.streamline.checkpoints.loading import load_stock, stored_dtype
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.theoretical_cost import disk_bytes
from optimum.streamline.model_files import hub as hub_file
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.model_files.weight_files import find_weights, weight_and_config_files
from tiny import tiny_model

COMMIT = "ab" * 20


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_only_files_that_the_index_names_are_the_checkpoint(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    size, before = disk_bytes(sharded), fingerprint(ModelSource(str(sharded)))
    assert size == sum(shard.stat().st_size for shard in shards)
    assert [file.name for file in weight_and_config_files(sharded)] == [
        "config.json", "model.safetensors.index.json", *(shard.name for shard in shards),
    ]  # fmt: skip
    for stray in ("consolidated.safetensors", "model-old.safetensors", "pytorch_model.bin"):
        shutil.copy(shards[0], sharded / stray)
    assert disk_bytes(sharded) == size
    assert fingerprint(ModelSource(str(sharded))) == before


def test_weights_of_equal_size_are_another_model(sharded: Path) -> None:
    before = fingerprint(ModelSource(str(sharded)))
    shard = max(sharded.glob("model-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    assert fingerprint(ModelSource(str(sharded))) != before


def test_a_single_file_goes_before_an_index_as_in_transformers(sharded: Path) -> None:
    shutil.copy(min(sharded.glob("model-*.safetensors")), sharded / "model.safetensors")
    assert find_weights(sharded).files == (sharded / "model.safetensors",)


def test_weights_in_bin_files_are_read_as_tensors_alone(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", dtype=torch.bfloat16)
    safe = load_stock(ModelSource(str(folder)), torch.float32).state_dict()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert find_weights(folder).pickled
    assert stored_dtype(ModelSource(str(folder))) == "bf16"
    for name, value in load_stock(ModelSource(str(folder)), torch.float32).state_dict().items():
        assert torch.equal(value, safe[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_stored_type_is_that_of_the_tensors_whatever_the_config_says(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", dtype=dtype)
    fields = json.loads((folder / "config.json").read_text())
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for said in ("float32", None):
        (folder / "config.json").write_text(json.dumps({**fields, "dtype": said}))
        assert stored_dtype(ModelSource(str(folder))) == names[dtype]


class Hub:
    """A fake of the Hub client: it copies the requested files into a snapshot folder named after the commit."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.folder = repository, cache / "snapshots" / COMMIT
        self.asked: list[str | None] = []

    def snapshot_download(
        self, model: str, *, cache_dir: str | None, revision: str | None, allow_patterns: list[str]
    ) -> str:
        self.asked.append(revision)
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.repository.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, self.folder)
        return str(self.folder)


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub(sharded, tmp_path / "cache")
    monkeypatch.setattr(hub_file, "snapshot_download", found.snapshot_download)
    hub_file.fetch_checkpoint.cache_clear()
    yield found
    hub_file.fetch_checkpoint.cache_clear()


def test_of_the_hub_only_the_files_of_the_model_are_fetched_all_of_one_commit(hub: Hub) -> None:
    for stray in ("consolidated.safetensors", "pytorch_model.bin", "original.pth", "model.gguf"):
        (hub.repository / stray).write_bytes(b"0" * 10)
    source = ModelSource("org/small@v1.0")
    assert (source.model, source.revision) == ("org/small", "v1.0")
    assert {file.name for file in source.folder.iterdir()} == {
        file.name for file in hub.repository.iterdir() if file.suffix == ".json" or file.name.startswith("model-")
    }
    assert hub.asked == ["v1.0", COMMIT]  # all files come from one commit, even if another is pushed in between
    assert source.commit == COMMIT
    assert fingerprint(source) == fingerprint(ModelSource(str(hub.repository)))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_single_file_is_fetched_too(name: str, hub: Hub) -> None:
    for file in hub.repository.glob("model*"):
        file.unlink()
    (hub.repository / name).write_bytes(b"0" * 2048)
    assert [file.name for file in find_weights(ModelSource("org/small").folder).files] == [name]


def test_two_revisions_or_one_of_a_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StreamlineError, match="revision 'v2': the model says 'v1'; give one of them"):
        ModelSource("org/small@v1", revision="v2")
    with pytest.raises(StreamlineError, match="is a local folder, which has none; leave it out"):
        ModelSource(str(tmp_path), revision="v2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    with pytest.raises(StreamlineError, match="'small' is a local folder, which has none"):
        ModelSource("small@v1")
    for nothing in ("", "@v1"):
        with pytest.raises(StreamlineError, match="model '': is empty"):
            ModelSource(nothing)
    assert ModelSource(str(tmp_path / "me@home" / "model")).model.endswith("me@home/model")
    assert not ModelSource("x" * 300).is_local
    (tmp_path / "a@b").mkdir()
    assert ModelSource(str(tmp_path / "a@b")).model == str(tmp_path / "a@b")
