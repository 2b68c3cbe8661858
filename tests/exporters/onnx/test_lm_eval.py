"""Tests that lm-eval's `onnxruntime` model scores an export as its `hf` model scores the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval import simple_evaluate

pytestmark = pytest.mark.onnx

ENDINGS = ["names):\n", "sys\n", "one + other\n"]
BEGINNINGS = ["    for index, name in enumerate(", "import os\nimport ", "def add(one, other):\n    return "]


def task(rows: Iterable[dict[str, Any]], folder: Path, name: str, **fields: object) -> dict[str, Any]:
    """An lm-eval task on our own rows, as a user writes one; it downloads nothing."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    return {"task": name, **data, **fields}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tasks")
    code = Path(__file__).read_text(encoding="utf-8")
    texts = [{"text": code[start : start + 900]} for start in (0, 900)]
    questions = [{"text": text, "endings": ENDINGS, "right": right} for right, text in enumerate(BEGINNINGS)]
    return [
        task(
            texts,
            folder,
            "perplexity_of_code",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="text",
            metric_list=[{"metric": "word_perplexity"}],
        ),
        task(
            questions,
            folder,
            "what_comes_next",
            output_type="multiple_choice",
            doc_to_text="text",
            target_delimiter="",
            doc_to_choice="endings",
            doc_to_target="right",
            metric_list=[{"metric": "acc"}],
        ),
    ]


def scores(tasks: list[dict[str, Any]], model: str, folder: Path, **arguments: object) -> dict[str, np.ndarray]:
    """Every log-likelihood of a task; for multiple choice also whether greedy decoding gives the same text."""
    arguments = {"pretrained": str(folder), **arguments}
    results = simple_evaluate(model=model, model_args=arguments, tasks=tasks, device="cpu", bootstrap_iters=0)
    samples = results["samples"].items()
    return {name: np.array([sample["filtered_resps"] for sample in rows], float) for name, rows in samples}


@pytest.mark.slow  # lm-eval's own code, not ours, is what takes half a minute
def test_it_scores_the_folder_as_it_scores_the_checkpoint(pruned_reference, tasks) -> None:
    expected = scores(tasks, "hf", pruned_reference.checkpoint, dtype="float32")
    got = scores(tasks, "onnxruntime", pruned_reference.folder)
    assert {name: array.shape for name, array in got.items()} == {
        "perplexity_of_code": (2, 1),
        "what_comes_next": (3, 3, 2),
    }
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5)
