"""Turn parsed flags into arguments of the library: the model and the recipe. Also write `--save-recipe`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from optimum.streamline.checkpoints.loading import read_config
from optimum.streamline.costs.machine import Machine
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.artifact import is_artifact
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.bare_layers import NEEDS_LOAD, bare_layers
from optimum.streamline.recipe.parsing import given_options, read_recipe, recipe_of_given, write_recipe
from optimum.streamline.recipe.recipe import OPTIONS, Recipe
from optimum.streamline.system.atomic_output import check_output, write_file
from optimum.streamline.system.distributed import is_main


def recipe_of(args: Namespace) -> Recipe:
    """The recipe of the flags and of the recipe file, if one is given. A flag overrides the file."""
    file = getattr(args, "recipe", None)
    given = given_options(read_recipe(file), f"recipe {file}") if file else {}
    flags = {key: value for key, value in vars(args).items() if key in OPTIONS}
    return recipe_of_given({**given, **given_options(flags, "flags")})


def check_on(args: Namespace) -> None:
    """Refuse `--on` without `--dry-run`, and a machine that cannot be read."""
    if args.on is None:
        return
    if not args.dry_run:
        raise StreamlineError(f"on {args.on!r}: another machine can only be estimated; give dry-run too")
    Machine.parse(args.on)


def model_source(args: Namespace, model: str) -> ModelSource:
    """The source of a model, with the flags `--cache_dir`, `--trust-remote-code` and `--revision`."""
    return ModelSource(model, args.cache_dir, args.trust_remote_code, args.revision)


def note_bare_layers(console: Console, *sources: ModelSource) -> None:
    """Print a line for each model with bare layers: stock transformers cannot load it."""
    for source in sources:
        if not is_artifact(source.folder) and bare_layers(read_config(source)):
            console.print(f"{source.model} {NEEDS_LOAD}", markup=False)


@contextmanager
def saved_recipe(args: Namespace, recipe: Recipe, console: Console) -> Iterator[None]:
    """Write the recipe to the file of `--save-recipe`, if given, when the `with` block has succeeded."""
    # Check the path before the work. Write after it: only then is it known that the recipe holds no bad input.
    path, text = args.save_recipe, write_recipe(recipe)
    written = path is None or _holds_recipe(path, text, args.output)
    yield
    if path is not None and is_main():
        if not written:
            write_file(path, text)
        console.print(f"recipe written to {path}", markup=False)


def _holds_recipe(path: Path, text: str, output: Path) -> bool:
    """Whether the file holds this recipe already. Refuses other content, and a path that cannot be written."""
    try:
        ours, out = path.resolve(), output.resolve()
        if ours.is_relative_to(out) or out.is_relative_to(ours):
            raise StreamlineError(f"save-recipe {path}, output {output}: one contains the other; choose another path")
        if path.is_file() and path.read_bytes() == text.encode():
            return True
        if path.exists():
            raise StreamlineError(f"save-recipe {path}: exists already and is not this recipe; choose another name")
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise StreamlineError(f"save-recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    check_output(path)
    return False


def excluded_modules(args: Namespace) -> list[str]:
    """The items of `--quantize-exclude`: layer numbers and name patterns."""
    return [each.strip() for each in args.quantize_exclude.split(",") if each.strip()]
