"""What `ci/bench gpu` measures: the models' shapes, the table of cases, and what a machine's limits allow each.

Arithmetic alone: nothing here makes a model or touches a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

CACHE_BYTES = 2  # a number of the key-value cache, which is bf16 whatever the weights are
# The share of the layers that is kept where a quarter is removed.
KEPT = 0.75


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def kv_width(self) -> int:
        """Numbers in one layer's keys of one token."""
        return self.hidden // self.heads * self.kv_heads


@dataclass(frozen=True)
class Plan:
    """How large and how often; `room` is how many tokens the static cache holds beyond the prompt.

    `shapes` are run in torch, `exported` in the runtime that there is.
    """

    shapes: dict[str, Shape]
    exported: dict[str, Shape]
    prompt: int
    room: int
    batches: tuple[int, ...]
    prefill_warm: int
    prefill_rounds: int
    decode_warm: int
    decode_rounds: int
    copied_bytes: int
    matrix: tuple[int, int]  # of the product with a vector
    square: int  # side of the matrices of the product of two

    def rounds(self, phase: str) -> tuple[int, int]:
        """Those of warm-up, and those that count."""
        if phase == "prefill":
            return self.prefill_warm, self.prefill_rounds
        return self.decode_warm, self.decode_rounds


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
}
EXPORTED = {"llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256)}
FULL = Plan(SHAPES, EXPORTED, 2048, 64, (1, 16), 2, 10, 8, 48, 4 * 2**30, (16384, 65536), 8192)
TINY = Shape(64, 128, 4, 4, 2, 128)
SMOKE = Plan({"tiny": TINY}, {"tiny-exported": TINY}, 16, 8, (1, 2), 1, 3, 1, 3, 2**16, (64, 64), 64)

# Phase and runtime, by kind of weights, in the order in which they are measured; a further runtime, or kind of weights,
# is a row here and one in `gpu_measure.RUNS` or `gpu_models.CONVERSIONS`. Only bf16 is captured: in each int8 product
# the host waits to learn where the outliers are. Captures come last: one that fails leaves its process unusable.
EXPORT = "export"
EAGER = (("prefill", "eager"), ("decode", "eager"))
TABLE = {
    "bf16": (*EAGER, ("decode", "cuda-graph")),
    "bnb-int8": EAGER,
    "bnb-nf4": EAGER,
}


@dataclass(frozen=True)
class Case:
    """One phase of one kind of model, which is measured dense and pruned in turns; `how` is the runtime."""

    shape: str
    weights: str
    phase: str
    batch: int
    how: str

    @property
    def model(self) -> tuple[str, str]:
        """Cases that agree in it follow each other, and share the weights in memory."""
        return self.shape, self.weights

    @property
    def name(self) -> str:
        """What `--only` looks into.

        >>> Case("llama-2-7b", "bf16", "decode", 16, "eager").name
        'llama-2-7b bf16 decode b16 eager'
        """
        return f"{self.shape} {self.weights} {self.phase} b{self.batch} {self.how}"


def make_cases(plan: Plan, device: str, runtime: str) -> list[Case]:
    """Those of the table that this device can run, in its order, and those of the runtime.

    Of the latter's prompts one at a time: the logits of each of their tokens are copied.
    """
    in_torch = [
        Case(shape, weights, phase, batch, how)
        for shape, weights in product(plan.shapes, TABLE)
        for (phase, how), batch in product(TABLE[weights], plan.batches)
        if device == "cuda" or how != "cuda-graph"
    ]
    phases = [("prefill", 1), *(("decode", batch) for batch in plan.batches)]
    return in_torch + [Case(shape, runtime, phase, batch, EXPORT) for shape in plan.exported for phase, batch in phases]


def kept_layers(shape: Shape) -> int:
    """How many layers are left.

    >>> kept_layers(SHAPES["llama-2-7b"])
    24
    """
    return round(shape.layers * KEPT)


def cache_bytes(shape: Shape, layers: int, batch: int, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens.

    >>> cache_bytes(SHAPES["llama-2-7b"], 32, 1, 2048) == 2**30
    True
    """
    return 2 * CACHE_BYTES * shape.kv_width * layers * batch * tokens


def prefill_flops(shape: Shape, layers: int, batch: int, tokens: int) -> int:
    """Operations of reading a prompt: two a weight and token, causal attention, and one token's logits a sequence.

    >>> prefill_flops(Shape(hidden=2, intermediate=3, layers=1, heads=1, kv_heads=1, vocab=5), 1, 1, 2)
    180
    """
    linear = 2 * shape.hidden * (shape.hidden + shape.kv_width) + 3 * shape.hidden * shape.intermediate
    # Queries times keys and shares times values; a token attends to itself and to those before it.
    attention = 4 * shape.hidden * tokens * (tokens + 1) // 2
    return batch * (layers * (2 * linear * tokens + attention) + 2 * shape.hidden * shape.vocab)


def ideal_ms(case: Case, plan: Plan, layers: int, read_bytes: int, limits: dict[str, float]) -> float:
    """Milliseconds at the measured limits: of prefill by its operations, of decode by the bytes it has to read.

    `read_bytes` are those of the weights that a token multiplies by; the keys and values come on top.
    """
    shape = (plan.shapes | plan.exported)[case.shape]
    if case.phase == "prefill":
        return 1000 * prefill_flops(shape, layers, case.batch, plan.prompt) / limits["bf16_flops_per_second"]
    return 1000 * (read_bytes + cache_bytes(shape, layers, case.batch, plan.prompt)) / bandwidth(limits)


def bandwidth(limits: dict[str, float]) -> float:
    """Bytes a second, of the two ways of measuring it the one that reached more."""
    return max(limits["copy_bytes_per_second"], limits["read_bytes_per_second"])
