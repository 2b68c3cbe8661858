"""Where text comes from: a SPEC names it, `open_text` finds it.

A SPEC is a text file, a table (`FILE[,COLUMN]`), a folder of these,
`hub:DATASET[@REVISION][,CONFIG[,SPLIT[,COLUMN]]]`, or `stdlib[:train|calibration|eval]`. This file knows nothing of
tokens; see `windows.py`. Nothing falls back in silence: a source that cannot be read is an error that names the SPEC
and the alternatives.
"""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from optimum.streamline.errors import StreamlineError

from .files import PLAIN, TABLES, kind_of, read_files, table_errors, texts_of

STDLIB_PARTS = ("train", "calibration", "eval")
ALTERNATIVES = (
    "a text file, a table (FILE[,COLUMN]), a folder of these, hub:DATASET[@REVISION][,CONFIG[,SPLIT[,COLUMN]]], "
    "or stdlib[:train|calibration|eval]"
)

# Not in every installation, or tables and machine settings rather than a programmer's text.
_NOT_STDLIB_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Text:
    """Documents, and where they come from.

    Args:
        spec: The SPEC.
        documents: They are read as they are asked for, once.
        endless: Whether there may be far more of them than anybody wants to read.
        commit: Of a data set on the Hub, the commit that is read; empty where the Hub does not say.
    """

    spec: str
    documents: Iterable[str]
    endless: bool = False
    commit: str = ""


def stdlib_part(module_path: str) -> str:
    """The part a standard-library file belongs to, from nothing but its path.

    Args:
        module_path: POSIX path below the library's folder, such as `asyncio/events.py`. The rule is a
            hash of it, so a file keeps its part on every Python version and machine.

    >>> stdlib_part("asyncio/events.py")
    'train'
    """
    bucket = hashlib.sha256(module_path.encode()).digest()[0] % 10
    return {0: "calibration", 1: "eval"}.get(bucket, "train")


def open_text(spec: str, seed: int = 0) -> Text:
    """The documents of `spec` in their own order: files by their paths, rows as they stand.

    Args:
        seed: Of the order in which the parts of a data set on the Hub are read, which is seldom read whole.

    Raises:
        StreamlineError: the SPEC names nothing that can be read; what is found wrong later is raised by `documents`.
    """
    if not spec.partition(",")[0].strip():
        raise StreamlineError(f"text SPEC {spec!r}: names no text, as where a variable is not set; give {ALTERNATIVES}")
    if spec.startswith("stdlib:"):
        return Text(spec, read_files(_stdlib_files(spec.removeprefix("stdlib:"))))
    if spec.startswith("hub:"):
        return _open_hub(spec, seed)
    try:
        path, column = local_path(spec)
        if path.is_file():
            return Text(spec, read_files([path], column))
        if path.is_dir():
            return Text(spec, read_files(_files_below(spec, path), column))
    except OSError as error:
        raise StreamlineError(f"text SPEC {spec!r}: {error}; give {ALTERNATIVES}") from None
    raise StreamlineError(f"text SPEC {spec!r}: no such file or folder; give {ALTERNATIVES}")


def local_path(spec: str) -> tuple[Path, str]:
    """The path that a SPEC would name on this machine, and the column it asks for there, if any."""
    path = Path(os.path.expanduser(spec))  # which, unlike Path's own, leaves a name that nobody has
    if "," not in spec or os.path.exists(path):  # which, unlike Path's own, takes a name that is too long
        return path, ""
    name, _, column = spec.rpartition(",")
    return Path(os.path.expanduser(name)), column.strip()


def _files_below(spec: str, folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    kinds = [(file, kind) for file in files if (kind := kind_of(file))]
    # Beside other files, JSON is settings more often than text.
    chosen = [file for file, kind in kinds if kind != ".json"] or [file for file, _ in kinds]
    if not chosen:
        raise StreamlineError(
            f"text SPEC {spec!r}: the folder holds no {', '.join(sorted((*PLAIN, *TABLES)))} file; "
            f"{len(files)} others were passed over"
        )
    return chosen


def _stdlib_files(part: str) -> list[Path]:
    if part not in STDLIB_PARTS:
        raise StreamlineError(f"text SPEC 'stdlib:{part}': the part must be one of {', '.join(STDLIB_PARTS)}")
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_STDLIB_TEXT and not name.startswith("config-")]
        paths = [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
        files += [path for path in paths if stdlib_part(path.relative_to(root).as_posix()) == part]
    if not files:
        raise StreamlineError(f"text SPEC 'stdlib:{part}': this Python has no library source under {root}")
    return sorted(files)


def _open_hub(spec: str, seed: int) -> Text:
    fields = [field.strip() for field in spec.removeprefix("hub:").split(",")]
    if len(fields) > 4:
        raise StreamlineError(f"text SPEC {spec!r}: at most DATASET, CONFIG, SPLIT and COLUMN; give {ALTERNATIVES}")
    name, config, split, column = (fields + [""] * 4)[:4]
    name, _, revision = name.partition("@")
    if not name:
        raise StreamlineError(f"text SPEC {spec!r}: names no data set; give {ALTERNATIVES}")
    with table_errors(f"text SPEC {spec!r}", f"; give {ALTERNATIVES}"):
        # Asked first: it is one request, while `datasets` tries for long where there is no network.
        commit = _commit(name, revision)
    return Text(spec, _hub_texts(spec, (name, config, split), commit or revision, column, seed), True, commit)


def _hub_texts(spec: str, dataset: tuple[str, str, str], revision: str, column: str, seed: int) -> Iterator[str]:
    name, config, split = dataset
    with table_errors(f"text SPEC {spec!r}", f"; give {ALTERNATIVES}"):
        from datasets import load_dataset

        rows = load_dataset(name, config or None, split=split or "train", streaming=True, revision=revision or None)
        if hasattr(rows, "reshard"):  # of newer versions: the parts of a Parquet file become parts of the data set
            rows = rows.reshard()
        # Neighbouring rows stay together, for they may be lines of one text: only the order of the parts is the seed's.
        parts = rows.num_shards
        order = random.Random(seed).sample(range(parts), parts)
        yield from texts_of(f"text SPEC {spec!r}", (rows.shard(parts, number) for number in order), column)


def _commit(name: str, revision: str) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    if Path(name).is_dir():  # which `datasets` reads as it does one of the Hub
        return ""
    try:
        found = HfApi().dataset_info(name, revision=revision or None, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OfflineModeIsEnabled:  # what was fetched before can be read
        return ""
    except RepositoryNotFoundError:
        raise StreamlineError(f"text SPEC 'hub:{name}': the Hub has no such data set, or none for you to see") from None
    except RevisionNotFoundError:
        raise StreamlineError(f"text SPEC 'hub:{name}@{revision}': the data set has no such revision") from None
    return found.sha or ""
