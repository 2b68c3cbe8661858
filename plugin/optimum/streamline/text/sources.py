"""Open the text that a SPEC names.

A SPEC is one of:

- a text file, a table as `FILE[,COLUMN]`, or a folder of these; - `hub:DATASET[@REVISION][,CONFIG[,SPLIT[,COLUMN]]]`, a
data set on the Hugging Face Hub; - `stdlib[:train|calibration|eval]`, a part of the Python standard library's source
code.

`self[:FILE[,COLUMN]]` names text that the original samples (`prompts.py`), which no source holds.

There is no fallback: if a source cannot be read, an error names the SPEC and the alternatives.
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

from .files import PLAIN, TABLES, file_suffix, read_files, table_documents, table_errors

SELF = "self"
"""The SPEC of healing text that the original samples."""
STDLIB_PARTS = ("train", "calibration", "eval")
ALTERNATIVES = (
    "a text file, a table (FILE[,COLUMN]), a folder of these, hub:DATASET[@REVISION][,CONFIG[,SPLIT[,COLUMN]]], "
    "or stdlib[:train|calibration|eval]"
)

# Folders that not every installation has, or that hold tables and machine settings rather than ordinary source code.
_NOT_STDLIB_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Text:
    """Documents, and their source.

    Args:
        spec: The SPEC.
        documents: The documents. They are read while iterating, and only once.
        endless: Whether the text may be too large to read completely, as a data set on the Hub may be.
        commit: For a data set on the Hub, the commit that is read; empty if it is unknown.
    """

    spec: str
    documents: Iterable[str]
    endless: bool = False
    commit: str = ""


def stdlib_part(module_path: str) -> str:
    """The part that a file of the standard library belongs to: `train`, `calibration` or `eval`.

    The part depends only on a hash of the path, so it is the same on every Python version and machine.

    Args:
        module_path: POSIX path relative to the library's folder, such as `asyncio/events.py`.

    >>> stdlib_part("asyncio/events.py")
    'train'
    """
    bucket = hashlib.sha256(module_path.encode()).digest()[0] % 10
    return {0: "calibration", 1: "eval"}.get(bucket, "train")


def open_text(spec: str, seed: int = 0) -> Text:
    """Open the text that a SPEC names. Files are ordered by path; rows stay in order.

    Args:
        spec: The SPEC.
        seed: The seed for the order in which the parts of a Hub data set are read. Large data sets are not read to the
            end.

    Returns:
        The text. Iterating its documents may raise a StreamlineError too.

    Raises:
        StreamlineError: the SPEC names nothing that can be read.
    """
    if not spec.partition(",")[0].strip():
        raise StreamlineError(
            f"text SPEC {spec!r}: names no text, perhaps because a variable is not set; give {ALTERNATIVES}"
        )
    if is_self(spec):
        raise StreamlineError(
            f"text SPEC {spec!r}: text that the original samples is for heal-data alone; give {ALTERNATIVES}, or "
            f"./{spec} for a file of that name"
        )
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


def is_self(spec: str) -> bool:
    """Whether a SPEC stands for text that the original samples: `self` or `self:FILE[,COLUMN]`."""
    return spec == SELF or spec.startswith(f"{SELF}:")


def local_path(spec: str) -> tuple[Path, str]:
    """The path that a SPEC names if it is a local file or folder, and its column.

    Returns:
        Path and column. The column is empty if the SPEC names none.
    """
    path = Path(os.path.expanduser(spec))  # keeps a `~user` that does not exist; Path.expanduser raises
    if "," not in spec or os.path.exists(path):  # returns False for a name that is too long; Path.exists raises
        return path, ""
    name, _, column = spec.rpartition(",")
    return Path(os.path.expanduser(name)), column.strip()


def _files_below(spec: str, folder: Path) -> list[Path]:
    """The files in a folder that can be read as text, ordered by path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    kinds = [(file, kind) for file in files if (kind := file_suffix(file))]
    # In a folder with other text files, a JSON file is more likely a settings file than text.
    chosen = [file for file, kind in kinds if kind != ".json"] or [file for file, _ in kinds]
    if not chosen:
        raise StreamlineError(
            f"text SPEC {spec!r}: the folder holds no {', '.join(sorted((*PLAIN, *TABLES)))} file; "
            f"{len(files)} other files were ignored"
        )
    return chosen


def _stdlib_files(part: str) -> list[Path]:
    """The source files of one part of the standard library, ordered by path."""
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
    """Open a data set on the Hub."""
    fields = [field.strip() for field in spec.removeprefix("hub:").split(",")]
    if len(fields) > 4:
        raise StreamlineError(f"text SPEC {spec!r}: at most DATASET, CONFIG, SPLIT and COLUMN; give {ALTERNATIVES}")
    name, config, split, column = (fields + [""] * 4)[:4]
    name, _, revision = name.partition("@")
    if not name:
        raise StreamlineError(f"text SPEC {spec!r}: names no data set; give {ALTERNATIVES}")
    with table_errors(f"text SPEC {spec!r}", f"; give {ALTERNATIVES}"):
        # Get the commit first. This is one request, while `datasets` retries for a long time if there is no network.
        commit = _commit(name, revision)
    return Text(spec, _hub_texts(spec, (name, config, split), commit or revision, column, seed), True, commit)


def _hub_texts(spec: str, dataset: tuple[str, str, str], revision: str, column: str, seed: int) -> Iterator[str]:
    """Read the documents of a Hub data set, its parts in random order."""
    name, config, split = dataset
    with table_errors(f"text SPEC {spec!r}", f"; give {ALTERNATIVES}"):
        from datasets import load_dataset

        rows = load_dataset(name, config or None, split=split or "train", streaming=True, revision=revision or None)
        if hasattr(rows, "reshard"):  # newer versions of `datasets` can make each row group of a Parquet file a part
            rows = rows.reshard()
        # Shuffle the parts and not the rows: neighbouring rows may be lines of one text.
        parts = rows.num_shards
        order = random.Random(seed).sample(range(parts), parts)
        yield from table_documents(f"text SPEC {spec!r}", (rows.shard(parts, number) for number in order), column)


def _commit(name: str, revision: str) -> str:
    """The commit of a Hub data set at a revision; empty if the Hub cannot be asked."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    if Path(name).is_dir():  # `datasets` reads a local folder in the same way
        return ""
    try:
        info = HfApi().dataset_info(name, revision=revision or None, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OfflineModeIsEnabled:  # `datasets` may still have it in its cache
        return ""
    except RepositoryNotFoundError:
        raise StreamlineError(
            f"text SPEC 'hub:{name}': the Hub has no such data set, or you have no access to it"
        ) from None
    except RevisionNotFoundError:
        raise StreamlineError(f"text SPEC 'hub:{name}@{revision}': the data set has no such revision") from None
    return info.sha or ""
