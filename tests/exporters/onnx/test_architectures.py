"""Tests that export every known architecture to ONNX, and that docs/architectures.md has the results."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from optimum.exporters.streamline import export_checkpoint
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.models.architectures import ARCHITECTURES
from pages import check_part
from tiny import LAYERS, tiny_model

pytestmark = pytest.mark.onnx

# The traced layers, where they are not the first two. They are the first layer, one more of its kind, and one of each
# other kind; `tiny.SPECIAL` has the kinds.
TRACED = {"qwen3_moe": (0, 1, 3)}
TRACED |= dict.fromkeys(("exaone4", "gemma2", "gemma3_text", "qwen2", "smollm3"), (0, 1, 2))


@pytest.fixture(scope="module")
def exported_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    @cache
    def export(architecture: str) -> Artifact:
        folder = tmp_path_factory.mktemp(architecture)
        tiny_model(architecture).save_pretrained(folder / "checkpoint")
        return export_checkpoint(str(folder / "checkpoint"), folder / "onnx")

    return export


# Rotary or learned positions. `test_quantizers.py` exports Mixtral, for its experts, and `test_traced_graph.py` a
# Gemma 2, for its two kinds of attention. The others, such as Qwen 3 with its norms of queries and keys, and the page
# with all of them, are slow.
DIFFERENT = {"llama", "gpt2"}


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each in DIFFERENT else pytest.mark.slow) for each in ARCHITECTURES],
)
def test_every_architecture_is_stamped_to_what_torch_computes(exported_tiny, architecture: str) -> None:
    artifact = exported_tiny(architecture)
    assert artifact.traced_layers == TRACED.get(architecture, (0, 1))
    assert artifact.whole_because == ""
    assert len(artifact.parity) == 5
    assert all(0 <= difference < 1e-4 for difference in artifact.parity.values()), artifact.parity
    assert Artifact.read(Path(artifact.path)) == artifact


def table(artifacts: dict[str, Artifact]) -> str:
    lines = ["| architecture | layers traced | layers stamped | why all were traced |", "|---|---|---|---|"]
    for name, artifact in artifacts.items():
        traced = artifact.traced_layers
        cells = [f"`{name}`", ", ".join(map(str, traced)), str(LAYERS - len(traced)), artifact.whole_because or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_page_says_what_came_of_each(exported_tiny, request: pytest.FixtureRequest) -> None:
    found = table({name: exported_tiny(name) for name in sorted(ARCHITECTURES)})
    check_part("architectures.md", "onnx", found, request)
