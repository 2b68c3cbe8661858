"""Tests that need no TensorRT library: limits, profiles, records, the graph rules, and the calls of a build."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optimum.exporters.streamline.parity.compare import LONGEST_TEXT
from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.exporters.streamline.tensorrt.build_engine import build_engine
from optimum.exporters.streamline.tensorrt.engine_options import MIN_LENGTH, EngineOptions, Limits
from optimum.exporters.streamline.tensorrt.engine_record import EngineRecord, Machine
from optimum.exporters.streamline.tensorrt.graph.engine_inputs import static_inputs
from optimum.exporters.streamline.tensorrt.graph.graph_rules import check_graph
from optimum.exporters.streamline.tensorrt.profiles import choose_profile, make_profiles
from optimum.exporters.streamline.tracing.build import build_graph
from optimum.exporters.streamline.tracing.skeleton import layers_to_trace
from optimum.streamline.checkpoints.loading import DTYPES, load
from optimum.streamline.errors import StreamlineError
from tiny import tiny_model

pytestmark = pytest.mark.onnx

INPUTS = {
    "input_ids": ("batch_size", "sequence_length"),
    "past_key_values.0.key": ("batch_size", 2, 32, 8),
    "mask": ("batch_size", 1, "sequence_length", 32),
    "fixed": (3,),
}


def test_every_input_that_varies_is_in_every_profile() -> None:
    prompt, decode = make_profiles(INPUTS, Limits(batch=4, input=16, length=32))
    assert list(prompt) == list(decode) == ["input_ids", "past_key_values.0.key", "mask"]
    mask = prompt["mask"]
    assert (mask.least, mask.usual, mask.most) == ((1, 1, 1, 32), (1, 1, 8, 32), (4, 1, 16, 32))
    assert decode["input_ids"].most == (4, 1)
    assert len(make_profiles(INPUTS, Limits(batch=4, input=1, length=32))) == 1


def test_an_axis_that_nothing_bounds_is_refused() -> None:
    with pytest.raises(StreamlineError, match="input past: its axis 'past_sequence_length' has no known limits"):
        make_profiles({"past": ("batch_size", "past_sequence_length")}, Limits(1, 1, 32))


def test_a_request_goes_to_the_narrowest_profile_or_is_refused_by_name() -> None:
    profiles = make_profiles(INPUTS, Limits(batch=4, input=16, length=32))

    def shapes(batch: int, new: int, length: int = 32) -> dict[str, tuple[int, ...]]:
        return {
            "input_ids": (batch, new),
            "past_key_values.0.key": (batch, 2, 32, 8),
            "mask": (batch, 1, new, length),
            "fixed": (3,),
        }

    assert [choose_profile(profiles, shapes(*each)) for each in ((1, 1), (4, 1), (1, 2), (4, 16))] == [1, 1, 0, 0]
    for asked, said in (
        ((5, 1), r"input input_ids \[5, 1\]: axis 0 is 5, not from 1 to 4"),
        ((1, 17), r"input input_ids \[1, 17\]: axis 1 is 17, not from 1 to 16"),
        ((1, 2, 33), r"input mask \[1, 1, 2, 33\]: axis 3 is 33, not 32"),
    ):
        with pytest.raises(StreamlineError, match=said):
            choose_profile(profiles, shapes(*asked))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (EngineOptions(max_batch=0), "max-batch 0: must be at least 1"),
        (EngineOptions(max_length=65), "max-length 65: must be from 16 to 64, the model's positions"),
        (EngineOptions(max_length=8), "max-length 8: must be from 16 to 64"),
        (EngineOptions(max_length=32, max_input=33), "max-input 33: must be from 1 to 32, which is max-length"),
    ],
)
def test_limits_that_cannot_be_are_refused(options: EngineOptions, said: str) -> None:
    with pytest.raises(StreamlineError, match=said):
        options.limits(64)


def test_caches_have_room_for_what_is_compared_with_torch() -> None:
    assert MIN_LENGTH == LONGEST_TEXT


def record(**fields: Any) -> EngineRecord:
    limits = Limits(batch=4, input=16, length=32)
    known: dict[str, Any] = {
        "builder": "tensorrt-rtx",
        "version": "1.7",
        "gpu": "",
        "capabilities": (89, 120),
        "limits": limits,
        "profiles": make_profiles(INPUTS, limits),
        "aliases": {"present.0.key": "past_key_values.0.key"},
        "masks": (MaskInput("mask"), MaskInput("mask.window_6", 6)),
        "layers": 12,
    }
    return EngineRecord(**{**known, **fields})


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record().write(tmp_path)
    assert EngineRecord.read(tmp_path) == record()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"profiles": [1]}'])
def test_what_is_no_record_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(StreamlineError, match=r"engine\.json: not the record of an engine"):
        EngineRecord.read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("capabilities", "89"), ("layers", "12"), ("limits", {"batch": 4}), ("speed", 1)]
)
def test_a_record_with_a_wrong_field_names_it(tmp_path: Path, field: str, value: object) -> None:
    record().write(tmp_path)
    file = tmp_path / "engine.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(StreamlineError, match=rf"engine\.json: not the record of an engine \({field}") as error:
        EngineRecord.read(tmp_path)
    assert "\n" not in str(error.value)


def test_an_engine_is_refused_elsewhere_by_name() -> None:
    record().check_machine(Machine("1.7", "L4", 89))
    on_a_gpu = record(builder="tensorrt", version="11.4", gpu="H200", capabilities=())
    on_a_gpu.check_machine(Machine("11.4", "H200", 90))
    for engine, machine, said in (
        (record(), Machine("1.8", "L4", 89), r"engine of tensorrt-rtx 1\.7: cannot be run by version 1\.8"),
        (
            record(),
            Machine("1.7", "T4", 75),
            r"engine for compute capability 89, 120: cannot be run on T4 \(compute cap",
        ),
        (on_a_gpu, Machine("11.4", "H100", 90), "engine for H200: cannot be run on H100"),
    ):
        with pytest.raises(StreamlineError, match=said):
            engine.check_machine(machine)


def test_a_text_that_the_caches_have_no_room_for_is_refused() -> None:
    with pytest.raises(StreamlineError, match="length 33: must be at most 32, the tokens that the caches hold"):
        static_inputs(np.ones((1, 33), np.int64), np.ones((1, 33), np.int64), [MaskInput("mask")], 32, -1e9)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> ir.ModelProtocol:
    """The graph of a tiny model with static caches, as a protobuf, so that each test can change its own copy."""
    folder = tmp_path_factory.mktemp("strict")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "checkpoint")
    model = load(str(folder / "checkpoint"), DTYPES["fp32"], offload=folder / "weights")
    return ir.to_proto(build_graph(model, layers_to_trace(model), 32).model)


def attention(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "Attention")


def of_an_older_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 23


def of_another_domain(model: ir.Model) -> None:
    model.graph.opset_imports["com.microsoft"] = 1


def with_an_operator_that_fails(model: ir.Model) -> None:
    model.graph.append(ir.node("NonZero", [model.graph.inputs[0]]))


def counting_keys(model: ir.Model) -> None:
    node = attention(model)
    node.resize_inputs(7)
    node.replace_input_with(6, model.graph.inputs[0])


def appending_within(model: ir.Model) -> None:
    node = attention(model)
    node.resize_inputs(6)
    node.replace_input_with(4, model.graph.inputs[2])


def without_a_mask(model: ir.Model) -> None:
    attention(model).replace_input_with(3, None)


def causal_too(model: ir.Model) -> None:
    attention(model).attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def capped(model: ir.Model) -> None:
    attention(model).attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def with_an_idle_input(model: ir.Model) -> None:
    model.graph.inputs.append(ir.val("idle", ir.DataType.FLOAT, [1]))


def with_a_number_for_a_name(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["2", "sequence_length"])


def with_a_cache_that_grows(model: ir.Model) -> None:
    value = next(each for each in model.graph.inputs if each.name == "past_key_values.0.key")
    value.shape = ir.Shape(["batch_size", 2, "past_sequence_length", 8])


def with_a_cache_of_another_length(model: ir.Model) -> None:
    value = next(each for each in model.graph.outputs if each.name == "present.0.key")
    value.shape = ir.Shape(["batch_size", 2, 31, 8])


def with_a_cache_of_another_layer(model: ir.Model) -> None:
    [first, second] = [
        each for each in model.graph.inputs if each.name in ("past_key_values.0.key", "past_key_values.1.key")
    ]
    first.name, second.name = second.name, first.name


FAULTS: dict[Callable[[ir.Model], None], str] = {
    of_an_older_opset: "its graph has opset 23, not 24",
    of_another_domain: "its graph has operators of 'com.microsoft'",
    with_an_operator_that_fails: "operator NonZero is not among the operators that engines are built of",
    counting_keys: r"/Attention: Attention has an input after the mask \(input_ids\)",
    appending_within: r"/Attention: Attention has an input after the mask \(past_key_values.0.key\)",
    without_a_mask: "/Attention: Attention has no mask",
    causal_too: "/Attention: Attention has is_causal in addition to its mask",
    capped: "/Attention: Attention has a softcap",
    with_an_idle_input: "input idle reaches no output",
    with_a_number_for_a_name: "input_ids: axis 0, '2', has a number for a name",
    with_a_cache_that_grows: "past_key_values.0.key: axis 2, 'past_sequence_length', must have a fixed size",
    with_a_cache_of_another_length: r"present.0.key is FLOAT\[batch_size,2,31,8\], but past_key_values.0.key is FLOAT",
    with_a_cache_of_another_layer: "present.0.key is not a TensorScatter of new tokens into past_key_values.0.key",
}


def test_the_strict_graph_is_without_fault(strict: Any) -> None:
    check_graph(ir.from_proto(strict))


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(strict: Any, plant: Callable[[ir.Model], None]) -> None:
    model = ir.from_proto(strict)
    plant(model)
    with pytest.raises(StreamlineError, match=f"cannot be built for TensorRT: .*{FAULTS[plant]}"):
        check_graph(model)


class FakeTrt:
    """A fake of both libraries, with the parts that a build calls; it records each call."""

    def __init__(self, name: str, fails: str = "") -> None:
        self.__name__ = name
        self.__version__ = "1.2.3"
        self.calls: list[tuple[Any, ...]] = []
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.LayerType = SimpleNamespace(ATTENTION_INPUT="attention")
        self.ComputeCapability = SimpleNamespace(SM89="sm89", SM120="sm120")
        self.IAttentionInputLayer = _Layer
        self.ILogger = type(
            "ILogger",
            (),
            {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4, "__init__": _nothing},
        )
        self.layers = [_Layer("attention"), _Layer("other")]
        self.fails = fails
        self.log: Any = None

    def Builder(self, log: Any) -> Any:  # noqa: N802 -- the library's name
        self.log = log
        return _Recorder(self, "builder")

    def OnnxParser(self, network: Any, log: Any) -> Any:  # noqa: N802
        return _Recorder(self, "parser")


def _nothing(self: object) -> None:
    """`ILogger.__init__`."""


class _Layer:
    def __init__(self, kind: str) -> None:
        self.type = kind
        self.attention = SimpleNamespace(decomposable=False)


class _Recorder:
    """A fake of any object of the library: it records each call and each assignment, and returns further fakes."""

    num_errors = 1

    def __init__(self, trt: FakeTrt, name: str) -> None:
        self.__dict__.update(_trt=trt, _name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._trt.calls.append((self._name, name, value))

    def __getattr__(self, name: str) -> Any:
        if name == "num_layers":
            return len(self._trt.layers)

        def call(*given: Any, **named: Any) -> Any:
            self._trt.calls.append((self._name, name, *given, *named.items()))
            return self._answer(name, given)

        return call

    def _answer(self, name: str, given: tuple[Any, ...]) -> Any:
        trt = self._trt
        if name == "build_serialized_network" and trt.fails == "build":
            trt.log.log(1, "no kernel\nfor this")
            return None
        answers = {
            "parse_from_file": trt.fails != "parse",
            "desc": "unknown operator",
            "get_layer": trt.layers[given[0]] if name == "get_layer" else None,
            "build_serialized_network": b"engine",
            "serialize": b"timing",
        }
        return answers[name] if name in answers else _Recorder(trt, name.removeprefix("create_"))


def built(trt: FakeTrt, folder: Path, capabilities: tuple[int, ...] = ()) -> Any:
    profiles = make_profiles(INPUTS, Limits(batch=4, input=16, length=32))
    return build_engine(trt, Path("model.onnx"), folder / "engine", profiles, capabilities, folder / "timing")


def plain(calls: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The calls without their object arguments, which differ between the two fakes."""
    return [tuple(each for each in call if isinstance(each, (str, int, tuple, bytes))) for call in calls]


def test_both_libraries_are_called_alike(tmp_path: Path) -> None:
    ours, rtx = FakeTrt("tensorrt"), FakeTrt("tensorrt_rtx")
    made = built(ours, tmp_path)
    assert (made.version, made.layers) == ("1.2.3", 2)
    assert (tmp_path / "engine").read_bytes() == b"engine"
    assert (tmp_path / "timing").read_bytes() == b"timing"
    (tmp_path / "timing").unlink()
    built(rtx, tmp_path, (89, 120))
    aimed = [
        ("builder_config", "num_compute_capabilities", 2),
        ("builder_config", "set_compute_capability", "sm89", 0),
        ("builder_config", "set_compute_capability", "sm120", 1),
    ]
    assert [call for call in plain(rtx.calls) if call not in aimed] == plain(ours.calls)
    assert [call for call in plain(rtx.calls) if call in aimed] == aimed
    calls = plain(ours.calls)
    assert ("builder", "create_network", 2) in calls  # strongly typed, the flag's bit
    assert ("optimization_profile", "set_shape", "mask", (1, 1, 1, 32), (1, 1, 8, 32), (4, 1, 16, 32)) in calls
    assert sum(call[1] == "add_optimization_profile" for call in calls) == 2
    assert [layer.attention.decomposable for layer in ours.layers] == [True, False]


def test_a_library_that_measures_nothing_keeps_no_file(tmp_path: Path) -> None:
    trt = FakeTrt("tensorrt_rtx")
    build_engine(trt, Path("model.onnx"), tmp_path / "engine", (), (89,), None)
    assert not [call for call in trt.calls if "timing_cache" in str(call[1])]
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_what_was_timed_before_is_given_back(tmp_path: Path) -> None:
    (tmp_path / "timing").write_bytes(b"before")
    trt = FakeTrt("tensorrt")
    built(trt, tmp_path)
    assert ("builder_config", "create_timing_cache", b"before") in plain(trt.calls)


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("parse", "tensorrt-rtx cannot read the graph: unknown operator"),
        ("build", "tensorrt-rtx cannot build the engine: no kernel for this"),
    ],
)
def test_what_a_library_says_is_passed_on(tmp_path: Path, fails: str, said: str) -> None:
    with pytest.raises(StreamlineError, match=said):
        built(FakeTrt("tensorrt_rtx", fails), tmp_path)
    assert list(tmp_path.iterdir()) == []
