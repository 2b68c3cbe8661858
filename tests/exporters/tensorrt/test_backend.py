"""Tests of the TensorRT backend: `transformers.exporters` opens our exports, and exports with our exporter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.exporters import ExportedModel
from transformers.exporters.auto import AutoExportConfig, AutoHfExporter

import optimum.exporters.streamline  # noqa: F401 -- registers
from optimum.streamline.errors import StreamlineError
from stand_in import Library, export_qwen2, here
from tiny import tiny_model, token_ids

pytestmark = [pytest.mark.onnx, pytest.mark.tensorrt]


OURS, THEIRS = "import optimum.exporters.streamline", "from transformers.exporters import auto"
BEFORE = f"{OURS}\nassert 'torch' not in sys.modules\n{THEIRS}"
FIRST = f"import optimum.exporters.streamline.tensorrt.export\n{THEIRS}"


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(BEFORE, id="before"),
        # In this order and the next, ours registers at once, as it does in this very process.
        pytest.param(f"{THEIRS}\n{OURS}", id="after", marks=pytest.mark.slow),
        pytest.param(FIRST, id="by an export", marks=pytest.mark.slow),
    ],
)
def test_importing_our_package_is_enough(order: str) -> None:
    code = f"import sys\n{order}\nprint(sorted(auto.EXPORT_BACKENDS))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said == "['dynamo', 'executorch', 'onnx', 'openvino', 'tensorrt']\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_qwen2(tmp_path_factory.mktemp("engine"))


def opened(monkeypatch: pytest.MonkeyPatch, exported: Path, folder: Path) -> ExportedModel:
    """A folder opened by transformers, with the stand-in for the TensorRT library."""
    here(exported)  # changes the record, as if the engine had been built for this CPU
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Library(exported / "engine"))
    return ExportedModel.from_pretrained(folder, device="cpu")


def test_transformers_runs_an_engine(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    model = opened(monkeypatch, exported, exported / "engine")
    stock = AutoModelForCausalLM.from_pretrained(exported / "checkpoint").eval()
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = stock(ids, attention_mask=mask, position_ids=positions).logits
    first = model(input_ids=ids[:, :7], attention_mask=mask[:, :7])
    second = model(input_ids=ids[:, 7:8], attention_mask=mask[:, :8], past_key_values=first.past_key_values)
    third = model(input_ids=ids[:, 8:], past_key_values=second.past_key_values)
    found = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)
    assert (model.device.type, model.dtype, model.config.model_type) == ("cpu", torch.float32, "qwen2")
    with pytest.raises(StreamlineError, match="attention_mask: there is padding after a prompt"):
        model(input_ids=ids[:, :1], attention_mask=torch.zeros(2, 10), past_key_values=third.past_key_values)


def test_what_transformers_saves_it_opens_again(
    monkeypatch: pytest.MonkeyPatch, exported: Path, tmp_path: Path
) -> None:
    model = opened(monkeypatch, exported, exported / "engine")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "engine.json",
        "export.json",
        "generation_config.json",
        "model.engine",
    ]
    again = opened(monkeypatch, exported, tmp_path)
    ids = token_ids(1, 5)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_transformers_exports_with_our_exporter(tmp_path: Path) -> None:
    fields = {"export_format": "tensorrt", "dtype": "fp32", "builder": "tensorrt-rtx", "capabilities": (89,)}
    config = AutoExportConfig.from_dict({**fields, "max_length": 32})
    model = tiny_model("qwen2")
    exporter = AutoHfExporter.from_config(config)
    exporter.export(model, {"input_ids": token_ids()}, config).save_pretrained(tmp_path)
    assert (tmp_path / "model.engine").stat().st_size > 10**6
    assert '"capabilities": [\n    89\n  ]' in (tmp_path / "engine.json").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run it on")
def test_without_a_gpu_it_says_so(exported: Path) -> None:
    with pytest.raises(StreamlineError, match="device 'cuda': torch finds no GPU on this machine"):
        ExportedModel.from_pretrained(exported / "engine")


@pytest.mark.gpu
@pytest.mark.parametrize("builder", ["tensorrt", "tensorrt-rtx"])
def test_transformers_runs_an_engine_on_a_gpu(builder: str) -> None:
    fields = {"export_format": "tensorrt", "dtype": "fp32", "builder": builder, "max_length": 32}
    config = AutoExportConfig.from_dict(fields)
    model, ids = tiny_model("qwen2"), token_ids(1, 9)
    exported = AutoHfExporter.from_config(config).export(model, {}, config)
    first = exported(input_ids=ids[:, :8])
    second = exported(input_ids=ids[:, 8:], past_key_values=first.past_key_values)
    with torch.inference_mode():
        expected = model(ids).logits
    found = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
