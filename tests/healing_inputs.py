"""A tiny model with a tokenizer, and a text of letters, for commands that heal."""

from __future__ import annotations

import random
from pathlib import Path

from transformers import AutoTokenizer

from reference import REFERENCE
from tiny import tiny_model


def make_inputs(folder: Path) -> str:
    """Make them in a folder.

    Returns:
        The flags of `prune` that name them as the model, the calibration text and the healing text.
    """
    tiny_model(vocab_size=4096).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder / "model")
    draw = random.Random(0)
    (folder / "text.txt").write_text(" ".join(draw.choice("abcdefghij") * draw.randint(1, 4) for _ in range(8000)))
    return f"-m {folder}/model --calibration {folder}/text.txt --heal-data {folder}/text.txt"
