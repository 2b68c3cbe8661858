"""Fetching checkpoints from the Hugging Face Hub."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download

from optimum.streamline.errors import StreamlineError, first_line

from .weight_files import HUB_COMPANIONS, fetch_weights


@cache  # one process reads one commit, whatever is pushed to the repository meanwhile
def fetch_checkpoint(model: str, cache_dir: str | None, revision: str | None) -> Path:
    """The folder on this machine that holds the files of a Hub repository that a model is read from.

    Args:
        model: A Hub id.
        cache_dir: Where downloads are kept; by default where transformers keeps them.
        revision: A branch, tag or commit; by default the main branch.

    Raises:
        StreamlineError: it cannot be fetched.
    """

    def fetch(names: list[str], at: str | None) -> Path:
        return Path(snapshot_download(model, cache_dir=cache_dir, revision=at, allow_patterns=names))

    try:
        folder = fetch(list(HUB_COMPANIONS), revision)
        # The folder is named after the commit: what is fetched next is of the same one.
        fetch_weights(folder, lambda names: fetch(names, folder.name))
    except StreamlineError:
        raise
    except Exception as error:  # the Hub client raises its own and its transport's
        at = f" at revision {revision!r}" if revision else ""
        raise StreamlineError(
            f"model {model!r}{at}: cannot be fetched from the Hub ({first_line(error)}); give a Hub id and revision "
            "that are there, or a checkpoint's folder"
        ) from None
    return folder
