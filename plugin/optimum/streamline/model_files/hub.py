"""Download checkpoints from the Hugging Face Hub."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download

from optimum.streamline.errors import StreamlineError, first_line

from .weight_files import HUB_COMPANIONS, fetch_weights


@cache  # one process reads one commit, even if another is pushed to the repository meanwhile
def fetch_checkpoint(model: str, cache_dir: str | None, revision: str | None) -> Path:
    """Download the files of a Hub repository that a model is loaded from.

    Args:
        model: A Hub id.
        cache_dir: Cache folder for downloads; by default the one of transformers.
        revision: A branch, tag or commit; by default the main branch.

    Returns:
        The local folder with the files.

    Raises:
        StreamlineError: the files cannot be fetched.
    """

    def fetch(names: list[str], at: str | None) -> Path:
        return Path(snapshot_download(model, cache_dir=cache_dir, revision=at, allow_patterns=names))

    try:
        folder = fetch(list(HUB_COMPANIONS), revision)
        # The snapshot folder is named after the commit, so this call fetches from the same commit.
        fetch_weights(folder, lambda names: fetch(names, folder.name))
    except StreamlineError:
        raise
    except Exception as error:  # the Hub client raises exceptions of its own and of its HTTP library
        at = f" at revision {revision!r}" if revision else ""
        raise StreamlineError(
            f"model {model!r}{at}: cannot be fetched from the Hub ({first_line(error)}); give an existing Hub id "
            "and revision, or a checkpoint's folder"
        ) from None
    return folder
