"""Where a model is read from: a folder, or a repository of the Hub at a revision, brought to a folder on this machine.

Everything else reads that folder. Knows which files to fetch from `weight_files.py`, and nothing of what is in them.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.content_hashes import content_hash

from .hub import fetch_checkpoint
from .weight_files import checkpoint_files, is_adapter

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is read from, and with what leave.

    Args:
        model: A checkpoint's folder, or a Hub id, also as `name@revision`.
        cache_dir: Where Hub downloads are kept; transformers' own place by default.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: A branch, tag or commit of the Hub repository; its main branch by default.

    Raises:
        StreamlineError: two revisions are given, or one of a local folder.
    """

    model: str
    cache_dir: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.is_local and not _is_path(self.model):
            name, _, revision = self.model.partition("@")
            if revision and self.revision not in (None, revision):
                raise StreamlineError(f"revision {self.revision!r}: the model says {revision!r}; give one of them")
            object.__setattr__(self, "model", name)
            object.__setattr__(self, "revision", revision or self.revision)
        if not self.model:
            raise StreamlineError("model '': is empty; give a checkpoint's folder or a Hub id")
        if self.revision is not None and self.is_local:
            raise StreamlineError(
                f"revision {self.revision!r}: model {self.model!r} is a local folder, which has none; leave it out"
            )

    def options(self) -> dict[str, Any]:
        """The fields beside `model`, as keyword arguments."""
        return {
            "cache_dir": self.cache_dir,
            "trust_remote_code": self.trust_remote_code,
            "revision": self.revision,
        }

    def of(self, model: str) -> ModelSource:
        """Another model, read with the same leave; this one itself where it is the same."""
        return self if model == self.model else replace(self, model=model, revision=None)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine rather than a Hub id."""
        return os.path.exists(self.model)  # which, unlike Path's own, takes a name that is too long

    @property
    def name(self) -> str:
        """What a stranger may read: the Hub id, or the folder's own name without the path to it."""
        return Path(self.model).resolve().name if self.is_local else self.model

    @property
    def folder(self) -> Path:
        """The folder on this machine that holds a whole checkpoint: fetched from the Hub, or merged, where need be.

        Raises:
            StreamlineError: it is not there, cannot be fetched, or is an adapter that cannot be merged.
        """
        own = self.own_folder
        return _merged(own, self.cache_dir, self.trust_remote_code)[0] if is_adapter(own) else own

    @property
    def base(self) -> ModelSource | None:
        """The model that an adapter was merged into; none for a model that is no adapter."""
        own = self.own_folder
        return _merged(own, self.cache_dir, self.trust_remote_code)[1] if is_adapter(own) else None

    @property
    def own_folder(self) -> Path:
        """The folder on this machine with the files as they were given: of an adapter, without its base.

        Raises:
            StreamlineError: it is not there, or cannot be fetched.
        """
        if self.is_local:
            if Path(self.model).is_file():
                raise StreamlineError(f"model {self.model!r}: is a file; give the folder of a checkpoint, or a Hub id")
            return Path(self.model)
        if _is_path(self.model):
            raise StreamlineError(f"model {self.model!r}: no such folder; give a checkpoint's folder or a Hub id")
        return fetch_checkpoint(self.model, self.cache_dir, self.revision)

    @property
    def commit(self) -> str:
        """The commit of the Hub repository that its files are of; empty for a local folder."""
        if self.is_local:
            return ""
        commit = self.own_folder.name
        return commit if _COMMIT.fullmatch(commit) else ""

    def contents(self) -> Iterator[tuple[str, str]]:
        """Name and SHA-256, in hexadecimal, of each part of the model that decides what it computes."""
        for file in checkpoint_files(self.folder):
            yield file.name, content_hash(file)


def _is_path(name: str) -> bool:
    """Whether a name cannot be a Hub id, but only a path."""
    return name.startswith(("/", ".", "~")) or name.partition("@")[0].count("/") > 1


def fingerprint(source: ModelSource) -> str:
    """SHA-256 over a checkpoint's config and weights: two checkpoints with one fingerprint are one model."""
    digest = hashlib.sha256()
    for name, content in source.contents():
        digest.update(name.encode())
        digest.update(bytes.fromhex(content))
    return digest.hexdigest()


@cache  # one process merges an adapter once; what it merged goes when the process ends
def _merged(folder: Path, cache_dir: str | None, trust_remote_code: bool) -> tuple[Path, ModelSource]:
    from .adapters import merged_adapter

    into = Path(tempfile.mkdtemp(prefix="streamline-merged-"))
    atexit.register(shutil.rmtree, into, ignore_errors=True)
    name, revision = merged_adapter(folder, into, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    return into, ModelSource(name, cache_dir, trust_remote_code, revision)
