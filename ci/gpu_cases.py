"""The cases of `ci/bench gpu`: the shapes of the models, the table of cases, and the ideal time of each case.

Nothing here makes a model or uses a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

CACHE_BYTES = 2  # bytes per number of the key-value cache, which is bf16 with every kind of weights
# The share of the layers that the pruned model keeps.
KEPT = 0.75


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama model, as in its config."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def kv_width(self) -> int:
        """The size of one token's keys in one layer."""
        return self.hidden // self.heads * self.kv_heads


@dataclass(frozen=True)
class Plan:
    """The sizes and numbers of rounds of a benchmark run.

    Args:
        shapes: The models that run in torch.
        exported: The models that are exported.
        prompt: The length of the prompt, in tokens.
        room: The number of tokens that the static cache holds after the prompt.
        batches: The batch sizes.
        prefill_warm: The number of warm-up rounds of prefill.
        prefill_rounds: The most measured rounds of prefill.
        decode_warm: The number of warm-up rounds of decode.
        decode_rounds: The most measured rounds of decode.
        copied_bytes: The size of the copy that measures bandwidth.
        matrix: The shape of the matrix in the matrix-vector product.
        square: The rows and columns of the two matrices in the matrix product.
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
    matrix: tuple[int, int]
    square: int

    def rounds(self, phase: str) -> tuple[int, int]:
        """The number of warm-up rounds, and the most measured rounds, of `prefill` or `decode`."""
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

# The phases and runtimes of each kind of weights, in the order of measurement. A new runtime also needs an entry in
# `gpu_measure.RUNS`, a new kind of weights one in `gpu_models.CONVERSIONS`. Only bf16 runs as a CUDA graph, because
# each int8 matmul makes the host wait for the positions of the outliers. CUDA graphs come last, because a failed
# capture leaves the process unusable.
EXPORT = "export"
EAGER = (("prefill", "eager"), ("decode", "eager"))
TABLE = {
    "bf16": (*EAGER, ("decode", "cuda-graph")),
    "bnb-int8": EAGER,
    "bnb-nf4": EAGER,
}


@dataclass(frozen=True)
class Case:
    """One phase of one kind of model, measured dense and pruned in turns.

    Args:
        shape: A key of `Plan.shapes` or `Plan.exported`.
        weights: A key of `TABLE`; for an export, the runtime's name.
        phase: `prefill` or `decode`.
        batch: The batch size.
        runtime: `eager`, `cuda-graph` or `export`.
    """

    shape: str
    weights: str
    phase: str
    batch: int
    runtime: str

    @property
    def model(self) -> tuple[str, str]:
        """The shape and the weights. Cases that agree in both follow each other and share the weights in memory."""
        return self.shape, self.weights

    @property
    def name(self) -> str:
        """The name that `--only` searches.

        >>> Case("llama-2-7b", "bf16", "decode", 16, "eager").name
        'llama-2-7b bf16 decode b16 eager'
        """
        return f"{self.shape} {self.weights} {self.phase} b{self.batch} {self.runtime}"


def make_cases(plan: Plan, device: str, exported: str) -> list[Case]:
    """The cases of the table that the device can run, and then the cases of the exports.

    Exports prefill at batch 1 only, because the logits of all tokens are copied to the host.

    Args:
        plan: The sizes.
        device: `cuda` or `cpu`.
        exported: The name of the runtime of the exports.
    """
    in_torch = [
        Case(shape, weights, phase, batch, runtime)
        for shape, weights in product(plan.shapes, TABLE)
        for (phase, runtime), batch in product(TABLE[weights], plan.batches)
        if device == "cuda" or runtime != "cuda-graph"
    ]
    phases = [("prefill", 1), *(("decode", batch) for batch in plan.batches)]
    return in_torch + [
        Case(shape, exported, phase, batch, EXPORT) for shape in plan.exported for phase, batch in phases
    ]


def kept_layers(shape: Shape) -> int:
    """The number of layers of the pruned model.

    >>> kept_layers(SHAPES["llama-2-7b"])
    24
    """
    return round(shape.layers * KEPT)


def cache_bytes(shape: Shape, layers: int, batch: int, tokens: int) -> int:
    """The bytes of the keys and values of `tokens` tokens per row.

    >>> cache_bytes(SHAPES["llama-2-7b"], 32, 1, 2048) == 2**30
    True
    """
    return 2 * CACHE_BYTES * shape.kv_width * layers * batch * tokens


def prefill_flops(shape: Shape, layers: int, batch: int, tokens: int) -> int:
    """The floating-point operations of a prefill.

    They are two per weight and token, those of causal attention, and those of one token's logits per sequence.

    >>> prefill_flops(Shape(hidden=2, intermediate=3, layers=1, heads=1, kv_heads=1, vocab=5), 1, 1, 2)
    180
    """
    linear = 2 * shape.hidden * (shape.hidden + shape.kv_width) + 3 * shape.hidden * shape.intermediate
    # Queries times keys, and attention weights times values; a token attends to itself and to all tokens before it.
    attention = 4 * shape.hidden * tokens * (tokens + 1) // 2
    return batch * (layers * (2 * linear * tokens + attention) + 2 * shape.hidden * shape.vocab)


def ideal_ms(case: Case, plan: Plan, layers: int, read_bytes: int, limits: dict[str, float]) -> float:
    """The milliseconds of a round at the measured limits: for prefill by its operations, for decode by bytes read.

    Args:
        case: The case.
        plan: The sizes.
        layers: The number of decoder layers.
        read_bytes: The bytes of the weights that a token is multiplied by; keys and values are added here.
        limits: The measured limits, from `gpu_measure.measure_limits`.
    """
    shape = (plan.shapes | plan.exported)[case.shape]
    if case.phase == "prefill":
        return 1000 * prefill_flops(shape, layers, case.batch, plan.prompt) / limits["bf16_flops_per_second"]
    return 1000 * (read_bytes + cache_bytes(shape, layers, case.batch, plan.prompt)) / bandwidth(limits)


def bandwidth(limits: dict[str, float]) -> float:
    """The memory bandwidth in bytes per second: the larger one of the two measured."""
    return max(limits["copy_bytes_per_second"], limits["read_bytes_per_second"])
