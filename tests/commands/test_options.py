"""An option is written once; the flags and their help come from that, without anything heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from console import optimum_cli
from optimum.streamline.recipe.recipe import OPTIONS
from reference import REFERENCE

# A process in which one option more is written into the definition of the recipe, and into nothing else.
WITH_WARMUP = """
import importlib.util, sys
from pathlib import Path
name = "optimum.streamline.recipe.healing"
spec = importlib.util.find_spec(name)
lines = Path(spec.origin).read_text(encoding="utf-8").splitlines()
option = '    warmup: Annotated[int, Option("Updates until the peak.", key="heal_warmup"), Ge(0)] = 7'
[place] = [number for number, line in enumerate(lines) if line.startswith("    epochs: ")]
lines.insert(place, option)
sys.modules[name] = module = importlib.util.module_from_spec(spec)
exec(compile("\\n".join(lines), spec.origin, "exec"), module.__dict__)
from optimum.commands.optimum_cli import main
for line in sys.stdin:
    sys.argv = ["optimum-cli", *line.split()]
    try:
        main()
    except SystemExit as end:
        print("exit code:", end.code, flush=True)
"""
# A process that says which of these packages a command has imported when it has printed its help.
IMPORTS = """
import sys
from optimum.commands.optimum_cli import main
try:
    main()
except SystemExit:
    pass
names = ("torch", "transformers", "pydantic", "onnx", "onnxruntime", "optimum.streamline")
print("imported:", *(name for name in names if name in sys.modules))
"""


def run_process(script: str, *words: object, said: str = "") -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.argv = {['optimum-cli', *map(str, words)]!r}\n{script}"
    return subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, input=said)


def test_a_new_option_is_written_once(tmp_path: Path) -> None:
    grouped, flat, wrong = (tmp_path / f"{name}.yaml" for name in ("grouped", "flat", "wrong"))
    grouped.write_text("layers: 3\nhealing: {warmup: 3}\n")
    flat.write_text("layers: 3\nheal_warmup: 3\n")
    wrong.write_text("layers: 3\nhealing: {warmup: -1}\n")
    dry = f"{tmp_path}/out --dry-run --on 80GB --calibration stdlib --samples 2 --length 32 --save-recipe {tmp_path}"
    commands = (
        "streamline prune --help",
        f"streamline run -m {REFERENCE} {grouped} {dry}/from-grouped.yaml",
        f"streamline run -m {REFERENCE} {flat} {dry}/from-flat.yaml",
        f"streamline run -m {REFERENCE} {flat} {dry}/from-flag.yaml --heal-warmup 9",
        f"streamline run -m {REFERENCE} {wrong} {dry}/from-wrong.yaml",
    )
    done = run_process(WITH_WARMUP, said="\n".join(commands))
    assert "--heal-warmup N Updates until the peak. (default: 7)" in " ".join(done.stdout.split()), done.stderr
    codes = [line.removeprefix("exit code: ") for line in done.stdout.splitlines() if line.startswith("exit code: ")]
    assert codes == ["0", "0", "0", "0", "2"], done.stderr
    for name, warmup in (("from-grouped", 3), ("from-flat", 3), ("from-flag", 9)):
        # What `Recipe.to_dict` gives.
        assert f"healing:\n  warmup: {warmup}\n" in (tmp_path / f"{name}.yaml").read_text()
    assert f"recipe {wrong}: healing.warmup is -1: Input should be greater than or equal to 0" in done.stderr
    assert not (tmp_path / "from-wrong.yaml").exists()


def test_the_help_of_run_tells_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = " ".join(optimum_cli(monkeypatch, capsys, "streamline", "run", "--help").out.split())
    for option in OPTIONS.values():
        named = f"{option.flag}, --no-{option.flag.removeprefix('--')}" if option.default is True else option.flag
        assert f" {named} " in told
        assert option.help() in told
        assert option.option.help.endswith(".")


def test_the_help_names_methods_of_other_packages_and_imports_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[optimum_streamline.methods]\nnewest = no_such_module:Newest\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "newest: from elsewhere 1.0" in optimum_cli(monkeypatch, capsys, "streamline", "run", "--help").out


@pytest.mark.parametrize(
    ("words", "imported"),
    [(("--help",), ""), (("streamline", "--help"), ""), (("streamline", "run", "--help"), " optimum.streamline")],
)
def test_help_imports_nothing_heavy(words: tuple[str, ...], imported: str) -> None:
    assert run_process(IMPORTS, *words).stdout.endswith(f"\nimported:{imported}\n")
