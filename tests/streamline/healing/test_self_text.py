"""Text that the original samples, to heal on: of the model's own distribution, kept, repeatable, and new to a judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from console import Outcome, optimum_cli
from optimum.streamline import StreamlineConfig, StreamlineError, Streamliner
from optimum.streamline.evaluation.contamination import refuse_seen_text
from optimum.streamline.healing import self_text
from optimum.streamline.healing.self_text import sample_text, self_text_folder, windows_at_once
from optimum.streamline.models.architectures import ARCHITECTURES
from optimum.streamline.text.prompts import Prompts
from optimum.streamline.text.windows import Windows
from reference import REFERENCE
from tiny import tiny_model

# In `tiny.py` token 0 ends a text.
END = 0


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(REFERENCE)
    return found


def prompts_of(*ids: tuple[int, ...], windows: int, length: int) -> Prompts:
    return Prompts("self", "prompts", ids, windows, length)


Sample = Callable[..., torch.Tensor]


@pytest.fixture
def sample(tokenizer: PreTrainedTokenizerBase) -> Sample:
    def sampled(model: PreTrainedModel, prompts: Prompts, seed: int = 0, folder: Path | None = None) -> torch.Tensor:
        options: dict[str, Any] = {"seed": seed, "source": "model", "notify": lambda _: None, "folder": folder}
        return sample_text(model, tokenizer, prompts, **options).ids

    return sampled


def test_each_token_comes_as_often_as_the_model_says_whatever_its_own_settings(sample: Sample) -> None:
    model = tiny_model()
    own = GenerationConfig(do_sample=True, top_k=2, temperature=0.1, repetition_penalty=9.0, min_new_tokens=5)
    own.eos_token_id, own.suppress_tokens = END, [7, 8, 9]
    model.generation_config = own
    before = own.to_dict()
    prompt = (5, 6, 7, 8)
    ids = sample(model, prompts_of(prompt, windows=3200, length=5))
    assert model.generation_config is own
    assert own.to_dict() == before
    assert (ids[:, :4] == torch.tensor(prompt)).all()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    found = ids[:, 4].bincount(minlength=len(expected)) / len(ids)
    assert expected.topk(2).values.sum() < 0.5  # so top-k would show
    # 3,200 draws from this very distribution are 0.06 from it on average, with little spread.
    assert (found - expected).abs().sum() / 2 < 0.1


def decided(architecture: str) -> PreTrainedModel:
    """A model that gives one token nearly all probability, so that what it samples is what it finds likeliest."""
    model = tiny_model(architecture, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1e4
    if getattr(model.config, "final_logit_softcapping", None):
        model.config.final_logit_softcapping = 1e6
    return model


def texts_in(window: list[int], prompts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """The texts of a window: each its prompt, and what follows up to the end of the text or of the window."""
    texts = []
    while window:
        prompt = next(each for each in prompts if window[: len(each)] == each[: len(window)])
        rest = window[len(prompt) :]
        size = rest.index(END) + 1 if END in rest else len(rest)
        texts.append((window[: len(prompt)], rest[:size]))
        window = rest[size:]
    return texts


# Where layers, positions and caches differ most; the others are slow.
DIFFERENT = {"llama", "gpt2", "gemma2", "opt"}


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each in DIFFERENT else pytest.mark.slow) for each in sorted(ARCHITECTURES)],
)
def test_texts_go_on_as_without_cache_batch_and_padding(architecture: str, sample: Sample) -> None:
    model = decided(architecture)
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15], [16], [17, 18, 19, 20]]
    # As long as the model reads: the padding of the shorter prompts must not push them beyond.
    windows = sample(model, prompts_of(*map(tuple, prompts), windows=6, length=64))
    assert windows.shape == (6, 64)
    for window in windows.tolist():
        for prompt, rest in texts_in(window, prompts):
            text = torch.tensor([prompt + rest])
            with torch.no_grad():
                logits = model(text).logits[0, len(prompt) - 1 : -1]
            taken = logits.gather(1, torch.tensor(rest)[:, None])[:, 0]
            # Of two that are nearly as likely, rounding may have decided; they spread over thousands.
            assert (logits.max(-1).values - taken).max() < 20
            assert logits.std(-1).min() > 1000


def test_where_a_text_ends_the_next_prompt_follows(sample: Sample) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(40))  # nearly every third token
    prompts = [[50, 51, 52], [60, 61]]
    windows = sample(model, prompts_of(*map(tuple, prompts), windows=3, length=30)).tolist()
    for window in windows:
        places = [at for at, token in enumerate(window[:-3]) if token < 40]
        assert places
        for at in places:
            assert any(window[at + 1 : at + 1 + len(prompt)] == prompt for prompt in prompts)
    starts = [window[0] for window in windows]
    assert starts == [50, 60, 50]  # in turn, and again where there are too few


def test_the_seed_decides_the_text(sample: Sample) -> None:
    model, prompts = tiny_model(), prompts_of((3, 4), (5, 6), windows=5, length=12)
    torch.manual_seed(1)
    first, drawn = sample(model, prompts), torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn  # no other random number of the program changes
    assert torch.equal(sample(model, prompts), first)
    assert not torch.equal(sample(model, prompts, seed=1), first)
    assert len({tuple(row) for row in first[:, 2:].tolist()}) == 5


class Stop(Exception):
    """The power went off."""


def test_an_interrupted_sampling_goes_on_where_it_was(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "MAX_BATCH", 2)
    model, prompts = tiny_model(), prompts_of((3, 4), (5, 6), windows=6, length=12)
    whole = sample(model, prompts)
    generate, calls = model.generate, list[int]()

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:
            raise Stop
        return generate(*arguments, **options)

    model.generate = failing
    with pytest.raises(Stop) as stopped, self_text_folder(tmp_path / "out") as folder:
        sample(model, prompts, folder=folder)
    assert folder == tmp_path / ".out.self-text"
    assert f"sampled text kept in {folder}: the same command uses it again" in stopped.value.__notes__
    with self_text_folder(tmp_path / "out"):
        assert torch.equal(sample(model, prompts, folder=folder), whole)
        assert len(calls) >= 4
        calls.clear()
        assert torch.equal(sample(model, prompts, folder=folder), whole)
        assert not calls  # nothing is sampled again
        calls.extend(range(10))
        assert not torch.equal(sample(model, replace(prompts, ids=((9, 9),)), folder=folder), whole)
    assert not folder.exists()


def test_the_memory_of_the_cache_decides_how_many_are_sampled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()  # 5 layers, 2 key-value heads of 8, keys and values, in fp32: 640 bytes a token
    assert windows_at_once(model, 64) == self_text.MAX_BATCH
    monkeypatch.setattr(self_text, "MIN_CACHE_BYTES", 1)
    weights = sum(value.numel() * 4 for value in model.parameters())
    assert windows_at_once(model, 64) == weights // (640 * 64) > 1
    assert windows_at_once(model, 10**6) == 1
    monkeypatch.setattr(self_text, "MIN_CACHE_BYTES", 640 * 64 * 30)
    assert windows_at_once(model, 64) == 30


TEXT = " ".join(f"word{number % 97} of{number % 89}" for number in range(4000))
RECIPE: dict[str, Any] = {"layers": "1", "heal": "lm", "heal_tokens": 640, "heal_epochs": 1, "samples": 4, "length": 64}


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and a text to calibrate on, `text.txt`."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    flags = [word for key, value in RECIPE.items() for word in (f"--{key.replace('_', '-')}", value)]
    flags += ["--calibration", model / "text.txt"]
    return lambda command, *words: optimum_cli(monkeypatch, capsys, "streamline", command, "-m", model, *flags, *words)


def healed_on(out: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((out / "streamline.json").read_text())["data"]["heal"]
    return data


def sampled_by(model: Path) -> Windows:
    """The healing text of `RECIPE`, from Python."""
    streamliner = Streamliner.from_pretrained(model)
    config = StreamlineConfig(**RECIPE, heal_data="self", calibration=str(model / "text.txt"))
    streamliner.prune(config).heal()
    prepared = streamliner._pruned.prepared  # type: ignore[union-attr]
    assert isinstance(prepared.heal_text, Windows)
    return prepared.heal_text


def refuse(*_: object) -> None:
    raise AssertionError("sampled")


def test_a_command_heals_on_it_and_a_resumed_one_samples_nothing(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"

    def fail(*_: object) -> None:
        raise StreamlineError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("optimum.streamline.pipeline.write_checkpoint.save_model", fail)
        stopped = cli("prune", "--heal-data", "self", out)
    assert stopped.code == 2
    assert f"sampled text kept in {tmp_path}/.out.self-text: the same command uses it again\n" in stopped.err
    with monkeypatch.context() as patched:
        patched.setattr("optimum.streamline.healing.self_text._Sampler.texts", refuse)
        resumed = cli("prune", "--heal-data", "self", out)
    assert (resumed.code, resumed.err) == (0, "")
    text = f"{model}/text.txt"
    start = f"windows of 64 tokens that the original samples from 10 prompts of 16 tokens of {text}\n"
    assert f"healing text: self, 10 {start}" in resumed.out
    assert f"continuing from the text sampled before, in {tmp_path}/.out.self-text" in resumed.out
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]
    data = healed_on(out)
    assert (data["spec"], data["windows"], data["length"]) == ("self", 10, 64)
    assert data["sampled"]["from"] == text
    card = (out / "README.md").read_text()
    assert "of 10 windows of 64 tokens that the original sampled at temperature 1 from prompts of `text.txt`" in card
    assert cli("prune", "--heal-data", "self", again).code == 0
    windows = sampled_by(model)
    assert healed_on(again)["fingerprint"] == data["fingerprint"] == windows.fingerprint
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (out / weights).read_bytes()
    with pytest.raises(StreamlineError, match="'copy' shares .* with 'self', which is used to make the model"):
        refuse_seen_text(str(out), replace(windows, spec="copy"))


@pytest.mark.usefixtures("measured_once")
def test_a_dry_run_samples_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum.streamline.healing.self_text._Sampler.texts", refuse)
    assert cli("prune", "--heal-data", "self", "--dry-run", tmp_path / "out").code == 0


@pytest.mark.usefixtures("untimed")
def test_a_whole_run_resumes_and_text_that_the_model_has_by_heart_is_refused(
    cli: Cli, model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("def main\nimport os\n")
    words = ["--heal-data", f"self:{prompts}", "--eval-samples", 4]
    assert cli("run", *words, "--eval-data", "stdlib", out).code == 0
    again = cli("run", *words, "--eval-data", "stdlib", out)
    assert f"{out} exists already: continuing from it" in again.out
    assert "sampling" not in again.out
    prompts.write_text("class\n")
    other = cli("run", *words, "--eval-data", "stdlib", out)
    assert other.code == 2
    assert f"error: output {out}: healed on text that was sampled from other prompts" in other.err

    known = tmp_path / "known.txt"
    known.write_text("\n\n".join(tokenizer.batch_decode(sampled_by(model).ids)).replace("\0", ""))
    refused = cli("run", "--heal-data", "self", "--eval-samples", 4, "--eval-data", known, tmp_path / "new")
    assert refused.code == 2
    assert f"error: eval-data '{known}' shares " in refused.err
    assert "with 'self', which is used to make the model" in refused.err


def test_a_model_in_memory_samples_and_stays_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    original = AutoModelForCausalLM.from_pretrained(REFERENCE)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    settings = original.generation_config.to_dict()
    streamliner = Streamliner.from_pretrained(original, tokenizer=tokenizer)
    text = str(Path(REFERENCE).parent / "train_reference_model.py")
    streamliner.prune(StreamlineConfig(layers="5-8", calibration=text, length=64))
    streamliner.heal(StreamlineConfig(heal="distill", heal_data="self", heal_tokens=640, heal_epochs=1))
    record = streamliner.record
    assert record is not None
    assert record["data"]["heal"]["sampled"]["prompts"] == 10
    assert record["seconds"]["sample"] > 0
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert original.generation_config.to_dict() == settings


@pytest.mark.slow
def test_two_processes_heal_on_the_same_text(cli: Cli, model: Path, tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert cli("prune", "--heal-data", "self", alone).code == 0
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    words += ["-m", "optimum.commands.optimum_cli", "streamline", "prune", "-m", str(model), "--heal-data", "self"]
    words += [str(word) for key, value in RECIPE.items() for word in (f"--{key.replace('_', '-')}", value)]
    words += ["--calibration", str(model / "text.txt"), str(both)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("sampling ") == 1
    assert healed_on(both)["fingerprint"] == healed_on(alone)["fingerprint"]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["alone", "both"]
