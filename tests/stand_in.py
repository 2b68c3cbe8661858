"""Stand-ins for TensorRT: a runtime that computes an engine's graph on the CPU, and a builder that only reads it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from optimum.exporters.streamline import EngineOptions, export_checkpoint
from optimum.exporters.streamline.onnx.runner import open_session
from optimum.exporters.streamline.tensorrt.build_engine import BuildInfo, make_logger
from optimum.exporters.streamline.tensorrt.engine_options import Limits
from optimum.exporters.streamline.tensorrt.engine_record import EngineRecord
from optimum.exporters.streamline.tensorrt.profiles import make_profiles
from optimum.exporters.streamline.tensorrt.runner import TensorrtRunner
from tiny import tiny_model

RTX = EngineOptions("tensorrt-rtx", (89,), max_batch=4, max_length=32, max_input=16)
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Library:
    """TensorRT, as far as running calls it, over the graph that an engine was built of, on the CPU's memory."""

    __version__ = "1.7.1.116"
    DataType = SimpleNamespace(
        FLOAT=np.float32, HALF=np.float16, INT64=np.int64, BF16="there is none in ONNX Runtime's CPU"
    )

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, folder: Path, fails: bool = False) -> None:
        self.session = open_session(folder / "model.onnx", "cpu")
        self.record = EngineRecord.read(folder)
        self.fails = fails
        self.profiles_used: list[int] = []
        self.shapes_run: list[tuple[int, ...]] = []

    def Runtime(self, log: Any) -> Any:  # noqa: N802 -- the library's name
        self.log = log
        return SimpleNamespace(deserialize_cuda_engine=self.read)

    def read(self, data: bytes) -> Any:
        assert data
        if self.fails:
            self.log.log(1, "made by another\nversion")
            return None
        return Engine(self)


class Engine:
    def __init__(self, library: Library) -> None:
        self.library = library
        values = (*library.session.get_inputs(), *library.session.get_outputs())
        self.values = {value.name: value for value in values}
        self.num_io_tensors = len(self.values)

    def get_tensor_name(self, place: int) -> str:
        return list(self.values)[place]

    def get_tensor_dtype(self, name: str) -> Any:
        return NUMPY[self.values[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.values[name].shape)

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.profile = self.engine.library.record.profiles[profile]
        self.engine.library.profiles_used.append(profile)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> None:
        assert self.profile[name].violation(shape) == ""
        self.shapes[name] = tuple(shape)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "logits"
        return (*self.shapes["input_ids"], self.engine.values["logits"].shape[2])

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        library = self.engine.library
        assert set(self.addresses) == set(self.engine.values)
        library.shapes_run.append(self.shapes["input_ids"])
        inputs = {each.name: self.memory(each.name, self.shapes[each.name]) for each in library.session.get_inputs()}
        names = [each.name for each in library.session.get_outputs()]
        for name, array in zip(names, library.session.run(names, inputs), strict=True):
            self.memory(name, array.shape)[...] = array
        return True

    def memory(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)


def parse_only(trt: Any, graph: Path, engine: Path, *_: object) -> BuildInfo:
    """Instead of `build_engine`, which takes ten seconds: TensorRT reads the graph and builds nothing."""
    log = make_logger(trt)
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, log).parse_from_file(str(graph))
    engine.write_bytes(b"not built")
    return BuildInfo(trt.__version__, network.num_layers)


def export_qwen2(folder: Path) -> Path:
    tiny_model("qwen2").save_pretrained(folder / "checkpoint")
    export_checkpoint(str(folder / "checkpoint"), folder / "engine", "tensorrt", engine=RTX)
    return folder


def here(exported: Path, most: int = 16) -> TensorrtRunner:
    """A runner that believes that its engine was built for this CPU, of so many new tokens a call."""
    folder = exported / "engine"
    record = EngineRecord.read(folder)
    limits = Limits(4, most, 32)
    graph = open_session(folder / "model.onnx", "cpu")
    profiles = make_profiles({each.name: tuple(each.shape) for each in graph.get_inputs()}, limits)
    replace(record, gpu="cpu", limits=limits, profiles=profiles).write(folder)
    return TensorrtRunner(folder, Library(folder), "cpu")
