"""`ci/bench gpu`: its arithmetic, its page, and the whole of it on a tiny model without a GPU."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

CI = Path(__file__).parents[1] / "ci"
LIMITS = {"copy_bytes_per_second": 4e12, "read_bytes_per_second": 3e12, "bf16_flops_per_second": 8e14}
CPU = torch.device("cpu")

Importer = Callable[[str], Any]


@pytest.fixture
def ci(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module as the scripts in ci/ import each other."""
    monkeypatch.syspath_prepend(str(CI))
    return importlib.import_module


def row(**fields: Any) -> dict[str, Any]:
    return {"shape": "s", "weights": "bf16", "phase": "decode", "batch": 1, "runtime": "eager", **fields}


@pytest.mark.parametrize("name", ["gpu_cases", "gpu_measure"])
def test_the_examples_in_the_docstrings(ci: Importer, name: str) -> None:
    result = doctest.testmod(ci(name))
    assert result.attempted
    assert not result.failed


def test_the_cases(ci: Importer) -> None:
    cases = ci("gpu_cases")
    made = cases.make_cases(cases.FULL, "cuda", "tensorrt")
    # Of two shapes and three kinds of weights: prefill and decode at two batches, and bf16's graphs; of one, engines.
    assert len({case.name for case in made}) == len(made) == 2 * 3 * 4 + 2 * 2 + 3
    engines = [(case.shape, case.phase, case.batch) for case in made if case.weights == "tensorrt"]
    assert engines == [("llama-3.2-1b", *each) for each in (("prefill", 1), ("decode", 1), ("decode", 16))]
    assert {(case.weights, case.phase) for case in made if case.runtime == "cuda-graph"} == {("bf16", "decode")}
    assert cases.make_cases(cases.FULL, "cpu", "tensorrt") == [case for case in made if case.runtime != "cuda-graph"]
    # What a failed capture spoils is no other case's.
    of_bf16 = [case.runtime for case in made if case.model == ("llama-2-7b", "bf16")]
    assert of_bf16 == ["eager"] * 4 + ["cuda-graph"] * 2
    assert all(cases.kept_layers(shape) == 24 for shape in cases.SHAPES.values())


def test_the_cache_has_room_for_every_step(ci: Importer) -> None:
    cases = ci("gpu_cases")
    for plan in (cases.FULL, cases.SMOKE):
        assert 1 + plan.decode_warm + plan.decode_rounds <= plan.room
        assert plan.prompt + plan.room <= 4096


def test_the_limit_of_decode_is_what_it_reads(ci: Importer) -> None:
    cases = ci("gpu_cases")
    case = cases.Case("llama-3-8b", "bf16", "decode", 16, "eager")
    # 8 heads of 128 numbers, keys and values, in 2 bytes, in 32 layers, of 16 sequences of 2048 tokens.
    read = 15_000_000_000 + 8 * 128 * 2 * 2 * 32 * 16 * 2048
    assert cases.ideal_ms(case, cases.FULL, 32, 15_000_000_000, LIMITS) == pytest.approx(1000 * read / 4e12)


def test_the_limit_of_prefill_is_what_it_computes(ci: Importer) -> None:
    cases = ci("gpu_cases")
    case = cases.Case("llama-2-7b", "bf16", "prefill", 1, "eager")
    # 6.476e9 weights in layers; attention adds 1.1e12, one token's logits next to nothing.
    flops = cases.ideal_ms(case, cases.FULL, 32, 0, LIMITS) * 8e14 / 1000
    assert flops == pytest.approx(2 * 6.476e9 * 2048 + 1.1e12 + 2.6e8, rel=1e-3)


def test_a_row_is_held_against_the_limits(ci: Importer) -> None:
    cases, measure = ci("gpu_cases"), ci("gpu_measure")
    case = cases.Case("llama-2-7b", "bf16", "decode", 1, "eager")
    kinds = {"dense": (32, 12_000_000_000, 8.0), "pruned": (24, 9_000_000_000, 6.5)}
    measured = {
        name: {"decoder_layers": layers, "read_weight_bytes": read, "ms": [0.0, ms, 9.0]}
        for name, (layers, read, ms) in kinds.items()
    }
    measure.against_limits(measured, case, cases.FULL, LIMITS)
    dense, pruned = (read + layers * 2**25 for layers, read, _ in kinds.values())
    assert measured["dense"]["share_of_limit"] == pytest.approx(dense / 4e12 / 8e-3)
    assert measured["ideal_dense_over_pruned"] == pytest.approx(dense / pruned)


def test_runs_take_turns(ci: Importer) -> None:
    measure, order = ci("gpu_measure"), []
    runs = [measure.Run(lambda: order.append("a"), lambda: order.append("-")), measure.Run(lambda: order.append("b"))]
    taken = measure.timed_in_turns(runs, CPU, 3)
    assert "".join(order) == "-ab-ab-ab"
    assert [len(each) for each in taken] == [3, 3]


def test_the_table_of_the_page(ci: Importer) -> None:
    dense = {"ms": [3.0, 4.0, 5.5], "tokens_per_second": 1234.5, "peak_bytes": 7_364_224_000, "share_of_limit": 0.876}
    pruned = {"ms": [2.0, 3.0, 3.5], "tokens_per_second": 1600.0, "peak_bytes": None}
    rows = [
        row(dense=dense, pruned=pruned, dense_over_pruned=[1.25, 1.33, 1.4], ideal_dense_over_pruned=1.31),
        row(runtime="cuda-graph", error="RuntimeError: a|b"),
        row(not_run="the time given was over"),
    ]
    assert ci("gpu_page").table(rows)[2:] == [
        "| bf16 | decode, batch 1 | dense | 4.00 [3.00, 5.50] | 1,234 | 88 % | 7.36 GB |  |  |",
        "| bf16 | decode, batch 1 | pruned | 3.00 [2.00, 3.50] | 1,600 |  |  | 1.33 [1.25, 1.40] | 1.31 |",
        "| bf16 | decode, batch 1, CUDA graph |  | failed: RuntimeError: a\\|b |  |  |  |  |  |",
        "| bf16 | decode, batch 1 |  | not run: the time given was over |  |  |  |  |  |",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "no CUDA device here"),
        (["--device", "cpu", "--smoke", "--only", "no such case"], "no case's name holds 'no such case'"),
        (["--page"], "no figures in"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    ci: Importer, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert ci("bench_gpu").main([*arguments, "--out", str(tmp_path / "gpu.json")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--smoke"], ["--only", "bf16"]])
def test_the_documentation_has_figures_of_every_case_only(ci: Importer, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        ci("bench_gpu").main(arguments)


def test_without_time_nothing_is_run(ci: Importer, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert ci("bench_gpu").main(["--device", "cpu", "--smoke", "--minutes", "0", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 15
    assert all(each["not_run"] and "dense" not in each for each in rows)


def test_a_failing_case_leaves_the_others(ci: Importer, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, cases = ci("bench_gpu"), ci("gpu_cases")
    measure = bench.measure

    def failing(case: Any, *rest: Any) -> dict[str, Any]:
        if case.phase == "prefill":
            try:
                raise RuntimeError("out of luck\nand a long explanation")
            finally:
                raise ValueError("what came of it")
        taken: dict[str, Any] = measure(case, *rest)
        return taken

    monkeypatch.setattr(bench, "measure", failing)
    wanted = [case for case in cases.make_cases(cases.SMOKE, "cpu", "onnxruntime") if case.weights == "bf16"]
    rows = list(bench.measured_here(wanted, cases.SMOKE, CPU, math.inf))
    assert ["dense" in each for each in rows] == [False, False, True, True]
    assert [each.get("error") for each in rows] == ["RuntimeError: out of luck"] * 2 + [None] * 2


def test_a_process_that_ends_early_is_said_to_have(ci: Importer, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, cases = ci("bench_gpu"), ci("gpu_cases")
    monkeypatch.setattr(bench, "_send_all", os.abort)  # it takes no arguments: the process fails at once
    wanted = cases.make_cases(cases.SMOKE, "cpu", "onnxruntime")[:2]
    rows = list(bench.measured_apart(wanted, cases.SMOKE, CPU, 0.0))
    assert rows == [{"error": "its process ended with exit code 1"}] * 2


def test_the_weights_are_what_they_are_said_to_be(ci: Importer) -> None:
    cases, models = ci("gpu_cases"), ci("gpu_models")
    model = models.build(cases.SMOKE.shapes["tiny"], "bf16", CPU)["dense"]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(models.DEVIATION, rel=0.05)
    stored, read = models.weight_bytes(model)
    # Embedding and output layer, then a layer's products and its two norms, and the last norm.
    assert stored - read == 128 * 64 * 2
    assert read == 2 * (128 * 64 + 4 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64)


def test_no_activation_is_multiplied_apart(ci: Importer) -> None:
    models = ci("gpu_models")
    torch.manual_seed(0)
    normed = torch.randn(256, 4096)  # what enters an MLP of the full width
    gate, up = (normed @ (models.DEVIATION * torch.randn(4096, 512)) for _ in range(2))
    assert (torch.nn.functional.silu(gate) * up).abs().max().item() < models.THRESHOLD


def test_the_pruned_model_is_the_first_layers_of_the_dense_one(ci: Importer) -> None:
    cases, models = ci("gpu_cases"), ci("gpu_models")
    made = models.build(cases.SMOKE.shapes["tiny"], "bf16", CPU)
    dense, pruned = made["dense"], made["pruned"]
    assert [id(layer) for layer in pruned.model.layers] == [id(layer) for layer in dense.model.layers[:3]]
    assert {id(weight) for weight in pruned.parameters()} < {id(weight) for weight in dense.parameters()}
    tokens = torch.arange(10)[None]
    with torch.inference_mode():
        answer = pruned(tokens).logits
        dense.model.layers = dense.model.layers[:3]
        assert torch.equal(dense(tokens).logits, answer)


def test_a_step_is_of_the_token_behind_those_the_cache_counts(ci: Importer) -> None:
    cases, measure = ci("gpu_cases"), ci("gpu_measure")
    case = cases.Case("tiny", "bf16", "decode", 2, "eager")
    # In fp32, where the two ways to the same logits differ by less than two positions do.
    model = ci("gpu_models").build(cases.SMOKE.shapes["tiny"], "bf16", CPU)["dense"].float()
    with torch.inference_mode():
        step, cache = measure._decode_step(case, model, cases.SMOKE, CPU)
        first, second = step(), step()
        measure._set_position(cache, cases.SMOKE.prompt)
        torch.testing.assert_close(step(), first)
        torch.testing.assert_close(step(), second)
    assert not torch.equal(first, second)


def test_nothing_in_a_step_asks_the_device_for_a_number(ci: Importer) -> None:
    """A CUDA graph could not be captured of it."""

    called: set[str] = set()

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    cases, measure = ci("gpu_cases"), ci("gpu_measure")
    model = ci("gpu_models").build(cases.SMOKE.shapes["tiny"], "bf16", CPU)["dense"]
    with torch.inference_mode():
        step, _ = measure._decode_step(cases.Case("tiny", "bf16", "decode", 2, "eager"), model, cases.SMOKE, CPU)
        with Listener():
            step()
    assert "index_copy_" in called
    assert not called & {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"}


@pytest.mark.gpu
@pytest.mark.quantizers
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_captured_step_answers_as_the_eager_one(ci: Importer, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert ci("bench_gpu").main(["--smoke", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    measured = [(each["runtime"], each[layers]) for each in results["rows"] for layers in ("dense", "pruned")]
    graphs = [figures for runtime, figures in measured if runtime == "cuda-graph"]
    assert len(graphs) == 4
    assert all(figures["graph_max_difference"] <= 0.05 * figures["largest_logit"] for figures in graphs)
    # The memory of an export is not torch's to measure.
    in_torch = [figures for runtime, figures in measured if runtime != "export"]
    assert all(figures["peak_bytes"] > figures["weight_bytes"] for figures in in_torch)
    assert results["machine"]["gpu"]


@pytest.mark.slow
@pytest.mark.quantizers
def test_the_whole_run_on_a_tiny_model(ci: Importer, tmp_path: Path) -> None:
    bench, out = ci("bench_gpu"), tmp_path / "gpu.json"
    code = bench.main(["--device", "cpu", "--smoke", "--out", str(out)])
    results = json.loads(out.read_text())
    assert [each["error"] for each in results["rows"] if "error" in each] == []
    assert code == 0
    assert len(results["rows"]) == 15
    assert results["machine"]["bitsandbytes"]
    assert all(value > 0 for value in results["limits"].values())
    for each in results["rows"]:
        for layers, count in (("dense", 4), ("pruned", 3)):
            assert each[layers]["decoder_layers"] == count
            assert 0 < each[layers]["ms"][0] <= each[layers]["ms"][1] <= each[layers]["ms"][2]
            assert each[layers]["share_of_limit"] > 0
        assert each["dense_over_pruned"] == sorted(each["dense_over_pruned"])
        assert each["ideal_dense_over_pruned"] > 1
    by_kind = {each["weights"]: each["dense"]["read_weight_bytes"] for each in results["rows"]}
    assert by_kind["bf16"] > by_kind["bnb-int8"] > by_kind["bnb-nf4"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]

    assert bench.main(["--page", "--out", str(out)]) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert "## tiny" in page
    assert page.count("\n| bnb-nf4 | decode, batch 2 | pruned |") == 1
    assert page.count("\n| onnxruntime | decode, batch 2 | pruned |") == 1


def test_an_engine_is_measured_where_there_is_its_library(ci: Importer, monkeypatch: pytest.MonkeyPatch) -> None:
    runtimes, there = ci("gpu_runtimes"), set[str]()
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: name in there or None)
    assert runtimes.runtime_here("cuda") == "onnxruntime"
    there.add("tensorrt_rtx")
    assert runtimes.runtime_here("cuda") == "tensorrt-rtx"
    there.add("tensorrt")
    assert runtimes.runtime_here("cuda") == "tensorrt"
    assert runtimes.runtime_here("cpu") == "onnxruntime"


def test_a_full_cache_is_filled_anew(ci: Importer) -> None:
    """Rounds may be more than a cache has room for."""
    cases, measure, runtimes = ci("gpu_cases"), ci("gpu_measure"), ci("gpu_runtimes")
    lengths: list[int] = []

    class Runner:
        def prefill(self, ids: Any) -> tuple[None, int]:
            return None, ids.shape[1]

        def decode(self, ids: Any, cache: int) -> tuple[None, int]:
            lengths.append(cache + 1)
            return None, cache + 1

    case = cases.Case("tiny-exported", "onnxruntime", "decode", 1, cases.EXPORT)
    run = measure._exported_decode(case, runtimes.Exported(Runner(), 4, 0, 0), cases.SMOKE, CPU)
    for _ in range(20):
        run.prepare()
        run.step()
    full = cases.SMOKE.prompt + cases.SMOKE.room
    assert lengths == [*range(17, full + 1), *range(17, full + 1), *range(17, 21)]
