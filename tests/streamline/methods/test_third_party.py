"""Methods of other distributions: the example package as a user installs it, and every way one can be wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from console import optimum_cli
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs, Scores
from optimum.streamline.methods.registry import BUILT_IN, METHODS, method_of
from optimum.streamline.methods.third_party import third_party_methods
from optimum.streamline.recipe.parsing import make_recipe
from reference import REFERENCE
from tiny import LAYERS, tiny_model

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "method_every_other"
PAGE = (ROOT / "docs" / "howto" / "add-a-method.md").read_text(encoding="utf-8")
FLAT = Scores(tuple((0.5,) * (LAYERS + 1) for _ in range(LAYERS + 1)))
GOOD = """
from optimum.streamline.methods.base import Method, Plan

class Good(Method):
    summary = "nothing in particular"
    needs_float = "reads weights"

    def plan(self, recipe, inputs):
        return Plan(inputs.layers, (1,), recipe.resolved_replacement)
"""
Register = Callable[..., None]


@pytest.fixture(autouse=True)
def modules_forgotten() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("stranger", "method_every_other", "last_layers")):
            del sys.modules[name]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Installs a distribution of one module, as pip would leave it."""

    def install(entries: str, module: str = GOOD, name: str = "stranger") -> None:
        folder = tmp_path / name
        info = folder / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (folder / f"{name.replace('-', '_')}.py").write_text(module)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[optimum_streamline.methods]\n{entries}\n")
        monkeypatch.syspath_prepend(folder)

    return install


def test_a_registered_method_is_one_among_all(register: Register) -> None:
    register("good = stranger:Good")
    assert [*METHODS] == [*BUILT_IN, "good"]
    assert len(METHODS) == len(BUILT_IN) + 1
    assert "good" in METHODS
    assert "bad" not in METHODS
    assert [(each.name, each.package) for each in third_party_methods()] == [("good", "stranger 1.2")]
    assert "stranger" not in sys.modules  # nobody has asked for it yet
    recipe = make_recipe({"method": "good", "remove": 1})
    assert method_of(recipe, tiny_model().config).plan(recipe, MethodInputs(None, None, FLAT)).removed == (1,)
    assert dict(METHODS)["good"].summary == "nothing in particular"
    with pytest.raises(StreamlineError, match=r"method 'bad': unknown; known are .*sleb, good$"):
        method_of(make_recipe({"method": "bad", "remove": 1}), tiny_model().config)
    with pytest.raises(StreamlineError, match=r"protect '1,1': method good does not have this option; shifted, "):
        method_of(make_recipe({"method": "good", "remove": 1, "protect": "1,1"}), tiny_model().config)


def test_methods_are_listed_without_torch() -> None:
    script = "import sys, optimum.streamline.methods.third_party as t; t.third_party_methods(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "torch" not in modules.split()


@pytest.mark.parametrize(
    ("entries", "module", "said"),
    [
        (
            "x = stranger:Good",
            "import no_such_module",
            r"cannot be imported \(ModuleNotFoundError: No module named 'no_",
        ),
        ("x = stranger:Good", "1 / 0", r"cannot be imported \(ZeroDivisionError: division by zero\); repair or uninst"),
        ("x = stranger:Gone", GOOD, r"cannot be imported \(AttributeError: .*'Gone'"),
        ("x = stranger", GOOD, "stranger must be a subclass of optimum.streamline.methods.base.Method"),
        ("x = stranger:Plan", GOOD, "stranger:Plan must be a subclass of optimum.streamline.methods.base.Method"),
        ("x = stranger:Method", GOOD, "stranger:Method must define plan and summary"),
        ("x = stranger:Good", GOOD.replace("summary", "about"), "stranger:Good must define summary"),
        (
            "x = stranger:Good",
            GOOD + "\n    def __init__(self, model):\n        pass",
            r"stranger:Good\(\) must work without arguments \(TypeError: ",
        ),
    ],
)
def test_what_is_no_method_is_refused(register: Register, entries: str, module: str, said: str) -> None:
    register(entries, module)
    with pytest.raises(StreamlineError, match=rf"^method 'x' of stranger 1\.2: {said}") as error:
        METHODS["x"]
    assert "\n" not in str(error.value)
    assert METHODS["sleb"] is BUILT_IN["sleb"]  # others are not in its way
    with pytest.raises(StreamlineError, match="stranger 1.2"):
        dict(METHODS)


def test_a_name_of_ours_is_refused(register: Register) -> None:
    register("sleb = stranger:Good")
    said = r"^method 'sleb': stranger 1\.2 registers this name, but it belongs to a method of optimum-streamline; un"
    with pytest.raises(StreamlineError, match=said):
        METHODS["sleb"]
    assert [*METHODS] == [*BUILT_IN]
    assert METHODS["come"] is BUILT_IN["come"]


def test_a_name_of_two_is_refused(register: Register) -> None:
    register("x = stranger:Good")
    register("x = other:Good", name="other")
    said = r"^method 'x': other 1\.2 and stranger 1\.2 each register this name; uninstall all but one$"
    with pytest.raises(StreamlineError, match=said):
        METHODS["x"]


@pytest.mark.parametrize(
    ("removed", "skipped", "said"),
    [
        ((2, 1), (), "rising and each once"),
        ((1, 1), (), "rising and each once"),
        ((1.0,), (), "a tuple of ints"),
        ((4,), (), "0 to 3"),
        ((-1,), (), "0 to 3"),
        ((1,), ((1, "mlp"),), "layer 1 is not one that stays"),
        ((), ((4, "mlp"),), "layer 4 is not one that stays"),
    ],
)
def test_an_impossible_plan_is_a_defect(
    removed: tuple[int, ...], skipped: tuple[tuple[int, str], ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Plan(4, removed, skipped=skipped)


def test_the_page_is_true(register: Register) -> None:
    [entries] = re.findall(r"^last-layers = (.*)$", PAGE, re.MULTILINE)
    code, check = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    register(f"last-layers = {json.loads(entries)}", code, "last_layers")
    recipe = make_recipe({"method": "last-layers", "remove": 2})
    plan = method_of(recipe, tiny_model().config).plan(recipe, MethodInputs(None, None, FLAT))
    assert plan.removed == (LAYERS - 2, LAYERS - 1)
    exec(compile(code + check, "add-a-method.md", "exec"), {})


def test_the_example_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, out = tmp_path / "target", tmp_path / "out"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, EXAMPLE], check=True)
    monkeypatch.syspath_prepend(target)
    prune = ("streamline", "prune", "-m", REFERENCE, "--calibration", "stdlib", "--samples", 4, "--length", 64)
    prune = (*prune, "--method", "every-other")
    refused = optimum_cli(monkeypatch, capsys, *prune, "--remove", 8, out)
    assert refused.code == 2
    assert refused.err == (
        "error: remove '8': every other of 16 layers is at most 7, and 8 are to go; "
        "remove 7 or fewer, or use another method\n"
    )
    done = optimum_cli(monkeypatch, capsys, *prune, "--remove", 3, out)
    assert (done.code, done.err) == (0, "")
    record = json.loads((out / "streamline.json").read_text())
    assert record["removed"] == [10, 12, 14]
    assert record["method"] == "every-other"
    assert record["method_from"] == {"distribution": "method-every-other", "version": "0.1.0"}
    card = (out / "README.md").read_text()
    assert "`every-other` (every other layer from the top, the first and the last stay (2004.03844)), a method" in card
    assert "of method-every-other 0.1.0" in card
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 13
