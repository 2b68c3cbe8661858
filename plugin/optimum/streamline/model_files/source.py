"""Name a model and get its files: a local folder, a Hub repository at a revision, or an adapter to merge.

All other code reads the local folder that `ModelSource.folder` returns.
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
from .weight_files import is_adapter, weight_and_config_files

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelSource:
    """A model's name, and the options to load it with.

    Args:
        model: A checkpoint's folder, a Hub id, or `id@revision`.
        cache_dir: Cache folder for Hub downloads; by default the one of transformers.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: A branch, tag or commit of the Hub repository; by default its main branch.

    Raises:
        StreamlineError: the name is empty, two revisions are given, or a local folder is given a revision.
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
        """The fields except `model`, as keyword arguments."""
        return {
            "cache_dir": self.cache_dir,
            "trust_remote_code": self.trust_remote_code,
            "revision": self.revision,
        }

    def with_model(self, model: str) -> ModelSource:
        """Name another model, with the same options.

        Args:
            model: The other model's folder or Hub id.

        Returns:
            Its source, without a revision; this source itself if `model` is the same name.
        """
        return self if model == self.model else replace(self, model=model, revision=None)

    @property
    def is_local(self) -> bool:
        """Whether the name is an existing path rather than a Hub id."""
        return os.path.exists(self.model)  # returns False for a name that is too long; Path.exists raises

    @property
    def name(self) -> str:
        """A name without private information: the Hub id, or the last part of a local path."""
        return Path(self.model).resolve().name if self.is_local else self.model

    @property
    def folder(self) -> Path:
        """The local folder with the complete checkpoint: downloaded from the Hub, or merged from an adapter, if needed.

        Raises:
            StreamlineError: the model does not exist, cannot be fetched, or is an adapter that cannot be merged.
        """
        own = self.own_folder
        return _merged(own, self.cache_dir, self.trust_remote_code)[0] if is_adapter(own) else own

    @property
    def base(self) -> ModelSource | None:
        """The model that an adapter was merged into; `None` if this model is not an adapter."""
        own = self.own_folder
        return _merged(own, self.cache_dir, self.trust_remote_code)[1] if is_adapter(own) else None

    @property
    def own_folder(self) -> Path:
        """The local folder with the files as they were given: an adapter is not merged.

        Raises:
            StreamlineError: the model does not exist or cannot be fetched.
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
        """The commit of the Hub repository that the files come from; empty for a local folder."""
        if self.is_local:
            return ""
        commit = self.own_folder.name
        return commit if _COMMIT.fullmatch(commit) else ""

    def contents(self) -> Iterator[tuple[str, str]]:
        """Name and SHA-256, in hexadecimal, of each part of the model that decides what it computes."""
        for file in weight_and_config_files(self.folder):
            yield file.name, content_hash(file)


def _is_path(name: str) -> bool:
    """Whether a name cannot be a Hub id, only a path."""
    return name.startswith(("/", ".", "~")) or name.partition("@")[0].count("/") > 1


def fingerprint(source: ModelSource) -> str:
    """SHA-256 over the names and contents of a checkpoint's config and weight files.

    Two checkpoints with the same fingerprint are the same model.
    """
    digest = hashlib.sha256()
    for name, content in source.contents():
        digest.update(name.encode())
        digest.update(bytes.fromhex(content))
    return digest.hexdigest()


@cache  # a process merges each adapter once, and deletes the merged checkpoint when it exits
def _merged(folder: Path, cache_dir: str | None, trust_remote_code: bool) -> tuple[Path, ModelSource]:
    """Merge an adapter; returns the folder of the merged checkpoint, and the base."""
    from .adapters import merged_adapter

    into = Path(tempfile.mkdtemp(prefix="streamline-merged-"))
    atexit.register(shutil.rmtree, into, ignore_errors=True)
    name, revision = merged_adapter(folder, into, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    return into, ModelSource(name, cache_dir, trust_remote_code, revision)
