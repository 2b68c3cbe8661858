"""How `ci/bench gpu` measures: time by the device's own clock, the machine's limits, and one function a runtime."""

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

# Rounds of a slow case are fewer, that it may not spend what is left for the others.
SECONDS_A_CASE = 8.0
FEWEST_ROUNDS = 5
# Of the largest logit; a captured step that answers otherwise than the eager one is no measurement of it.
GRAPH_TOLERANCE = 0.05


@dataclass(frozen=True)
class Run:
    """One round is `step`; `prepare` comes before each, and is not timed. `facts` go into the row.

    `holds` is what the step needs in memory and does not hold itself.
    """

    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    facts: Mapping[str, float] = field(default_factory=dict)
    holds: object = None


def measure_limits(plan: Plan, device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy (read and written) and of a product with a vector (read), operations of a product."""
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
    """Milliseconds of each round, by run; a round of each before the next of any."""
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
    """Now: of a GPU an event in its queue, otherwise seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    make: Any = torch.cuda.Event  # untyped
    event = make(enable_timing=True)
    event.record()
    return event


def quartiles(taken: Sequence[float]) -> list[float]:
    """The first, the median and the third.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    [2.0, 3.0, 4.0]
    """
    return statistics.quantiles(taken, n=4, method="inclusive")


def affordable_rounds(round_ms: float, wanted: int, seconds: float = SECONDS_A_CASE) -> int:
    """As many as were wanted, fewer where they would take longer than that, and no fewer than five of those.

    >>> affordable_rounds(10.0, 48), affordable_rounds(1000.0, 48), affordable_rounds(9000.0, 10)
    (48, 8, 5)
    """
    return min(wanted, max(FEWEST_ROUNDS, int(1000 * seconds / round_ms)))


def measure(case: Case, models: Mapping[str, Any], plan: Plan, device: torch.device) -> dict[str, Any]:
    """Of each model quartiles of milliseconds a round, tokens a second and bytes; of two, how they compare."""
    release()  # an earlier case's memory, freed in the midst of this one, would pass for less used
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
    """What is to be timed, run once; peak memory is the weights, and the most that was taken beside them meanwhile.

    The other model's weights and cache, which lie in memory so that the two can take turns, do not count.
    """
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    _forget_peak(device)
    run = RUNS[case.phase, case.how](case, model, plan, device)
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
        # What a runtime takes beside torch is not torch's to count.
        "peak_bytes": stored + torch.cuda.max_memory_allocated() - before if on_gpu and case.how != EXPORT else None,
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
    """Put into the row what the limits would allow each model, the share of it reached, and how the two compare."""
    for figures in (row["dense"], row["pruned"]):
        ideal = ideal_ms(case, plan, figures["decoder_layers"], figures["read_weight_bytes"], limits)
        figures |= {"ideal_ms": ideal, "share_of_limit": ideal / figures["ms"][1]}
    row["ideal_dense_over_pruned"] = row["dense"]["ideal_ms"] / row["pruned"]["ideal_ms"]


def _prefill(case: Case, model: Any, plan: Plan, device: torch.device) -> Run:
    """The whole prompt into an empty cache; only the last token's logits."""
    cache, step = _prompt_step(case, model, plan, device)
    step()  # makes the cache's tensors, which `prepare` needs
    return Run(step, lambda: _set_position(cache, 0))


def _decode(case: Case, model: Any, plan: Plan, device: torch.device) -> Run:
    """One token after another behind the prompt, each call made by Python."""
    step, _ = _decode_step(case, model, plan, device)
    return Run(step)


def _decode_graph(case: Case, model: Any, plan: Plan, device: torch.device) -> Run:
    """The same steps, captured once and replayed.

    The cache counts its own tokens in a tensor on the device, from which positions and mask are made inside the step:
    each replay is of the next token, and nothing has to be handed to it.
    """
    step, cache = _decode_step(case, model, plan, device)
    make: Any = torch.cuda.Stream  # untyped
    side = make()
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
    if not difference <= GRAPH_TOLERANCE * largest:  # so that not-a-number fails too
        raise RuntimeError(f"the captured step's logits differ from the eager ones by {difference:g} of {largest:g}")
    _set_position(cache, plan.prompt)
    facts = {"graph_max_difference": difference, "largest_logit": largest}
    # A graph knows no more than addresses: of the token and the cache, which the step holds.
    return Run(graph.replay, facts=facts, holds=step)


def _exported_prefill(case: Case, model: Any, plan: Plan, device: torch.device) -> Run:
    """The whole prompt; the logits of all its tokens are copied to the host."""
    tokens = _random_tokens(case, plan, plan.prompt, torch.device("cpu")).numpy()
    return Run(lambda: model.runner.prefill(tokens))


def _exported_decode(case: Case, model: Any, plan: Plan, device: torch.device) -> Run:
    """One token after another behind the prompt, which is read anew when the cache is full."""
    prompt, token = (_random_tokens(case, plan, length, torch.device("cpu")).numpy() for length in (plan.prompt, 1))
    fed: list[Any] = []

    def read_prompt() -> None:
        if not fed or fed[1] == plan.room:
            fed[:] = [model.runner.prefill(prompt)[1], 0]

    def step() -> None:
        fed[:] = [model.runner.decode(token, fed[0])[1], fed[1] + 1]

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
    """A step of one token a sequence, its cache filled by the prompt; memory is counted from behind the prompt."""
    cache, read_prompt = _prompt_step(case, model, plan, device)
    read_prompt()
    _forget_peak(device)
    token = _random_tokens(case, plan, 1, device)
    return lambda: _logits(model, token, cache), cache


def _random_tokens(case: Case, plan: Plan, length: int, device: torch.device) -> torch.Tensor:
    """The same for the dense model and the pruned one."""
    source = torch.Generator().manual_seed(length)
    vocabulary = (plan.shapes | plan.exported)[case.shape].vocab
    return torch.randint(vocabulary, (case.batch, length), generator=source).to(device)


def _logits(model: Any, tokens: torch.Tensor, cache: StaticCache) -> torch.Tensor:
    answer: torch.Tensor = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return answer


def _set_position(cache: StaticCache, tokens: int) -> None:
    """Let the cache hold so many tokens; what lies behind them is masked, and written anew."""
    layers: list[Any] = cache.layers  # each counts for itself
    for layer in layers:
        layer.cumulative_length.fill_(tokens)


# By phase and runtime; what can be timed is made here, and `gpu_cases.TABLE` says of which weights.
RUNS: dict[tuple[str, str], Callable[[Case, Any, Plan, torch.device], Run]] = {
    ("prefill", "eager"): _prefill,
    ("decode", "eager"): _decode,
    ("decode", "cuda-graph"): _decode_graph,
    ("prefill", EXPORT): _exported_prefill,
    ("decode", EXPORT): _exported_decode,
}
