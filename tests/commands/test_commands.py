"""The commands as a user meets them: what they write, what they print, and every wrong input in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from console import Outcome, optimum_cli
from optimum.streamline.methods import auto
from optimum.streamline.methods.protected_ends import ProtectedEndsMethod
from optimum.streamline.methods.registry import BUILT_IN
from optimum.streamline.recipe.healing import CHOOSING_TEXT
from optimum.streamline.recipe.recipe import JUDGING_TEXT
from optimum.streamline.reporting.model_card import CITATIONS
from reference import HEALED, LIBRARY, REFERENCE
from tiny import tiny_model

Cli = Callable[..., Outcome]
EXPORT = pytest.param(("export",), marks=pytest.mark.onnx)
QUICK = ("--calibration", "stdlib", "--samples", 4, "--length", 64)


CONFIGS = {
    "encoder": '{"model_type": "bert", "architectures": ["BertModel"]}',
    "null": "null",
    "impossible": '{"model_type": "llama", "num_hidden_layers": "x"}',
}


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return lambda *words: optimum_cli(monkeypatch, capsys, "streamline", *words)


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint with its tokenizer, broken in a named way."""

    def make(how: str) -> Path:
        folder = tmp_path / "broken"
        if how == "empty":
            folder.mkdir()
        elif how in CONFIGS:
            folder.mkdir()
            (folder / "config.json").write_text(CONFIGS[how])
        else:
            tiny_model(vocab_size=4096).save_pretrained(folder)
            AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
            file = folder / "model.safetensors"
            if how == "truncated":
                file.write_bytes(file.read_bytes()[:-100])
            if how == "nan":
                weights = load_file(file)
                weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
                save_file(weights, file, metadata={"format": "pt"})
        return folder

    return make


def assert_refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize("command", ["prune", "run"])
@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--remove", 0), "remove '0': that is 0 of 16 layers"),
        (("--remove", "100%"), "remove '100%': that is 16 of 16 layers"),
        (("--layers", 99), "there is no layer 99; the model has layers 0 to 15"),
        (
            ("--method", "shortgpd", "--remove", 4),
            "method 'shortgpd': unknown; known are auto, average",
        ),
        (("--remove", 4, "--samples", 100_000), "tokens, too short for 100096 windows of 512"),
        (("--remove", 4, "--length", 4096), "length 4096: the model reads at most 512 tokens"),
        (("--remove", 4, "--samples", "many"), "argument --samples: invalid int value: 'many'"),
        (("--remove", 4, "--calibration", "no/such.txt"), "'no/such.txt': no such file or folder"),
        (("--remove", 4, "--replace=mlp"), "unrecognized arguments: --replace=mlp"),
        (("--remove", 4, "--device", "tpu"), "device is 'tpu': Input should be 'cpu' or 'cuda'"),
        ((), "remove is missing"),
        (
            ("--remove", 15, "--replacement", "mlp", *HEALED, "--samples", 2, "--length", 32),
            "no layer with attention would be left",
        ),
        (
            ("--layers", "0-15", "--replacement", "mlp", *HEALED, "--samples", 2, "--length", 32),
            "no layer with attention",
        ),
        (("--remove", 4, "--seed", 10**22), "seed is 10000000000000000000000"),
        (("--remove", 4, "--calibration", "~nobody-of-that-name/text.txt"), "'~nobody-of-that-name/text.txt'"),
        (("--remove", 4, "--calibration", "hub:"), "'hub:': names no data set"),
    ],
)
def test_wrong_flags_are_one_line_and_nothing_is_written(
    cli: Cli, tmp_path: Path, command: str, flags: tuple[object, ...], part: str
) -> None:
    assert_refused(cli(command, "-m", REFERENCE, *LIBRARY[command], *flags, tmp_path / "out"), part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.onnx
@pytest.mark.parametrize("size", ["little", "-1GB", "GB", "1e400", "0", "5MKB"])
def test_a_size_that_is_none_is_refused(cli: Cli, tmp_path: Path, size: str) -> None:
    refused = cli("export", "-m", REFERENCE, f"--max-memory={size}", tmp_path / "out")
    assert_refused(refused, f"max-memory '{size}': must be a number of bytes, or a size such as 500MB or 1.5GB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("empty", "not a checkpoint folder"),
        ("encoder", "architecture 'bert': is not supported; supported are "),
        ("null", "cannot be read"),
        ("impossible", "cannot be read"),
        ("truncated", "not a safetensors file, or is incomplete"),
        ("nan", "weight model.layers.1.mlp.up_proj.weight holds NaN"),
    ],
)
@pytest.mark.parametrize(
    "command", [("prune", "--remove", 1, *HEALED), ("run", "--remove", 1, *HEALED), ("score",), EXPORT]
)
def test_wrong_models_are_one_line_and_nothing_is_written(
    cli: Cli, tmp_path: Path, broken: Callable[[str], Path], command: tuple[object, ...], how: str, part: str
) -> None:
    folder = broken(how)
    quick = () if command[0] == "export" else (*LIBRARY[str(command[0])], "--samples", 2, "--length", 32)
    assert_refused(cli(*command, "-m", folder, *quick, tmp_path / "out"), part)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_model_that_is_nowhere(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("prune", "-m", tmp_path / "none", "--remove", 1, tmp_path / "out"), "no such folder")


@pytest.mark.onnx
def test_outputs_that_exist_or_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    for command in (("prune", "--remove", 1, *HEALED), ("run", "--remove", 1, *HEALED), ("score",), ("export",)):
        words = (*command, "-m", REFERENCE, *LIBRARY[str(command[0])])
        if command[0] != "export":  # which reads no text here
            words += ("--calibration", tmp_path / "gone.txt")  # found out after the output
        assert_refused(cli(*words, tmp_path), "exists already")
        assert_refused(cli(*words, "--overwrite", tmp_path), "holds no output of this program")
        assert_refused(cli(*words, tmp_path / "kept.txt" / "out"), "cannot be written")
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]


def test_recipes_with_a_fault(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("remove: 4\nmetod: shortgpt\n")
    assert_refused(
        cli("run", "-m", REFERENCE, recipe, tmp_path / "out"), "recipe.yaml: unknown key 'metod'; did you mean method?"
    )
    assert_refused(cli("run", "-m", REFERENCE, tmp_path / "no.yaml", tmp_path / "out"), "no.yaml: cannot be read")
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_judging_on_the_calibration_text_is_refused(cli: Cli, tmp_path: Path) -> None:
    words = (
        *LIBRARY["run"],
        *HEALED,
        "--remove",
        4,
        "--samples",
        32,
        "--length",
        64,
        "--eval-data",
        "stdlib:calibration",
    )
    assert_refused(cli("run", "-m", REFERENCE, *words, tmp_path / "out"), "shares", "with 'stdlib:calibration'")
    assert list(tmp_path.iterdir()) == []


def test_score_writes_what_it_prints(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("score", "-m", REFERENCE, *QUICK, tmp_path / "out")
    assert outcome.code == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert len(scores["block_influence"]) == 16
    assert all(f"{value:.5f}" in outcome.out for value in scores["block_influence"])
    assert scores["calibration"]["windows"] == 4
    assert (tmp_path / "out" / "scores.svg").read_text().rstrip().endswith("</svg>")


def test_prune_takes_out_the_named_layers(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = cli("prune", "-m", REFERENCE, "--layers", "3,7,11-13", *QUICK, out)
    assert outcome.code == 0
    assert outcome.err == ""
    assert "remove layers 3, 7, 11-13: 16 layers become 11" in outcome.out
    record = json.loads((out / "streamline.json").read_text())
    assert record["removed"] == [3, 7, 11, 12, 13]
    assert [layer["originals"] for layer in record["layers"]] == [[i] for i in (0, 1, 2, 4, 5, 6, 8, 9, 10, 14, 15)]
    original, pruned = load_file(Path(REFERENCE) / "model.safetensors"), load_file(out / "model.safetensors")
    for new, [old] in enumerate(layer["originals"] for layer in record["layers"]):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(pruned[name.format(new)], original[name.format(old)])
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 11
    assert AutoTokenizer.from_pretrained(out)("def f():")["input_ids"]
    assert (out / "generation_config.json").is_file()
    assert "remove layers 3, 7, 11-13" in (out / "README.md").read_text()


def test_remove_is_the_net_fall_with_a_replacement(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--remove", 4, "--replacement", "mlp", *HEALED, "--heal-tokens", 640, *QUICK)
    assert cli("prune", "-m", REFERENCE, *words, out).code == 0
    config = json.loads((out / "config.json").read_text())
    record = json.loads((out / "streamline.json").read_text())
    assert config["num_hidden_layers"] == 12
    assert len(record["replaced"]) == 5
    [(index, entry)] = config["per_layer_config"].items()
    assert entry == {"skip": ["attention"]}
    assert record["layers"][int(index)] == {"layer": int(index), "originals": record["replaced"], "kind": "mlp"}
    assert not load_file(out / "model.safetensors")[f"model.layers.{int(index)}.self_attn.o_proj.weight"].any()
    [training] = record["healing"]
    assert (training["stage"], training["scope"]) == ("hidden-mse", "replacement")
    assert len(training["steps"]) == 9  # 10 windows, one held out, seen four times, in batches of 4
    assert training["settings"]["lr"] == pytest.approx(2e-4 * 4096 / 128)
    assert record["data"]["heal"]["spec"] == "stdlib:train"
    assert record["data"]["calibration"]["spec"] == "stdlib:calibration"


def test_the_card_says_what_each_training_saw(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--method", "come-mp", "--remove", 2, "--heal-tokens", 1344, "--heal-epochs", 1, *HEALED, *QUICK)
    assert cli("prune", "-m", REFERENCE, *words, out).code == 0
    trainings = [line for line in (out / "README.md").read_text().splitlines() if " was trained " in line]
    assert len(trainings) == 2  # 21 windows, one held out, half of the others after each merge
    for line in trainings:
        assert line.startswith(
            "The whole model was trained on 10 of 21 windows of 64 tokens of `stdlib:train`, each once"
        )
    record = json.loads((out / "streamline.json").read_text())
    assert [healed["windows"] for healed in record["healing"]] == [10, 10]
    assert record["removed"] == record["replaced"] == []
    assert record["merged"] == [layer["originals"] for layer in record["layers"] if layer["kind"] == "merged"] != []


@pytest.mark.parametrize(
    ("replacement", "in_plan", "mapped", "in_card"),
    [
        ("none", "", {}, ""),
        # A map for what adds nothing is the identity.
        (
            "linear",
            ", a linear map folded in before each gap",
            {"mapped": ["attention"]},
            ", a linear map in its attention",
        ),
    ],
)
def test_card_and_record_say_where_both_halves_of_a_packed_layer_come_from(
    cli: Cli, tmp_path: Path, replacement: str, in_plan: str, mapped: dict[str, list[str]], in_card: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    with torch.no_grad():  # two neighbours of two layers that do nothing: their removal is free
        model.model.layers[3].mlp.down_proj.weight.zero_()
        model.model.layers[4].self_attn.o_proj.weight.zero_()
    model.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    words = ("--method", "shifted", "--remove", 1, "--replacement", replacement, "--heal", "none", *QUICK)
    done = cli("prune", "-m", tmp_path / "source", *words, out)
    assert (done.code, done.err) == (0, "")
    record = json.loads((out / "streamline.json").read_text())
    edit = f"remove the attention of layers 4; remove the mlp of layers 3{in_plan}"
    assert record["plan"] == f"{edit}: 16 layers become 15"
    packed = {"layer": 3, "originals": [3, 4], "kind": "packed", "attention": 3, "mlp": 4}
    assert record["layers"][3] == packed | mapped
    assert (record["removed"], record["dead"]) == ([], {})
    assert f"| 3 | attention of 3, MLP of 4 | packed{in_card} |\n" in (out / "README.md").read_text()
    stock, ids = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=0)


def test_every_method_is_named_in_the_card_by_its_paper() -> None:
    assert CITATIONS.keys() == BUILT_IN.keys() - {"auto"}  # it cites the one it follows


@pytest.mark.onnx
@pytest.mark.parametrize(
    ("words", "spec"),
    [
        (("score", "-m", REFERENCE), CHOOSING_TEXT),
        (("prune", "-m", REFERENCE, "--remove", 1), CHOOSING_TEXT),
        (("prune", "-m", REFERENCE, "--remove", 1, "--calibration", "stdlib"), CHOOSING_TEXT),
        (("run", "-m", REFERENCE, "--remove", 1), JUDGING_TEXT),
        (("validate", REFERENCE, REFERENCE, "--output"), JUDGING_TEXT),
        (("export", "-m", REFERENCE, "--quantize", "int4-gptq"), CHOOSING_TEXT),
        (("orthogonality", "-m", REFERENCE, "--remove", 1, "--output"), JUDGING_TEXT),
    ],
)
def test_the_default_text_without_a_network_is_an_error_that_names_the_choices(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], spec: str
) -> None:
    def no_network(*_: object, **how: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    choices = "give a text file, a table (FILE[,COLUMN]), a folder of these, hub:DATASET"
    outcome = cli(*words, tmp_path / "out")
    assert_refused(outcome, f"text SPEC '{spec}': cannot be read (Name or service not known); {choices}", "or stdlib")
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_the_default_text(cli: Cli) -> None:
    told = " ".join(cli("run", "--help").out.split())
    assert told.count(f"(default: {CHOOSING_TEXT})") == 2
    assert told.count(f"(default: {JUDGING_TEXT})") == 1


def test_it_is_said_which_text_was_used_for_what(cli: Cli, tmp_path: Path) -> None:
    said = cli("score", "-m", REFERENCE, *QUICK).out
    assert re.search(
        r"^calibration text: stdlib:calibration, 4 windows of 64 tokens drawn from \d,\d{3} possible ones$", said, re.M
    )
    words = ("--replacement", "mlp", "--remove", 2, "--heal-tokens", 128, *HEALED, *QUICK, "--dry-run")
    said = cli("prune", "-m", REFERENCE, *words, tmp_path / "out").out
    assert "calibration text: stdlib:calibration, 4 windows of 64 tokens drawn from " in said
    assert "healing text: stdlib:train, 2 windows of 64 tokens drawn from " in said
    words = (REFERENCE, "--eval-samples", 2, "--length", 64, "--output", tmp_path / "report")  # twice: refused later
    said = cli("validate", REFERENCE, *LIBRARY["validate"], *words).out
    assert "evaluation text: stdlib:eval, 2 windows of 64 tokens drawn from " in said


def test_healing_that_would_be_passed_over_is_refused(cli: Cli, tmp_path: Path) -> None:
    words = ("--method", "shortgpt", "--remove", 2, "--heal-tokens", 1344, *QUICK)
    assert_refused(
        cli("prune", "-m", REFERENCE, *words, tmp_path / "out"), "heal-tokens 1344: has no effect with heal none"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "processes", "part"),
    [
        (("--heal-data", "no/such.txt"), 1, "'no/such.txt': no such file or folder"),
        (("--heal-data", "stdlib:eval", "--heal-tokens", 10**8), 1, "too short for 1562500 windows of 64"),
        (("--heal-tokens", 127), 1, "heal-tokens 127: must be at least two windows of 64 tokens, 128"),
        (("--method", "come-mp", "--heal-tokens", 256), 1, "3 windows to train on, too few for 4 trainings"),
        (("--heal-batch", 7), 2, "heal-batch 7: must be a multiple of the 2 processes"),
        (("--heal-tokens", 128, "--heal-epochs", 1), 2, "1 windows to train on, fewer than the 2 processes"),
    ],
)
def test_healing_that_cannot_be_is_refused_before_the_search(
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[object, ...],
    processes: int,
    part: str,
) -> None:
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # which several processes would leave set
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    outcome = cli("prune", "-m", REFERENCE, "--remove", 4, *HEALED, *QUICK, *flags, tmp_path / "out")
    assert_refused(outcome, part)
    assert "scoring" not in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_the_root_is_no_output(cli: Cli) -> None:
    for flags in ((), ("--overwrite",)):
        assert_refused(
            cli("prune", "-m", REFERENCE, "--remove", 4, *QUICK, *flags, "/"), "output /: contains the input "
        )


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            "ACCELERATE_MIXED_PRECISION 'bf16': must be 'no', because heal-dtype sets the precision",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "ACCELERATE_USE_DEEPSPEED 'true': must be 'false', because healing shares weights among processes by FSDP",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION '1': must be '2'"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP_VERSION '1': must be '2'"),
    ],
)
def test_a_launcher_that_wants_what_healing_does_not_do_is_refused(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], line: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcome = cli("prune", "-m", REFERENCE, "--method", "shortgpt", "--remove", 2, *QUICK, tmp_path / "out")
    assert_refused(outcome, line)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_alone_makes_nobody_a_helper(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    outcome = cli("prune", "-m", REFERENCE, "--method", "shortgpt", "--remove", 2, *QUICK, tmp_path / "out")
    assert outcome.code == 0
    assert "saved " in outcome.out
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.usefixtures("measured_once")
def test_dry_run_prints_every_plan_that_trials_would_choose_from(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "CANDIDATES", {name: auto.CANDIDATES[name] for name in ("shifted", "shortgpt iterative")})
    words = ("--remove", 1, *HEALED, "--heal-tokens", 640, "--calibration", "stdlib", "--samples", 2, "--length", 32)
    done = cli("prune", "-m", REFERENCE, *words, "--dry-run", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    said = done.out[done.out.index("trial trainings, which a dry run does not make") :]
    assert said.count("by shifted: ") == said.count("by shortgpt iterative: ") == 1
    assert said.count("ideal decode speed-up: ") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("measured_once")
def test_dry_run_prints_the_plan_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    words = ("--remove", "25%", "--replacement", "mlp", *HEALED, *QUICK, "--dry-run")
    outcome = cli("prune", "-m", REFERENCE, *words, tmp_path / "out")
    assert outcome.code == 0
    assert "by one mlp: 16 layers become 12" in outcome.out
    assert "ideal decode speed-up: 1." in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("measured_once")
def test_save_recipe_is_what_the_flags_amount_to(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    flags = ("--method", "shortgpt", "--remove", 2, *QUICK, "--max-kl", 0.5)
    assert cli("run", "-m", REFERENCE, *flags, "--dry-run", "--save-recipe", recipe, tmp_path / "out").code == 0
    assert recipe.read_text() == (
        "pruning:\n  method: shortgpt\n  remove: '2'\ncalibration:\n  data: stdlib\n  samples: 4\n"
        "evaluation:\n  data: hub:Salesforce/wikitext,wikitext-103-raw-v1,test\n"
        "budget:\n  max_kl: 0.5\nlength: 64\n"
    )
    again = cli("run", "-m", REFERENCE, recipe, "--dry-run", tmp_path / "out")
    assert again.code == 0
    assert "16 layers become 14" in again.out
    same = cli("run", "-m", REFERENCE, *flags, "--dry-run", "--save-recipe", recipe, tmp_path / "out")
    assert same.code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("latin1", "latin1: exists already and is not this recipe; choose another"),
        ("folder", "folder: exists already and is not this recipe; choose another"),
        ("latin1/recipe.yaml", "latin1 cannot be written"),
        ("out/recipe.yaml", "one contains the other; choose another path"),
        (".", "one contains the other; choose another path"),
    ],
)
def test_a_recipe_that_cannot_be_saved_is_refused_before_any_work(
    cli: Cli, tmp_path: Path, name: str, part: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin1").write_bytes(b"r\xe9sum\xe9")
    words = ("--method", "shortgpt", "--remove", 2, *QUICK, "--save-recipe", tmp_path / name, tmp_path / "out")
    outcome = cli("prune", "-m", REFERENCE, *words)
    assert_refused(outcome, part)
    assert "loading" not in outcome.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--calibration", "no/such.txt"),
        ("--calibration", "no/such.txt", "--dry-run"),
        ("--heal", "lm", "--heal-data", "no/such.txt"),
        ("--overwrite",),  # of a folder with somebody else's file
    ],
)
@pytest.mark.parametrize("command", ["prune", "run"])
def test_bad_input_saves_no_recipe(cli: Cli, tmp_path: Path, command: str, flags: tuple[object, ...]) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    out.mkdir()
    if "--overwrite" in flags:
        (out / "not_ours.txt").touch()
    words = ("--method", "shortgpt", "--remove", 2, *LIBRARY[command], *QUICK, *flags, "--save-recipe", recipe, out)
    assert_refused(cli(command, "-m", REFERENCE, *words))
    assert not recipe.exists()


def test_a_recipe_is_saved_with_what_it_made(cli: Cli, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    outcome = cli("prune", "-m", REFERENCE, "--layers", 3, *QUICK, "--save-recipe", recipe, out)
    assert outcome.code == 0
    assert outcome.out.endswith(f"saved {out}\nrecipe written to {recipe}\n")
    text = recipe.read_text()
    assert text.startswith("pruning:\n  layers: '3'\ncalibration:\n  data: stdlib\n  samples: 4\n")
    assert text.endswith("\nlength: 64\n")


def test_the_help_says_what_each_method_protects(cli: Cli) -> None:
    text = " ".join(cli("prune", "--help").out.split())
    for name, method in BUILT_IN.items():
        if isinstance(method, ProtectedEndsMethod):
            assert f"{name}: {method.default_protect}" in text


def test_an_unknown_command_is_one_line(cli: Cli) -> None:
    assert_refused(cli("frobnicate"), "invalid choice: 'frobnicate'")


def test_half_precision_that_overflows_is_refused(cli: Cli, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=4096)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(tmp_path / "model")
    words = ("prune", "-m", tmp_path / "model", "--layers", 3, *QUICK)
    assert_refused(cli(*words, "--dtype", "fp16", tmp_path / "out"), "stored in torch.float16", "infinite")
    assert not (tmp_path / "out").exists()
    assert cli(*words, "--dtype", "bf16", tmp_path / "out").code == 0


def test_a_terminated_command_leaves_nothing(tmp_path: Path) -> None:
    words = ["optimum-cli", "streamline", "prune", "-m", REFERENCE, "--remove", "4", *LIBRARY["prune"], *HEALED]
    words.append(str(tmp_path / "out"))
    script = f"import sys; sys.argv = {words!r}; from optimum.commands.optimum_cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert "loading" in run.stdout.readline()
        run.terminate()
        _, err = run.communicate()
    assert (run.returncode, err) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_an_earlier_output(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("prune", "-m", REFERENCE, "--layers", 3, *QUICK, out).code == 0
    assert cli("prune", "-m", REFERENCE, "--layers", 5, *QUICK, "--overwrite", out).code == 0
    assert json.loads((out / "streamline.json").read_text())["removed"] == [5]


def test_validate_wants_an_original_and_a_candidate(cli: Cli, tmp_path: Path) -> None:
    words = ("validate", REFERENCE, tmp_path / "none", *LIBRARY["validate"], "--output", tmp_path / "report")
    assert_refused(cli(*words), "no such folder")
    assert_refused(cli("validate", REFERENCE), "the following arguments are required: candidate")
    assert list(tmp_path.iterdir()) == []


def test_other_commands_start_without_us() -> None:
    # Every optimum-cli command imports our register file: it must not bring torch with it.
    code = (
        "import sys; import optimum.commands.register.register_streamline;"
        "heavy = {'torch', 'transformers', 'optimum.streamline'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
