"""Upload the files of a checkpoint to a repository of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from pathlib import Path

import huggingface_hub

from optimum.streamline.errors import StreamlineError, first_line


def upload_files(
    folder: Path,
    files: Sequence[str],
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    message: str,
) -> str:
    """Upload files of a folder in one commit to a model repository, which is made if it does not exist.

    Args:
        folder: A checkpoint's folder.
        files: Names of the files in it to upload.
        repo_id: The repository, as `user/name`.
        private: Whether a new repository is private; `None` leaves it to the account's setting.
        token: The Hub token; the one that `hf auth login` stored by default.
        revision: The branch to commit to; `main` by default. It must exist.
        message: The commit's first line.

    Returns:
        The commit's URL.

    Raises:
        StreamlineError: the name is no repository's, the token is missing or refused, or the Hub cannot be reached.
    """
    api = huggingface_hub.HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=[escape(file) for file in files],
        )
    except Exception as error:  # the Hub client raises its own and its transport's
        raise StreamlineError(f"repo_id {repo_id!r}: cannot be uploaded to ({first_line(error)})") from None
    return str(commit.commit_url)
