"""Time prefill and decode of a graph or a checkpoint, in a process of its own.

    python ci/export_speed.py onnxruntime FOLDER HEADS SIZE

prints the median seconds of a prompt and of a token after it. `measure_in_turns` starts one such process per case, in
turns. With several runtimes in one process, the idle threads of one keep spinning while another runs, and some runtimes
lost a quarter of their speed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WARM, ROUNDS, TURNS = 2, 6, 5
PROMPT, DECODED = 128, 32

Seconds = tuple[float, float]
"""Seconds of the prompt, and the median seconds of a token after it."""


@dataclass(frozen=True)
class Timed:
    """One case to time.

    Args:
        runtime: `onnxruntime`, `GenAI` or `torch`.
        folder: The folder of the export or the checkpoint.
        heads: The number of key-value heads.
        size: The head size.
    """

    runtime: str
    folder: Path
    heads: int
    size: int


def measure_in_turns(timed: Mapping[str, Timed], turns: int = TURNS) -> dict[str, dict[str, Any]]:
    """Time every case in its own process, one after the other, in several turns.

    Args:
        timed: The cases, by name.
        turns: The number of turns.

    Returns:
        For each case, `prefill_ms` and `decode_ms`: the median milliseconds of a prompt and of a token after it; and
        `decode_turns_ms`: the milliseconds of a token in each turn. Two cases can be compared turn by turn.
    """
    taken: dict[str, list[Seconds]] = {name: [] for name in timed}
    for turn in range(turns):
        print("turn", turn + 1, "of", turns, flush=True)
        for name, case in timed.items():
            words = (__file__, case.runtime, str(case.folder), str(case.heads), str(case.size))
            output = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True).stdout
            taken[name].append(tuple(json.loads(output)))
    rows = {}
    for name, seconds in taken.items():
        prefill, decode = 1e3 * np.median(seconds, axis=0)
        print(f"{name}: prompt {prefill:.2f} ms, token {decode:.3f} ms", flush=True)
        by_turn = [1e3 * token for _, token in seconds]
        rows[name] = {"prefill_ms": float(prefill), "decode_ms": float(decode), "decode_turns_ms": by_turn}
    return rows


def _onnxruntime(case: Timed) -> Callable[[], Seconds]:
    """A function that times one round in ONNX Runtime; the cache stays in the runtime's buffers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = str(case.folder / "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {value.name for value in session.get_inputs()}
    empty = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty((1, case.heads, 0, case.size), np.float32))
    past = {name: empty for name in sorted(inputs) if name.startswith("past_key_values.")}
    present = [name.replace("past_key_values", "present") for name in past]
    total = 0

    def call(tokens: npt.NDArray[np.int64]) -> None:
        nonlocal past, total
        total += tokens.shape[1]
        positions = np.arange(total - tokens.shape[1], total, dtype=np.int64)[None]
        arrays = {"input_ids": tokens, "attention_mask": np.ones((1, total), np.int64), "position_ids": positions}
        binding = session.io_binding()
        for name in inputs & arrays.keys():
            binding.bind_cpu_input(name, arrays[name])
        for name, state in past.items():
            binding.bind_ortvalue_input(name, state)
        for name in ("logits", *present):
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        past = dict(zip(past, binding.get_outputs()[1:], strict=True))

    def round_() -> Seconds:
        nonlocal past, total
        past, total = dict.fromkeys(past, empty), 0
        return _timed(call)

    return round_


def _genai(case: Timed) -> Callable[[], Seconds]:
    """A function that times one round in onnxruntime-genai, with the folder's `genai_config.json`."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(case.folder))

    def round_() -> Seconds:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=PROMPT + DECODED + 1, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        return _timed(lambda tokens: generator.append_tokens(tokens[0].astype(np.int32)))

    return round_


def _torch(case: Timed) -> Callable[[], Seconds]:
    """A function that times one round in torch, in eager mode and fp32."""
    import torch

    from optimum.streamline.checkpoints.loading import load
    from optimum.streamline.runtime.torch_runner import TorchRunner

    runner = TorchRunner(load(str(case.folder), torch.float32))

    def round_() -> Seconds:
        cache = None

        def call(tokens: npt.NDArray[np.int64]) -> None:
            nonlocal cache
            _, cache = runner.prefill(tokens) if cache is None else runner.decode(tokens, cache)

        return _timed(call)

    return round_


def _timed(call: Callable[[npt.NDArray[np.int64]], None]) -> Seconds:
    import time

    ids = np.random.default_rng(0).integers(5, 1000, (1, PROMPT + DECODED), dtype=np.int64)
    seconds = []
    for tokens in (ids[:, :PROMPT], *np.split(ids[:, PROMPT:], DECODED, axis=1)):
        start = time.perf_counter()
        call(np.ascontiguousarray(tokens))
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def main() -> None:
    """Time the case of the command line, and print its seconds as JSON."""
    runtime, folder, heads, size = sys.argv[1:]
    case = Timed(runtime, Path(folder), int(heads), int(size))
    round_ = {"onnxruntime": _onnxruntime, "GenAI": _genai, "torch": _torch}[runtime](case)
    rounds = [round_() for _ in range(WARM + ROUNDS)][WARM:]
    print(json.dumps([statistics.median(seconds) for seconds in zip(*rounds, strict=True)]))


if __name__ == "__main__":
    main()
