"""Recipe files that say something odd: what each comes to, in one line, and that nothing else ever comes of one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from console import optimum_cli
from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.parsing import make_recipe, read_recipe, write_recipe
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.recipe.yaml12 import DEEPEST, dump_yaml, parse_yaml
from reference import REFERENCE

EXAMPLE = Path(REFERENCE).parent / "quarter_off.yaml"
FULL = """# All kinds of values.
method: llm-streamline
remove: 25%
replacement: mlp
protect: "1,1"
heal: hidden-mse+lm
heal_minutes: 1.5
heal_lr: 1e-4
lora: true
calibration: "texts/a b.txt"
quantize_exclude: [0, "*.down_proj"]
steps: [prune, quantize]
seed: 010
budget: {max_ppl_ratio: 1.2, max_kl: 1}
"""
# What a recipe file could be given by accident or by malice; most broke a reader of YAML 1.1.
FRAGMENTS = [
    *("0", "9" * 30, "010", "0x_", "1:30", "2024-13-45", "1e999", ".nan", "-.inf", "~", "true", "yes", "0o17", "1_0"),
    *("&a ", "*a", "!!int x", "!", "<<: ", "? ", "- ", "[", "]", "{", "}", "---\n", "...\n", "%YAML 1.1\n", "=", "@"),
    *('"', "'", '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', "|\n", ">-\n", "#", ": ", ":", ",", "\n", "\n  ", "\t", " "),
    *("\0", "\x1b", "\x85", "\u2028", "\ufeff", "é", "日", "😀", "budget", "remove: 1\n", "null: 1\n", "1: 2\n"),
]


def recipe_from(text: str | bytes, folder: Path) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return make_recipe(read_recipe(file), "recipe")


def recipe_or_line(text: str, folder: Path) -> Recipe | str:
    try:
        return recipe_from(text, folder)
    except StreamlineError as error:
        return str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("remove: 1\nseed: 2\nremove: 3\n", "line 3, column 1: key 'remove' appears twice"),
        ("remove: 1\nremove: 1\n", "line 2, column 1: key 'remove' appears twice"),
        ('remove: 1\n"remove": 1\n', "key 'remove' appears twice"),
        ("budget: {max_kl: 1, max_kl: 2}", "line 1, column 21: key 'max_kl' appears twice"),
        ("samples: 1:30", "samples is '1:30': must be an integer"),
        ("samples: 1_000", "samples is '1_000': must be an integer"),
        ("samples: 0b11", "samples is '0b11': must be an integer"),
        ("samples: 1e3", "samples is 1000.0: must be an integer"),
        ("samples: 16.0", "samples is 16.0: must be an integer"),
        ("samples: '16'", "samples is '16': must be an integer"),
        ("samples: true", "samples is True: must be an integer"),
        ("samples: [16]", r"samples is \[16\]: must be an integer"),
        ("samples:", "samples is None: must be an integer"),
        ("samples: 2024-01-01", "line 1, column 10: dates are not supported; put text in quotes"),
        ("calibration: 2024-13-45", "dates are not supported; put text in quotes"),
        ("calibration: 2024-01-01 25:61:61", "dates are not supported"),
        ("lora: yes", "lora is 'yes': must be true or false"),
        ("lora: on", "lora is 'on': must be true or false"),
        ("lora: 1", "lora is 1: must be true or false"),
        ("lora: 'true'", "lora is 'true': must be true or false"),
        ("heal_lr: true", "heal-lr is True: must be a number"),
        ("heal_lr: '0.1'", "heal-lr is '0.1': must be a number"),
        ("heal_lr: .nan", "heal-lr is nan: .* finite"),
        ("heal_kl: .nan", "heal-kl is nan: .* finite"),
        ("heal_lr: 1e999", "heal-lr is inf: .* finite"),
        ("budget: {max_kl: .inf}", "budget.max-kl is inf: .* finite"),
        ("budget: {max_kl: true}", "budget.max-kl is True: must be a number"),
        ("budget: {1: 2}", "budget: unknown key 1; known are max_ppl_ratio"),
        ("budget: []", r"budget is \[\]: must be a mapping of options to values; known are max_ppl_ratio"),
        ("budget:", "budget is None: must be a mapping of options to values"),
        ("method: 3", r"method is 3: must be a string \(in quotes"),
        ("calibration: [a.txt]", r"calibration is \['a.txt'\]: must be a string"),
        ("calibration: ~", "calibration is None: must be a string"),
        ("protect: [1, 1]", r"protect is \[1, 1\]: must be a string"),
        ("protect: ١,١", "protect is '١,١': must be two numbers"),
        (f"protect: '{'9' * 5000},1'", "protect is '9999.*: must be two numbers"),
        ("layers: 1.5", "layers is 1.5: must be a string"),
        ("layers: true", "layers is True: must be a string"),
        ("layers: {1: 2}", "layers is {1: 2}: must be a string"),
        ("layers: [1, [2]]", r"layers is \[1, \[2\]\]: must be one list, or written as 3,7,11-13"),
        ("layers: [1, ~]", "layers is .*: must be one list"),
        ("quantize_exclude: [a, {b: c}]", "quantize-exclude is .*: must be one list, or written as 0,"),
        ("steps: [prune, 1.5]", "steps is .*: must be one list, or written as quantize,prune"),
        (f"samples: {'9' * 5000}", "line 1, column 10: a number of 5000 characters"),
        (f"remove: 0x{'f' * 5000}", "a number of 5002 characters"),
        (f"samples: {'9' * 99}", "samples is 9999.*99: .* less than or equal to"),
        ("remove: !!str 1", "line 1, column 9: tags are not supported; leave it out"),
        ("remove: ! 1", "tags are not supported"),
        ("lora: !!bool x", "tags are not supported"),
        ("remove: !!python/object/apply:os.getcwd []", "tags are not supported"),
        ("!!set {remove}", "tags are not supported"),
        ("remove: &a 1", "line 1, column 9: anchors and aliases are not supported; write the value out"),
        ("remove: *nope", "anchors and aliases are not supported"),
        ("&a\nlayers: [*a]", "anchors and aliases are not supported"),
        ("<<: {remove: 1}", "unknown key '<<'; known are the groups pruning"),
        ("? [a]\n: 1", "line 1, column 3: a key must be a word, not a list or a mapping"),
        ("{a: b}: 1", "a key must be a word"),
        ("~: 1", "unknown key None"),
        (f"? {'x' * 5000}\n: 1", "unknown key 'xxx.*; known are"),
        ("layers: " + "[" * 60_000, f"line 1, column 17: nested deeper than {DEEPEST} levels"),
        ("- " * 30_000, f"nested deeper than {DEEPEST} levels"),
        ("{a: " * 15_000, f"nested deeper than {DEEPEST} levels"),
        ("".join(" " * level + "a:\n" for level in range(300)), f"nested deeper than {DEEPEST} levels"),
        ("remove: 1\n---\nremove: 2", r"not YAML \(line 2, column 1: .*another document"),
        ("remove: \0", r"not YAML \(character 9 is not allowed\)"),
        ('calibration: "\\0"', r"calibration is '\\x00': holds a character that cannot be printed"),
        ('calibration: "\\e[31m"', "calibration is .*: holds a character that cannot be printed"),
        ('calibration: "\\ud800"', "calibration is .*: holds a character that cannot be printed"),
        ('calibration: "\\UFFFFFFFF"', "not YAML .an escape for a character that does not exist"),
        ('calibration: "\\U0011ffff"', "not YAML .an escape for a character that does not exist"),
        ("", "must be keys with values"),
        ("3", "must be keys with values"),
        ("calibration: é".encode("latin-1"), r"is not text in UTF-8 \(byte 14\)"),
        ("remove: 1".encode("utf-16"), r"is not text in UTF-8 \(byte 1\)"),
        (bytes(range(256)), "not YAML|UTF-8"),
        ("#" * 2**16 + "\nremove: 1", "is longer than 65536 bytes, so it is no recipe"),
    ],
)
def test_an_odd_recipe_is_one_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=message) as caught:
        recipe_from(text, tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("010", 10), ("0o17", 15), ("0x1F", 31), ("-0", 0), ("+7", 7), ("1e-4", 1e-4), (".5", 0.5), ("1.", 1.0)),
        *(("1:30", "1:30"), ("yes", "yes"), ("1_000", "1_000"), ("0b1", "0b1"), ("25%", "25%"), ("1,1", "1,1")),
        *(("", None), ("~", None), ("null", None), ("True", True), ("FALSE", False), ("tRUE", "tRUE"), ("=", "=")),
        *(
            ("'010'", "010"),
            ('"2024-01-01"', "2024-01-01"),
            ("1-3", "1-3"),
            ("[1, '1']", [1, "1"]),
            ("{a: 1}", {"a": 1}),
        ),
        *((".inf", float("inf")), ("-.INF", -float("inf")), ("0x", "0x"), ("1e", "1e"), ("+.nan", "+.nan")),
    ],
)
def test_a_value_is_what_the_core_schema_of_yaml_says(text: str, value: Any) -> None:
    read = parse_yaml(f"key: {text}\n")
    assert read == {"key": value}
    assert type(read["key"]) is type(value)


@pytest.mark.parametrize("name", ["/", "/dev/zero", "/proc/self/mem", "no such file", "a\0b", "x" * 300])
def test_what_is_no_file_with_an_end_is_one_line(name: str) -> None:
    with pytest.raises(StreamlineError, match="^recipe .*: (cannot be read|is longer than)") as caught:
        read_recipe(Path(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["remove: 1\nremove: 2\n", "remove: 1\nlora: yes\n", "seed: &a [*a]\n", "[" * 9000])
def test_the_command_says_it_and_exits_with_2(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    words = ("streamline", "run", "-m", REFERENCE, tmp_path / "recipe.yaml", tmp_path / "out")
    outcome = optimum_cli(monkeypatch, capsys, *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: recipe ")
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_limits_over_a_budget_that_is_none_do_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("remove: 1\nbudget: []\n")
    words = ("streamline", "run", "-m", REFERENCE, tmp_path / "recipe.yaml", tmp_path / "out", "--max-kl", 1)
    outcome = optimum_cli(monkeypatch, capsys, *words)
    assert outcome.code == 2
    assert "budget is []: must be a mapping of options to values" in outcome.err


@pytest.mark.parametrize(
    "text",
    [
        *(
            "010",
            "1:30",
            "2024-01-01",
            "2024-1-1",
            "1e3",
            "0o17",
            "0x1F",
            ".5",
            ".inf",
            "yes",
            "null",
            "~",
            "",
            "=",
            "<<",
        ),
        *(
            "3",
            "1,1",
            "- a",
            " a ",
            "a: b",
            "#a",
            "&a",
            "*a",
            "!a",
            "%a",
            "@a",
            "'",
            '"',
            "\\",
            "true",
            "1_000",
            "a" * 300,
        ),
        *("日本.txt", "😀", "\udcff.txt", "\u2028", "\ufeff", "\xa0", "a  b", "[a]", "{a}", "?", "|", ">", "-", "---"),
    ],
)
def test_any_text_is_read_back_from_what_is_written(text: str, tmp_path: Path) -> None:
    recipe = make_recipe({"calibration": text, "layers": text, "method": text, "quantize_exclude": [text, 3]})
    assert recipe_from(write_recipe(recipe), tmp_path) == recipe
    assert yaml.safe_load(write_recipe(recipe)) == recipe.to_dict()  # and by readers of YAML 1.1


def test_numbers_are_read_back_from_what_is_written(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(50):
        fields = {"heal_lr": 10 ** draw.uniform(-300, 300), "seed": draw.randrange(2**63), "budget": {"max_kl": 1e22}}
        recipe = make_recipe(fields)
        assert recipe_from(write_recipe(recipe), tmp_path) == recipe
    assert parse_yaml(dump_yaml({"a": float("inf"), "b": True, "c": None})) == {"a": float("inf"), "b": True, "c": None}


@pytest.mark.parametrize("text", [EXAMPLE.read_text(encoding="utf-8"), FULL], ids=["example", "full"])
def test_a_recipe_with_accidents_is_a_recipe_or_one_line(text: str, tmp_path: Path) -> None:
    recipe_from(text, tmp_path)  # which without them is one
    draw, accepted = random.Random(0), 0
    for _ in range(300):
        damaged = text
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(len(damaged) + 1)
            end = start + draw.choice([0, 0, 1, 2, 10])
            damaged = damaged[:start] + draw.choice(FRAGMENTS) + damaged[end:]
        outcome = recipe_or_line(damaged, tmp_path)
        if isinstance(outcome, Recipe):
            accepted += 1
            assert recipe_from(write_recipe(outcome), tmp_path) == outcome, damaged
        else:
            assert "\n" not in outcome, damaged
    assert 10 < accepted < 200
