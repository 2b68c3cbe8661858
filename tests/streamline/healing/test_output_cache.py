"""The cache of the original's outputs: what it holds, how often the original runs, and what trainings make of it."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from console import optimum_cli
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing import output_cache as cache_module
from optimum.streamline.healing import stages
from optimum.streamline.healing.losses import Distillation, outputs_of
from optimum.streamline.healing.output_cache import CACHE_FOLDER, CacheForm, OutputCache, cache_form, output_cache
from optimum.streamline.healing.settings import HealSettings
from optimum.streamline.healing.stages import Healer
from optimum.streamline.healing.trainable_parts import train_model
from optimum.streamline.healing.trials import Trials
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.system import disk
from optimum.streamline.text.windows import BATCH, Windows
from reference import REFERENCE
from tiny import LAYERS, tiny_model, token_ids

TEXT = Windows(token_ids(24, 16, seed=5), "random")
FULL = CacheForm("full")


@pytest.fixture
def runs() -> tuple[PreTrainedModel, list[int]]:
    """A model, and the number of windows of each of its forward passes. Passes of its copies do not count."""
    model, counts = tiny_model(), list[int]()

    def count(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if module is model:
            counts.append(len(kwargs["input_ids"]))

    model.register_forward_pre_hook(count, with_kwargs=True)
    return model, counts


def test_it_gives_what_the_model_gives_and_the_model_runs_once(
    runs: tuple[PreTrainedModel, list[int]], tmp_path: Path
) -> None:
    model, counts = runs
    cache = OutputCache(tmp_path, TEXT, model.config, FULL, hidden=True)
    for order in (torch.arange(24), torch.randperm(24, generator=torch.Generator().manual_seed(1))):
        for places in order.split(4):
            ids = TEXT.ids[places]
            found, states = cache.outputs(model, ids, [3, 0, 3])
            expected, layers = outputs_of(copy.deepcopy(model), ids, [3, 0])
            assert torch.equal(found.logits, expected.logits)
            assert states.keys() == layers.keys()
            assert all(torch.equal(states[number], layers[number]) for number in layers)
    assert sum(counts) == 24


@pytest.mark.parametrize("form", [CacheForm("top", 5), CacheForm("sample", 9)])
def test_fewer_tokens_are_those_of_the_model(form: CacheForm, tmp_path: Path) -> None:
    model, ids = tiny_model(), TEXT.ids[:4]
    log_probabilities = outputs_of(model, ids, [])[0].logits.log_softmax(-1)
    # The draws of a window are the same in any batch.
    caches = [OutputCache(tmp_path / name, TEXT, model.config, form, hidden=False, seed=2) for name in ("a", "b")]
    whole, _ = caches[0].outputs(model, ids, [])
    alone, _ = caches[1].outputs(model, ids[2:3], [])
    assert torch.equal(whole.tokens[2:3], alone.tokens)
    assert whole.tokens.shape == (4, 16, form.tokens)
    if form.kind == "top":
        assert torch.equal(whole.tokens, log_probabilities.topk(5).indices)
        assert torch.equal(whole.log_probabilities, log_probabilities.topk(5).values)
    else:
        expected = -(log_probabilities.exp() * log_probabilities).sum(-1)
        torch.testing.assert_close(whole.entropy, expected)
        drawn = log_probabilities.gather(-1, whole.tokens)
        assert float((drawn.mean(-1) + whole.entropy).mean().abs()) < 0.3
        other = OutputCache(tmp_path / "c", TEXT, model.config, form, hidden=False, seed=3).outputs(model, ids, [])[0]
        assert not torch.equal(whole.tokens, other.tokens)


def test_an_interrupted_run_computes_nothing_twice(runs: tuple[PreTrainedModel, list[int]], tmp_path: Path) -> None:
    model, counts = runs
    first = OutputCache(tmp_path, TEXT, model.config, FULL, hidden=True)
    for ids in TEXT.ids[:8].split(4):
        first.outputs(model, ids, [1])
    # Killed while it wrote a batch: the windows are not marked as done.
    first._arrays["logits"][8:12] = 7
    again = OutputCache(tmp_path, TEXT, model.config, FULL, hidden=True)
    for ids in TEXT.ids.split(4):
        found, _ = again.outputs(model, ids, [1])
        assert torch.equal(found.logits, outputs_of(copy.deepcopy(model), ids, [])[0].logits)
    assert sum(counts) == 24


def write_array(dtype: str, *shape: int) -> Callable[[Path], None]:
    return lambda file: np.save(file, np.zeros(shape, dtype))


@pytest.mark.parametrize(
    "spoil",
    [
        write_array("<f4", 24, 16, 127),  # of another vocabulary
        write_array("<f2", 24, 16, 128),
        lambda file: file.write_bytes(b"not an array"),
        lambda file: os.truncate(file, 1000),
        Path.unlink,
    ],
)
def test_files_that_do_not_fit_are_made_anew(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    model = tiny_model()
    OutputCache(tmp_path / "cache", TEXT, model.config, FULL, hidden=True).outputs(model, TEXT.ids[:4], [])
    assert np.load(tmp_path / "cache" / "done.npy").sum() == 4
    assert np.load(tmp_path / "cache" / "logits.npy").shape == (24, 16, 128)
    OutputCache(tmp_path / "cache", TEXT, model.config, FULL, hidden=True)
    assert np.load(tmp_path / "cache" / "done.npy").sum() == 4
    spoil(tmp_path / "cache" / "logits.npy")
    OutputCache(tmp_path / "cache", TEXT, model.config, FULL, hidden=True)
    assert np.load(tmp_path / "cache" / "done.npy").sum() == 0
    assert np.load(tmp_path / "cache" / "logits.npy").shape == (24, 16, 128)


def test_only_windows_that_are_missing_are_computed(runs: tuple[PreTrainedModel, list[int]], tmp_path: Path) -> None:
    model, counts = runs
    cache = OutputCache(tmp_path, TEXT, model.config, FULL, hidden=False)
    for batch in ([0, 1], [1, 2, 0], [2, 2], [3, 3]):
        cache.outputs(model, TEXT.ids[batch], [])
    assert counts == [2, 1, 2]


def test_other_text_is_computed_and_not_kept(runs: tuple[PreTrainedModel, list[int]], tmp_path: Path) -> None:
    model, counts = runs
    cache = OutputCache(tmp_path, TEXT, model.config, FULL, hidden=True)
    ids = torch.cat([TEXT.ids[:1], token_ids(2, 16, seed=9)])
    found, states = cache.outputs(model, ids, [1])
    expected, layers = outputs_of(copy.deepcopy(model), ids, [1])
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(states[1], layers[1])
    cache.outputs(model, ids, [])
    assert counts == [3, 3]
    assert not np.load(tmp_path / "done.npy").any()


def test_any_seed_draws(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, TEXT, tiny_model().config, CacheForm("sample", 3), hidden=False, seed=2**63 - 1)
    assert cache.outputs(tiny_model(), TEXT.ids[:1], [])[0].tokens.shape == (1, 16, 3)


def test_a_training_with_it_ends_with_the_same_weights(runs: tuple[PreTrainedModel, list[int]], tmp_path: Path) -> None:
    original, counts = runs
    plan, text, weights = Plan(LAYERS, (1, 3)), TEXT.part(0, 21), []
    for outputs in (outputs_of, OutputCache(tmp_path, text, original.config, FULL, hidden=True).outputs):
        counts.clear()
        model = tiny_model()
        apply_plan(model, plan, None)
        goal = Distillation(partial(outputs, original), plan.depths, 1.0, 10.0)
        train_model(model, goal, text, HealSettings(1e-3, epochs=3, batch=4))
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert sum(counts) == 21  # each window once: those of the training, and one that is held out


def test_a_distillation_from_a_cache_keeps_no_copy_of_the_original(
    monkeypatch: pytest.MonkeyPatch, runs: tuple[PreTrainedModel, list[int]], tmp_path: Path
) -> None:
    plan, copies, weights = Plan(LAYERS, (1, 3)), list[str](), []
    copied = stages.copy_sharing_disk
    monkeypatch.setattr(stages, "copy_sharing_disk", lambda model: copies.append("copied") or copied(model))

    def healed(model: PreTrainedModel, cache: OutputCache | None, **fields: object) -> PreTrainedModel:
        copies.clear()
        recipe = make_recipe({"layers": "1,3", "heal": "distill", "heal_epochs": 2, "heal_replace": 0.0, **fields})
        healer = Healer(recipe, model, plan, TEXT, lambda _: None, cache=cache)
        healer.before_edit(None)
        apply_plan(model, plan, None)
        healer.after_edit(plan.new_layers)
        return model

    weights.append(healed(tiny_model(), None).state_dict())
    assert copies == ["copied"]
    model, counts = runs
    cache = OutputCache(tmp_path, TEXT, model.config, FULL, hidden=True)
    cache.outputs(model, TEXT.ids[3:6], [])  # an interrupted run has some
    weights.append(healed(model, cache).state_dict())
    assert copies == []
    assert counts[:7] == [3, *[BATCH] * 5, 1]  # some, then the others, before the model is edited and trained
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
    healed(tiny_model(), cache, heal_minutes=1.0)  # then the training may not reach all windows
    assert copies == ["copied"]
    healed(tiny_model(), cache, heal="local+distill")
    assert copies == ["copied"]
    healed(tiny_model(), cache, heal_replace=0.5)
    assert copies == ["copied"]


def test_the_original_runs_on_few_windows_at_once(
    monkeypatch: pytest.MonkeyPatch, runs: tuple[PreTrainedModel, list[int]], tmp_path: Path
) -> None:
    model, counts = runs
    cache = OutputCache(tmp_path, TEXT, model.config, FULL, hidden=True)
    cache.outputs(model, TEXT.ids[:2], [])
    monkeypatch.setattr("optimum.streamline.text.windows.LOGITS", 3 * 16 * 128 + 1)  # of three windows
    cache.complete(model)
    assert counts == [2, *[3] * 7, 1]
    cache.complete(model)
    found, states = cache.outputs(None, TEXT.ids, [2])
    expected, layers = outputs_of(model, TEXT.ids, [2])
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(states[2], layers[2])


def test_one_cache_serves_all_trials(runs: tuple[PreTrainedModel, list[int]], tmp_path: Path) -> None:
    model, counts = runs
    plans = [Plan(LAYERS, (layer,), chosen_by="shortgpt iterative") for layer in range(4)]
    found, ran = [], []
    for form in ("none", "full"):
        counts.clear()
        recipe = make_recipe({"method": "auto", "remove": 1, "heal_batch": 2, "heal_cache": form, "heal_kl": 1.0})
        with output_cache(recipe, TEXT, model.config, None, trials=True) as cache:
            trials = Trials(recipe, model, TEXT.part(0, 2), TEXT, lambda _: None, tmp_path / form, cache)
            found.append(trials.best(plans))
        ran.append(sum(counts))
    assert found[0] == found[1]
    compared = sum(len(results) for _, results in found[0].trials)  # each on one held-out window, which is not cached
    updates = math.ceil(46 * found[0].trials[-1][0])
    assert ran[1] == compared + 2 * updates + 1
    assert ran[0] > 2 * ran[1]


def test_by_default_all_outputs_are_kept_if_they_are_few_and_read_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, recipe = tiny_model().config, make_recipe({"method": "auto", "remove": 1})
    bytes_of_all = 24 * 16 * 4 * (config.vocab_size + config.num_hidden_layers * config.hidden_size) + 24
    free = SimpleNamespace(free=10**12)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: free)

    def form(workspace: Path | None = tmp_path / "not" / "there", trials: bool = False, **options: object) -> object:
        return cache_form(recipe.with_options(**options), TEXT, config, workspace, trials)

    assert form(trials=True) == FULL
    assert form() is None  # later passes read other tokens
    recipe = recipe.with_options(heal_replace=0.0)
    assert form() == FULL
    assert form(heal_epochs=1, trials=True) == FULL
    assert form(heal_epochs=1) is None
    assert form(heal="lm") is None
    assert form(heal_kl=0.0) is None
    assert form(workspace=None) is None
    assert form(workspace=None, heal_cache="sample-50") == CacheForm("sample", 50)
    assert form(heal_cache="none") is None
    monkeypatch.setattr(cache_module, "DEFAULT_BYTES", bytes_of_all)
    assert form() == FULL
    free.free = 2 * bytes_of_all - 2
    assert form() is None
    (tmp_path / CACHE_FOLDER).mkdir()  # an interrupted run has used the room
    assert form(workspace=tmp_path) == FULL
    free.free = 10**12
    monkeypatch.setattr(cache_module, "DEFAULT_BYTES", bytes_of_all - 1)
    assert form() is None
    assert form(heal_hidden=0.0) == form(heal_cache="full") == FULL


def test_too_small_a_disk_is_one_line_and_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        StreamlineError, match=r"^heal-cache: the outputs of the original take 0.0 GB in .*give heal-cache none, or"
    ):
        OutputCache(tmp_path / "cache", TEXT, tiny_model().config, FULL, hidden=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--heal-cache", "top-4096"), "heal-cache 'top-4096': the vocabulary has 4096 tokens; give full"),
        (("--heal-cache", "top"), "flags: heal-cache is 'top': must be none, full, top-K or sample-K, such as top-64"),
        (("--heal-cache", "full", "--heal", "none"), "heal-cache full: has no effect without heal distill; use it"),
    ],
)
def test_wrong_values_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    flags: tuple[str, ...],
    line: str,
) -> None:
    words = ("--method", "shortgpt", "--heal", "distill", "--remove", "1", "--calibration", "stdlib", "--samples", "1")
    words += ("--length", "16", "--heal-data", "stdlib", "--heal-tokens", "64", *flags)
    done = optimum_cli(monkeypatch, capsys, "streamline", "prune", "-m", REFERENCE, tmp_path / "out", *words)
    assert (done.code, done.err) == (2, f"error: {line}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_command_heals_by_what_it_keeps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    used: list[str] = []
    outputs = OutputCache.outputs
    monkeypatch.setattr(
        OutputCache, "outputs", lambda self, *args: used.append(self._form.kind) or outputs(self, *args)
    )
    words = (
        "--layers",
        "5",
        "--heal",
        "distill",
        "--heal-data",
        "stdlib",
        "--heal-tokens",
        "512",
        "--heal-epochs",
        "2",
    )
    words += ("--calibration", "stdlib", "--samples", "1", "--length", "32", "--heal-replace", "0")
    losses, kinds = {}, {}
    for form in (None, "none", "top-64", "sample-50"):
        used.clear()
        flags = () if form is None else ("--heal-cache", form)
        out = tmp_path / str(form)
        done = optimum_cli(monkeypatch, capsys, "streamline", "prune", "-m", REFERENCE, out, *words, *flags)
        assert (done.code, done.err) == (0, "")
        record = json.loads((out / "streamline.json").read_text())
        losses[form] = [step["loss"] for step in record["healing"][0]["steps"]]
        kinds[form] = set(used)
    assert kinds == {None: {"full"}, "none": set(), "top-64": {"top"}, "sample-50": {"sample"}}
    assert losses[None] == losses["none"]
    assert len(losses["none"]) > 5  # updates, each of which depends on all before it
    assert losses["top-64"][0] < losses["none"][0]
    assert losses["sample-50"][0] == pytest.approx(losses["none"][0], rel=0.2)
    assert len([*tmp_path.iterdir()]) == 4  # nothing stays beside the outputs


def test_a_disk_that_fills_meanwhile_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "posix_fallocate", full)
    with pytest.raises(StreamlineError, match=r"cannot write the outputs of the original to .* \(No space left on dev"):
        OutputCache(tmp_path / "cache", TEXT, tiny_model().config, FULL, hidden=True)
    assert not (tmp_path / "cache" / "done.npy").exists()


def test_a_file_system_that_cannot_reserve_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(disk.os, "posix_fallocate", unsupported)
    OutputCache(tmp_path / "cache", TEXT, tiny_model().config, FULL, hidden=True)
