"""Code that a checkpoint brings along: named when it is not run, and carried to what is made of the checkpoint.

`auto_map` in `config.json` and `tokenizer_config.json` names classes in Python files beside them. transformers runs
them only with `trust_remote_code`, and otherwise takes its own class of the same model type in silence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from optimum.streamline.errors import StreamlineError

from .source import ModelSource
from .weight_files import CONFIG_FILE

_NAMED_IN = (CONFIG_FILE, "tokenizer_config.json")


def code_note(source: ModelSource, class_name: str) -> str:
    """What a user must know of code that a checkpoint has: whether it runs, and if not, what is used instead.

    Args:
        class_name: The model class that is used.

    Returns:
        One line; empty where there is no such code.

    Raises:
        StreamlineError: the code is to be run, and is not whole.
    """
    named = sorted({each for file in _NAMED_IN for each in _references(source.folder / file)})
    if not named:
        return ""
    code = f"the model has code of its own ({', '.join(named)})"
    if source.trust_remote_code:
        for reference in named:
            _modules_of(source.folder, reference, whole=True)
        return f"{code}, which is run: trust-remote-code was given"
    return (
        f"{code}, which is not run: transformers' {class_name} is used; give --trust-remote-code to run it. What is "
        "made of the model brings it along"
    )


def carry_code(source: ModelSource, folder: Path) -> None:
    """Give the checkpoint in `folder` the code files of the one it was made from, and the fields that name them."""
    for file in _NAMED_IN:
        named = _fields(source.folder / file).get("auto_map")
        written = folder / file
        if not named or not written.is_file():
            continue
        written.write_text(
            json.dumps(_fields(written) | {"auto_map": named}, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        for reference in _references(source.folder / file):
            _copy_module(source.folder, reference, folder)


def _copy_module(origin: Path, reference: str, folder: Path) -> None:
    for module in _modules_of(origin, reference):
        target = folder / module.relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, target)


def _modules_of(origin: Path, reference: str, whole: bool = False) -> list[Path]:
    """The file that a class is in, and those that it imports from beside it; none of a repository of the Hub.

    Args:
        whole: Whether all of them must be there.

    Raises:
        StreamlineError: one is not, and must be.
    """
    module = origin / f"{reference.partition('.')[0]}.py"
    if "--" in reference:  # it names a repository of the Hub, which the output names as well
        return []
    try:
        files = [module, *(Path(each) for each in get_relative_import_files(str(module)))]
        missing = [file for file in files if not file.is_file()]
    except OSError as error:
        files, missing = [module], [Path(str(error.filename))]
    if missing and whole:
        raise StreamlineError(
            f"model {str(origin)!r}: its code {reference} needs {missing[0].name}, which is not there"
        )
    return [file for file in files if file.is_file()]


def _references(file: Path) -> Iterator[str]:
    """The classes that a file's `auto_map` names, such as `modeling_x.XForCausalLM`."""
    named = _fields(file).get("auto_map")
    for value in named.values() if isinstance(named, dict) else (named,):
        for each in value if isinstance(value, list) else (value,):
            if isinstance(each, str):
                yield each


def _fields(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise StreamlineError(f"{file}: is not JSON; fetch it again") from None
    return fields if isinstance(fields, dict) else {}
