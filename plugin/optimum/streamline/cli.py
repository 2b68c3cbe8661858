"""What each command does, given its flags: `optimum.commands.streamline` holds those.

Prints, and turns errors into one line and an exit code. Everything else is the library's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from .errors import StreamlineError
from .logs import captured_logs
from .outputs import check_output, refuse_own_input, write_file
from .processes import is_main, process_count
from .recipe import CHOOSING_TEXT, Budget, Recipe, make_recipe, read_recipe, write_recipe

if TYPE_CHECKING:
    from optimum.exporters.streamline import EngineOptions

    from .source import Source
    from .windows import Windows

BUDGET_FIELDS = {field.name for field in fields(Budget)}
# Of an export's calibration, which is for those of its quantizers that take one.
CALIBRATION_DEFAULTS: dict[str, Any] = {"calibration": CHOOSING_TEXT, "samples": 32, "length": 256, "seed": 0}
OPSETS = {"onnx": 23, "tensorrt": 24}
ENGINE_FLAGS = ("builder", "compute_capability", "max_batch", "max_length", "max_input")
RECIPE_FIELDS = {field.name for field in fields(Recipe)}


def run_command(name: str, args: Namespace) -> int:
    """Run a command; returns its exit code: 0 done, 3 over budget, 2 bad input, 1 a failed export."""
    commands: dict[str, Callable[[Namespace, Console], int]] = {
        "export": _export,
        "orthogonality": _orthogonality,
        "prune": _prune,
        "quantize": _quantize,
        "run": _run,
        "score": _score,
        "validate": _validate,
    }
    # Bound now: what is printed from here on is the program's own, whatever is redirected later.
    # Of several processes one speaks.
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False, quiet=not is_main())
    _asked_to_end.clear()
    ended_before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        # What other libraries say where there is no output folder yet to log it in is dropped, unless asked for.
        with captured_logs(None, args.verbose):
            _check_processes(name, args.verbose)
            return commands[name](args, console)
    except StreamlineError as error:
        _complain(f"error: {error}", error)
        return error.exit_code
    except KeyboardInterrupt as interruption:
        _complain("interrupted", interruption)
        return 130
    finally:
        signal.signal(signal.SIGTERM, ended_before)


def _check_processes(name: str, verbose: bool) -> None:
    if process_count() == 1:
        return
    if not verbose:
        # Heard when torch is loaded: what shares the gradients out would write hints to the terminal.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if name != "prune":
        raise StreamlineError(f"{name}: works in one process; prune is the command that several can share")


def _complain(message: str, error: BaseException) -> None:
    if is_main():
        # A note says what is left to go on from. Errors that are not ours show theirs below their traceback.
        print(message, *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)


_asked_to_end = Event()


def _interrupt(*_: object) -> NoReturn:
    # Ends like Ctrl-C: the folder that is being made is cleared away. Native code that calls back into Python may
    # swallow the exception (it was seen while a model was loading): then the next step does not begin.
    _asked_to_end.set()
    raise KeyboardInterrupt


def recipe_of(args: Namespace) -> Recipe:
    """The recipe that a recipe file, if any, and the flags over it amount to."""
    file = getattr(args, "recipe", None)
    given: dict[str, Any] = read_recipe(file) if file else {}
    flags = {key: value for key, value in vars(args).items() if key in RECIPE_FIELDS and key != "recipe"}
    limits = {key: value for key, value in vars(args).items() if key in BUDGET_FIELDS}
    budget = given.get("budget", {})
    if limits and isinstance(budget, dict):
        flags["budget"] = {**budget, **limits}
    return make_recipe({**given, **flags}, f"recipe {file}" if file else "flags")


def _source(args: Namespace, model: str) -> Source:
    from .source import Source

    return Source(model, args.cache_dir, args.trust_remote_code, args.revision)


def _note_bare(console: Console, *sources: Source) -> None:
    from .bare_layers import NEEDS_LOAD, bare_layers
    from .checkpoint import read_config
    from .runner import is_artifact

    for source in sources:
        if not is_artifact(source.folder) and bare_layers(read_config(source)):
            console.print(f"{source.model} {NEEDS_LOAD}", markup=False)


def _say(console: Console) -> Callable[[str], None]:
    def say(message: str) -> None:
        if _asked_to_end.is_set():
            raise KeyboardInterrupt
        console.print(message, markup=False)

    return say


@contextmanager
def _saved_recipe(args: Namespace, recipe: Recipe, console: Console) -> Iterator[None]:
    # Refused before the work, and written after it: only then is it known that nothing in the recipe was bad input.
    path, text = args.save_recipe, write_recipe(recipe)
    there = path is None or _holds_recipe(path, text, args.output)
    yield
    if path is not None and is_main():
        if not there:
            write_file(path, text)
        console.print(f"recipe written to {path}", markup=False)


def _holds_recipe(path: Path, text: str, output: Path) -> bool:
    """Whether this recipe is in the file already; refuses one that could not be written, or that holds another."""
    try:
        ours, out = path.resolve(), output.resolve()
        if ours.is_relative_to(out) or out.is_relative_to(ours):
            raise StreamlineError(f"save-recipe {path}, output {output}: one lies in the other; choose another place")
        if path.is_file() and path.read_bytes() == text.encode():
            return True
        if path.exists():
            raise StreamlineError(f"save-recipe {path}: exists already, and is not this recipe; choose another name")
    except (OSError, RuntimeError) as error:  # links in a circle are a RuntimeError
        raise StreamlineError(f"save-recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    check_output(path)
    return False


def _score(args: Namespace, console: Console) -> int:
    from .plots import layer_importance_svg
    from .prune import score
    from .record import scores_to_dict

    recipe = recipe_of(args)
    if args.output is not None:
        check_output(args.output, args.overwrite)
    scores, windows = score(_source(args, args.model), recipe, _say(console))
    _note_bare(console, _source(args, args.model))
    console.print(_score_table(scores.block_influence))
    if args.output is not None:
        text = {"model": args.model, "calibration": windows.describe(), **scores_to_dict(scores)}
        write_file(args.output / "scores.json", json.dumps(text, indent=1) + "\n")
        write_file(args.output / "scores.svg", layer_importance_svg(scores.block_influence, {}))
        console.print(f"scores and plot: {args.output}", markup=False)
    return 0


def _score_table(influence: tuple[float, ...]) -> Any:
    from rich.table import Table

    table = Table(title="Block Influence: 1 - mean cosine of a layer's input and output")
    for column in ("layer", "influence", "rank"):
        table.add_column(column, justify="right")
    ranks = sorted(range(len(influence)), key=lambda layer: influence[layer])
    for layer, value in enumerate(influence):
        table.add_row(str(layer), f"{value:.5f}", str(ranks.index(layer) + 1))
    return table


def _prune(args: Namespace, console: Console) -> int:
    from .prune import check_recipe, prune

    source, recipe = _source(args, args.model), recipe_of(args)
    check_recipe(source, recipe)
    with _saved_recipe(args, recipe, console):
        if args.dry_run:
            return _dry_run(source, recipe, console)
        prune(source, recipe, args.output, overwrite=args.overwrite, verbose=args.verbose, say=_say(console))
    return 0


def _dry_run(source: Any, recipe: Recipe, console: Console) -> int:
    if recipe.quantize_first and recipe.format != "none":
        raise StreamlineError(f"dry-run: with steps {recipe.steps!r} layers are scored in an export, which is not made")
    from .cost import cost_of
    from .edit import planned_config
    from .prune import prepare

    prepared = prepare(source, recipe, _say(console))
    before = cost_of(prepared.model.config, "fp32")
    after = cost_of(planned_config(prepared.model.config, prepared.plan), "fp32")
    context = recipe.length
    if recipe.quantize != "none":
        console.print(f"of the removal alone, before quantize {recipe.quantize!r}:", markup=False)
    console.print(
        f"parameters: {before.parameters:,} -> {after.parameters:,} ({after.live_parameters:,} to compute with)"
    )
    console.print(f"ideal decode speed-up: {before.decode_bytes(context) / after.decode_bytes(context):.2f}")
    console.print(f"ideal prefill speed-up: {before.prefill_flops(context) / after.prefill_flops(context):.2f}")
    return 0


def _run(args: Namespace, console: Console) -> int:
    from .prune import check_recipe
    from .report_text import comparison_table
    from .run import run

    source, recipe = _source(args, args.model), recipe_of(args)
    check_recipe(source, recipe)
    refuse_own_input(args.output, (str(args.recipe),) if args.recipe else ())
    with _saved_recipe(args, recipe, console):
        if args.dry_run:
            return _dry_run(source, recipe, console)
        report = run(source, recipe, args.output, overwrite=args.overwrite, verbose=args.verbose, say=_say(console))
    console.print(comparison_table(report))
    console.print(f"checkpoint: {args.output}", markup=False)
    console.print(f"report: {args.output / 'report.html'}", markup=False)
    return report.exit_code


def _quantize(args: Namespace, console: Console) -> int:
    from .quantize import quantize
    from .quantizers import check_quantizer

    check_quantizer(args.quantize)
    quantize(
        _source(args, args.model),
        args.output,
        args.quantize,
        _excluded(args),
        device=args.device,
        overwrite=args.overwrite,
        verbose=args.verbose,
        say=_say(console),
    )
    return 0


def _excluded(args: Namespace) -> list[str]:
    return [each.strip() for each in args.quantize_exclude.split(",") if each.strip()]


def _export(args: Namespace, console: Console) -> int:
    from optimum.exporters.streamline import check_export, export_checkpoint

    from .checkpoint import read_config, source_notes

    if args.task not in ("text-generation", "text-generation-with-past"):
        raise StreamlineError(f"task {args.task!r}: must be text-generation")
    opset = OPSETS.get(args.format)
    if args.opset not in (None, opset):
        raise StreamlineError(
            f"opset {args.opset}: must be {opset}, which has attention and normalisation as single nodes"
        )
    check_export(args.format, args.dtype, args.device, args.quantize, _engine(args))
    if args.quantize_exclude and args.quantize == "none":
        raise StreamlineError(f"quantize-exclude {args.quantize_exclude!r}: nothing is quantized; give quantize too")
    check_output(args.output, args.overwrite)
    source = _source(args, args.model)
    options = source.options() | {
        "verbose": args.verbose,
        "max_memory": _bytes("max-memory", args.max_memory),
        "quantize": args.quantize,
        "quantize_exclude": _excluded(args),
        "windows": _calibration(args, console),
        "last_logits": args.last_logits,
        "engine": _engine(args),
    }
    artifact = export_checkpoint(
        args.model, args.output, args.format, args.dtype, args.device, args.overwrite, **options
    )
    for line in (*source_notes(source, read_config(source)), *artifact.findings()):
        console.print(line, markup=False)
    console.print(f"exported to {args.output}", markup=False)
    _note_bare(console, _source(args, args.model))
    return 0


def _engine(args: Namespace) -> EngineOptions | None:
    """What engine is asked for; none where the format has none."""
    from optimum.exporters.streamline import EngineOptions

    given = {name: getattr(args, name) for name in ENGINE_FLAGS if getattr(args, name) is not None}
    if args.format != "tensorrt":
        for name, value in given.items():
            raise StreamlineError(
                f"{name.replace('_', '-')} {value}: format {args.format!r} has no engine; leave it out"
            )
        return None
    if asked := given.pop("compute_capability", None):
        try:
            given["capabilities"] = tuple(int(each) for each in asked.split(","))
        except ValueError:
            raise StreamlineError(f"compute-capability {asked!r}: must be numbers by commas, as 89,120") from None
    return EngineOptions(**given)


def _orthogonality(args: Namespace, console: Console) -> int:
    from .orthogonality import orthogonality
    from .report_text import interactions_table

    quantizers = [each.strip() for each in args.quantizers.split(",") if each.strip()]
    if not quantizers or len(set(quantizers)) < len(quantizers):
        raise StreamlineError(f"quantizers {args.quantizers!r}: must be names of quantizers, each once, by commas")
    report = orthogonality(
        _source(args, args.model),
        recipe_of(args),
        quantizers,
        args.output,
        overwrite=args.overwrite,
        verbose=args.verbose,
        say=_say(console),
    )
    console.print(interactions_table(report))
    console.print(f"report: {args.output / 'report.html'}", markup=False)
    return report.exit_code


def _calibration(args: Namespace, console: Console) -> Windows | None:
    """The windows that a way to quantize asks for; none where it asks for none."""
    from optimum.exporters.streamline import ENGINE_WAYS, WAYS

    from .checkpoint import load_tokenizer, read_config
    from .windows import read_windows

    given = {name: getattr(args, name) for name in CALIBRATION_DEFAULTS if getattr(args, name) is not None}
    ways: Any = ENGINE_WAYS if args.format == "tensorrt" else WAYS
    if args.quantize not in ways or not ways[args.quantize].calibrated:
        for name, value in given.items():
            raise StreamlineError(f"{name} {value}: quantize {args.quantize!r} is not calibrated; leave it out")
        return None
    source, asked = _source(args, args.model), CALIBRATION_DEFAULTS | given
    config = read_config(source)
    limit = config.max_position_embeddings
    if engine := _engine(args):  # whose caches have no room for more
        limit = engine.limits(limit).length
        asked["length"] = given.get("length", min(asked["length"], limit))
    for name, least, most in (("samples", 1, 10**6), ("length", 8, limit)):
        if not least <= asked[name] <= most:
            raise StreamlineError(f"{name} {asked[name]}: must be from {least} to {most}")
    how = (asked["samples"], asked["length"], asked["seed"], config.vocab_size, "calibration")
    windows = read_windows(asked["calibration"], load_tokenizer(source), *how)
    console.print(windows.line("calibration"), markup=False)
    return windows


def _bytes(name: str, text: str | None) -> int | None:
    """The number of bytes that a size says, such as `1.5GB`."""
    if text is None:
        return None
    number = text.upper().removesuffix("B")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    try:
        size = int(float(number if unit == 1 else number[:-1]) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise StreamlineError(f"{name} {text!r}: must be a size in bytes, or one such as 500MB or 1.5GB")
    return size


def _validate(args: Namespace, console: Console) -> int:
    from .checkpoint import check_checkpoint, load_tokenizer, source_notes
    from .record import refuse_seen_text
    from .report_files import write_report
    from .report_text import comparison_table
    from .stability import read_questions
    from .validation import subjects_of, validate
    from .windows import read_windows

    recipe = recipe_of(args)
    check_output(args.output, args.overwrite)
    subjects = subjects_of(_source(args, args.original), args.candidate)
    configs = [check_checkpoint(subject.source, of_export=True) for subject in subjects]
    for subject, config in zip(subjects, configs, strict=True):
        for line in source_notes(subject.source, config):
            console.print(f"{subject.label}: {line}", markup=False)
    tokenizer = load_tokenizer(subjects[0].source)
    questions = read_questions(args.questions, tokenizer) if args.questions else None
    how = (recipe.eval_samples, recipe.length, recipe.seed, configs[0].vocab_size, "eval")
    windows = read_windows(recipe.eval_data, tokenizer, *how)
    console.print(windows.line("evaluation"), markup=False)
    for subject in subjects[1:]:
        refuse_seen_text(str(subject.source.folder), windows)
    report = validate(
        subjects,
        windows,
        recipe.budget,
        recipe.judge,
        questions=questions,
        dtype=recipe.dtype or "fp32",
        device=recipe.device,
        seed=recipe.seed,
        say=_say(console),
        rounds=args.rounds,
    )
    write_report(report, args.output)
    console.print(comparison_table(report))
    console.print(f"report: {args.output / 'report.html'}", markup=False)
    _note_bare(console, *(subject.source for subject in subjects))
    return report.exit_code
