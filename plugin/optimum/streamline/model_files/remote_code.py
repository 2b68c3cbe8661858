"""Python code in a checkpoint: tell the user whether it runs, and copy it to checkpoints made from this one.

The field `auto_map` in `config.json` and `tokenizer_config.json` names classes in Python files of the same folder.
transformers runs them only with `trust_remote_code`. Otherwise it silently uses its own class of the same model type.
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
    """Tell the user about code in a checkpoint: whether it runs, and which class is used if it does not.

    Args:
        source: The model.
        class_name: The model class of transformers that is used if the code does not run.

    Returns:
        One line; empty if the checkpoint has no code.

    Raises:
        StreamlineError: the code would run, but a file that it imports is missing.
    """
    named = sorted({each for file in _NAMED_IN for each in _references(source.folder / file)})
    if not named:
        return ""
    code = f"the model has code of its own ({', '.join(named)})"
    if source.trust_remote_code:
        for reference in named:
            _modules_of(source.folder, reference, require_all=True)
        return f"{code}, which is run, because --trust-remote-code was given"
    return (
        f"{code}, which is not run: transformers' {class_name} is used; give --trust-remote-code to run it. A "
        "checkpoint made from this model includes a copy of the code"
    )


def carry_code(source: ModelSource, folder: Path) -> None:
    """Copy code from one checkpoint to another that was made from it, with the `auto_map` fields that name it.

    Args:
        source: The original, which may have code.
        folder: The folder of the new checkpoint, in place.
    """
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
    """Copy the Python file of one `auto_map` reference, and the files that it imports, from `origin` to `folder`."""
    for module in _modules_of(origin, reference):
        target = folder / module.relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, target)


def _modules_of(origin: Path, reference: str, require_all: bool = False) -> list[Path]:
    """The Python file of an `auto_map` reference, and the files that it imports from the same folder.

    Args:
        origin: The checkpoint's folder.
        reference: A class, such as `modeling_x.XForCausalLM`. A reference to another Hub repository gives no files.
        require_all: Whether to refuse missing files.

    Returns:
        The files that exist.

    Raises:
        StreamlineError: `require_all` is true, and a file is missing.
    """
    module = origin / f"{reference.partition('.')[0]}.py"
    if "--" in reference:  # the class is in another Hub repository; the new checkpoint refers to it too
        return []
    try:
        files = [module, *(Path(each) for each in get_relative_import_files(str(module)))]
        missing = [file for file in files if not file.is_file()]
    except OSError as error:
        files, missing = [module], [Path(str(error.filename))]
    if missing and require_all:
        name = missing[0].name
        raise StreamlineError(
            f"model {str(origin)!r}: its code {reference} needs {name}, which is missing; fetch {name}"
        )
    return [file for file in files if file.is_file()]


def _references(file: Path) -> Iterator[str]:
    """The classes that the `auto_map` of a JSON file names, such as `modeling_x.XForCausalLM`."""
    named = _fields(file).get("auto_map")
    for value in named.values() if isinstance(named, dict) else (named,):
        for each in value if isinstance(value, list) else (value,):
            if isinstance(each, str):
                yield each


def _fields(file: Path) -> dict[str, Any]:
    """The fields of a JSON file; empty if it does not exist."""
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise StreamlineError(f"{file}: is not JSON; fetch it again") from None
    return fields if isinstance(fields, dict) else {}
