"""The measurements of `ci/bench gpu`: the machine's limits, and the time and memory of each case.

Time on a GPU is taken with CUDA events. `RUNS` has one function per phase and runtime.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StaticCache

from gpu_cases import EXPORT, Case, Plan, ideal_ms
from gpu_models import release, weight_bytes
from gpu_runtimes import Exported

# The time limit of a case's rounds. A slow case gets fewer rounds, so that it leaves time for the others.
SECONDS_A_CASE = 8.0
FEWEST_ROUNDS = 5
# The largest difference between the logits of a CUDA graph and of eager mode, as a share of the largest logit.
GRAPH_TOLERANCE = 0.05


@dataclass(frozen=True)
class Run:
    """One thing to time.

    Args:
        step: The function to time.
        prepare: A function that is called before each step and is not timed.
        facts: Further figures for the row.
        holds: An object that the step needs but does not reference itself.
    """

    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    facts: Mapping[str, float] = field(default_factory=dict)
    holds: object = None


def measure_limits(plan: Plan, device: torch.device) -> dict[str, float]:
    """Measure the device's memory bandwidth and arithmetic speed.

    Returns:
        Bytes per second of a copy (read and written), bytes per second that a matrix-vector product reads, and
        floating-point operations per second of a bf16 matrix product.
    """
    source = torch.ones(plan.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_ms(lambda: target.copy_(source), device)
    matrix = torch.randn(plan.matrix, dtype=torch.bfloat16, device=device)
    vector = torch.randn(plan.matrix[1], dtype=torch.bfloat16, device=device)
    read = _median_ms(lambda: matrix @ vector, device)
    left, right = (torch.randn(plan.square, plan.square, dtype=torch.bfloat16, device=device) for _ in range(2))
    multiplied = _median_ms(lambda: left @ right, device)
    return {
        "copy_bytes_per_second": 2000 * plan.copied_bytes / copy,
        "read_bytes_per_second": 1000 * matrix.nbytes / read,
        "bf16_flops_per_second": 1000 * 2 * plan.square**3 / multiplied,
    }


def _median_ms(step: Callable[[], object], device: torch.device) -> float:
    timed_in_turns([Run(step)], device, 3)
    return statistics.median(timed_in_turns([Run(step)], device, 20)[0])


def timed_in_turns(runs: Sequence[Run], device: torch.device, rounds: int) -> list[list[float]]:
    """Time each run `rounds` times; the runs take turns, so that a change of the clock affects all of them.

    Returns:
        For each run, the milliseconds of each of its rounds.
    """
    marks = []
    for _ in range(rounds):
        for run in runs:
            run.prepare()
            begin = _mark(device)
            run.step()
            marks.append((begin, _mark(device)))
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = [begin.elapsed_time(end) if device.type == "cuda" else 1000 * (end - begin) for begin, end in marks]
    return [taken[first :: len(runs)] for first in range(len(runs))]


def _mark(device: torch.device) -> Any:
    """A point in time: on a GPU a CUDA event, which is recorded in its queue; otherwise seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event_class: Any = torch.cuda.Event  # torch has no type hints for it
    event = event_class(enable_timing=True)
    event.record()
    return event


def quartiles(taken: Sequence[float]) -> list[float]:
    """The first quartile, the median and the third quartile.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    [2.0, 3.0, 4.0]
    """
    return statistics.quantiles(taken, n=4, method="inclusive")


def affordable_rounds(round_ms: float, wanted: int, seconds: float = SECONDS_A_CASE) -> int:
    """The number of rounds that fit into a time limit: at most `wanted`, and otherwise at least `FEWEST_ROUNDS`.

    >>> affordable_rounds(10.0, 48), affordable_rounds(1000.0, 48), affordable_rounds(9000.0, 10)
    (48, 8, 5)
    """
    return min(wanted, max(FEWEST_ROUNDS, int(1000 * seconds / round_ms)))


def measure(case: Case, models: Mapping[str, Any], plan: Plan, device: torch.device) -> dict[str, Any]:
    """Time the dense and the pruned model in turns.

    Args:
        case: The case.
        models: The models by name: `dense` and `pruned`.
        plan: The sizes and numbers of rounds.
        device: The device.

    Returns:
        For each model its quartiles of milliseconds per round, tokens per second, and bytes; and the quartiles of the
        dense model's time over the pruned one's.
    """
    release()  # memory of an earlier case, if it were freed during this one, would make the peak look smaller
    with torch.inference_mode():
        runs, figures = {}, {}
        for layers, model in models.items():
            runs[layers], figures[layers] = _set_up(case, model, plan, device)
        taken = dict(zip(runs, _rounds(list(runs.values()), case, plan, device), strict=True))
    tokens = case.batch * (plan.prompt if case.phase == "prefill" else 1)
    for layers, milliseconds in taken.items():
        spread = quartiles(milliseconds)
        figures[layers] |= {"ms": spread, "tokens_per_second": 1000 * tokens / spread[1]}
    ratios = [dense / pruned for dense, pruned in zip(taken["dense"], taken["pruned"], strict=True)]
    return {"rounds": len(ratios), **figures, "dense_over_pruned": quartiles(ratios)}


def _set_up(case: Case, model: Any, plan: Plan, device: torch.device) -> tuple[Run, dict[str, Any]]:
    """Make the run of one model and run it once; returns the run, and the model's figures.

    Peak memory is the model's weights plus the most that was allocated during the run. The other model is in memory
    too, so that the two can take turns, and does not count.
    """
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    _forget_peak(device)
    run = RUNS[case.phase, case.runtime](case, model, plan, device)
    run.prepare()
    run.step()
    if isinstance(model, Exported):
        layers, stored, read = model.layers, model.stored, model.read
    else:
        layers, (stored, read) = len(model.model.layers), weight_bytes(model)
    return run, {
        "decoder_layers": layers,
        "weight_bytes": stored,
        "read_weight_bytes": read,
        # Torch does not count the memory of another runtime.
        "peak_bytes": stored + torch.cuda.max_memory_allocated() - before
        if on_gpu and case.runtime != EXPORT
        else None,
        **run.facts,
    }


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _rounds(runs: list[Run], case: Case, plan: Plan, device: torch.device) -> list[list[float]]:
    warm, wanted = plan.rounds(case.phase)
    once = sum(statistics.median(taken) for taken in timed_in_turns(runs, device, warm))
    return timed_in_turns(runs, device, affordable_rounds(once, wanted))


def against_limits(row: dict[str, Any], case: Case, plan: Plan, limits: dict[str, float]) -> None:
    """Add to the row each model's ideal time at the measured limits, the share reached, and the ideal speed-up."""
    for figures in (row["dense"], row["pruned"]):
        ideal = ideal_ms(case, plan, figures["decoder_layers"], figures["read_weight_bytes"], limits)
        figures |= {"ideal_ms": ideal, "share_of_limit": ideal / figures["ms"][1]}
    row["ideal_dense_over_pruned"] = row["dense"]["ideal_ms"] / row["pruned"]["ideal_ms"]


def _prefill(case: Case, model: Any, plan: Plan, device: torch.device) -> Run:
    """Prefill: the whole prompt into an empty cache; the logits of the last token only."""
    cache, step = _prompt_step(case, model, plan, device)
    step()  # allocates the cache's tensors, which `prepare` needs
    return Run(step, lambda: _set_position(cache, 0))


def _decode(case: Case, model: Any, plan: Plan, device: torch.device) -> Run:
    """Decode in eager mode: one token after another after the prompt."""
    step, _ = _decode_step(case, model, plan, device)
    return Run(step)


def _decode_graph(case: Case, model: Any, plan: Plan, device: torch.device) -> Run:
    """Decode as a CUDA graph: the step is captured once and replayed.

    The cache counts its tokens in a tensor on the device, and the step computes positions and mask from it. So each
    replay is the next token, without an update from Python.
    """
    step, cache = _decode_step(case, model, plan, device)
    stream_class: Any = torch.cuda.Stream  # torch has no type hints for it
    side = stream_class()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    _set_position(cache, plan.prompt)
    graph.replay()
    captured = logits.float()
    _set_position(cache, plan.prompt)
    eager = step().float()
    difference, largest = (captured - eager).abs().max().item(), eager.abs().max().item()
    if not difference <= GRAPH_TOLERANCE * largest:  # not `>`, because a NaN must fail
        raise RuntimeError(f"the captured step's logits differ from the eager ones by {difference:g} of {largest:g}")
    _set_position(cache, plan.prompt)
    facts = {"graph_max_difference": difference, "largest_logit": largest}
    # A graph has only the addresses of the token and the cache, so `holds` keeps the step alive, which owns them.
    return Run(graph.replay, facts=facts, holds=step)


def _exported_prefill(case: Case, model: Any, plan: Plan, device: torch.device) -> Run:
    """Prefill of an export: the whole prompt; the logits of all its tokens are copied to the host."""
    tokens = _random_tokens(case, plan, plan.prompt, torch.device("cpu")).numpy()
    return Run(lambda: model.runner.prefill(tokens))


def _exported_decode(case: Case, model: Any, plan: Plan, device: torch.device) -> Run:
    """Decode of an export: one token after another after the prompt, which is read again when the cache is full."""
    prompt, token = (_random_tokens(case, plan, length, torch.device("cpu")).numpy() for length in (plan.prompt, 1))
    cache_and_count: list[Any] = []  # the cache, and the number of tokens decoded since the prompt

    def read_prompt() -> None:
        if not cache_and_count or cache_and_count[1] == plan.room:
            cache_and_count[:] = [model.runner.prefill(prompt)[1], 0]

    def step() -> None:
        cache, count = cache_and_count
        cache_and_count[:] = [model.runner.decode(token, cache)[1], count + 1]

    return Run(step, read_prompt)


def _prompt_step(
    case: Case, model: Any, plan: Plan, device: torch.device
) -> tuple[StaticCache, Callable[[], torch.Tensor]]:
    cache = StaticCache(config=model.config, max_cache_len=plan.prompt + plan.room)
    tokens = _random_tokens(case, plan, plan.prompt, device)
    return cache, lambda: _logits(model, tokens, cache)


def _decode_step(
    case: Case, model: Any, plan: Plan, device: torch.device
) -> tuple[Callable[[], torch.Tensor], StaticCache]:
    """A decode step and its cache, which the prompt has filled; peak memory is counted from after the prompt."""
    cache, read_prompt = _prompt_step(case, model, plan, device)
    read_prompt()
    _forget_peak(device)
    token = _random_tokens(case, plan, 1, device)
    return lambda: _logits(model, token, cache), cache


def _random_tokens(case: Case, plan: Plan, length: int, device: torch.device) -> torch.Tensor:
    """Random tokens `[batch, length]`, the same for the dense model and the pruned one."""
    source = torch.Generator().manual_seed(length)
    vocabulary = (plan.shapes | plan.exported)[case.shape].vocab
    return torch.randint(vocabulary, (case.batch, length), generator=source).to(device)


def _logits(model: Any, tokens: torch.Tensor, cache: StaticCache) -> torch.Tensor:
    answer: torch.Tensor = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return answer


def _set_position(cache: StaticCache, tokens: int) -> None:
    """Set the number of tokens in the cache; later positions are masked, and written again."""
    layers: list[Any] = cache.layers  # each layer has its own count
    for layer in layers:
        layer.cumulative_length.fill_(tokens)


# The function that makes the run, by phase and runtime. `gpu_cases.TABLE` says for which weights each is measured.
RUNS: dict[tuple[str, str], Callable[[Case, Any, Plan, torch.device], Run]] = {
    ("prefill", "eager"): _prefill,
    ("decode", "eager"): _decode,
    ("decode", "cuda-graph"): _decode_graph,
    ("prefill", EXPORT): _exported_prefill,
    ("decode", EXPORT): _exported_decode,
}
