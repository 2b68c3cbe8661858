"""The work that a method takes is what is counted while it plans and edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from optimum.streamline.checkpoints.loading import read_config
from optimum.streamline.costs import choosing_work as choosing
from optimum.streamline.costs.choosing_work import ChoosingWork, choosing_work
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline.prune import change, prepare
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring import loss
from optimum.streamline.system.notify import silent
from reference import REFERENCE

SOURCE = ModelSource(str(REFERENCE))
WINDOWS = {"calibration": "stdlib:calibration", "samples": 12, "length": 32, "heal": "none"}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[ChoosingWork]:
    """Every run of layers and of the head, as it happens."""
    found: list[ChoosingWork] = []
    run, head = LlamaDecoderLayer.forward, loss._of_vocabulary

    def layer(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(ChoosingWork(layers=hidden_states.shape[:-1].numel() / WINDOWS["length"]))
        return run(self, hidden_states, *args, **kwargs)

    def of_vocabulary(model: PreTrainedModel, ids: torch.Tensor, streams: Sequence[torch.Tensor]) -> Any:
        found.append(ChoosingWork(heads=len(ids) * len(streams)))
        return head(model, ids, streams)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer)
    monkeypatch.setattr(loss, "_of_vocabulary", of_vocabulary)
    return found


# These need other fields, and the last two are `come` with healing.
OTHERS = {"explicit", "shortened-taylor", "llm-streamline", "come-mp", "come-sp"}
SLOW = ("auto", "blockpruner", "come-p", "shifted")


@pytest.mark.parametrize(
    "fields",
    [
        *(
            pytest.param({"method": name}, marks=pytest.mark.slow if name in SLOW else ())
            for name in sorted(METHODS.keys() - OTHERS)
        ),
        {"method": "llm-streamline", "replacement": "none"},
        {"method": "shortgpt", "iterative": True},
        {"method": "shortgpt", "replacement": "corrected"},
        {"method": "shortgpt", "iterative": True, "replacement": "corrected"},
        {"method": "shortened-ppl", "replacement": "corrected"},
        pytest.param({"method": "sleb", "replacement": "corrected"}, marks=pytest.mark.slow),
        pytest.param({"method": "shifted", "replacement": "corrected"}, marks=pytest.mark.slow),
        pytest.param({"method": "blockpruner", "replacement": "corrected"}, marks=pytest.mark.slow),
        pytest.param({"method": "blockpruner", "packed": False}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
@pytest.mark.parametrize("remove", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_layers_and_heads_run_about_as_often_as_estimated(
    fields: dict[str, Any], remove: int, counted: list[ChoosingWork]
) -> None:
    recipe = make_recipe({**WINDOWS, "remove": remove, **fields})
    change(prepare(SOURCE, recipe, silent), silent)
    run, estimated = sum(counted, ChoosingWork()), choosing_work(recipe, read_config(SOURCE))
    assert estimated is not None
    assert 2 / 3 < estimated.layers / run.layers < 1.5
    if run.heads:
        assert 1 / 2 < estimated.heads / run.heads < 2
    else:
        assert estimated.heads == 0


def test_gradients_cost_three_passes_and_the_forward_pass_before_them() -> None:
    recipe = make_recipe({**WINDOWS, "method": "shortened-taylor", "remove": 4})
    work = choosing_work(recipe, read_config(SOURCE))
    assert work == ChoosingWork(layers=12 * 16 * (1 + 1 + 3), heads=12 * 3)


def test_named_layers_take_no_work_and_of_other_packages_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(SOURCE)
    assert choosing_work(make_recipe({**WINDOWS, "layers": "3"}), config) == ChoosingWork()
    fitted = choosing_work(make_recipe({**WINDOWS, "layers": "3", "replacement": "corrected"}), config)
    assert fitted == ChoosingWork(layers=4 * 12 * 16)
    monkeypatch.delitem(choosing._STEPS, "sleb")
    assert choosing_work(make_recipe({**WINDOWS, "method": "sleb", "remove": 4}), config) is None
