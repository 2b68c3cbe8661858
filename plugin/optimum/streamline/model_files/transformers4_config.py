"""Add the config fields of transformers 4 to a checkpoint that transformers 5 saved.

Tools that still use transformers 4, such as optimum-onnx, do not know `rope_parameters` or renamed counts. They would
silently use their defaults and compute something else. transformers 5 reads the same config with and without the older
fields.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Fields that were renamed, by their name in transformers 5.
_RENAMED = {"num_local_experts": "num_experts"}
# Fields that transformers 5 gathered in `rope_parameters`, with their names in transformers 4. The other keys were in
# `rope_scaling`.
_GATHERED = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
_GATHERED_AS = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
# Keys that an architecture does not accept in `rope_scaling`, because it has them elsewhere.
_NOT_IN_SCALING = {"phi3": ("rope_type", "original_max_position_embeddings")}
# The field with the base of the rotary embeddings of layers with a sliding window, where they have their own. The other
# fields are those of layers with full attention.
_OF_SLIDING = {"gemma3_text": "rope_local_base_freq"}


def add_older_names(folder: Path) -> None:
    """Add the fields of transformers 4 to a saved `config.json`.

    Args:
        folder: The checkpoint's folder.
    """
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    older = {old: fields[new] for new, old in _RENAMED.items() if new in fields} | _rope(fields)
    file.write_text(json.dumps({**older, **fields}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding fields in the form of transformers 4."""
    architecture, parameters = fields["model_type"], fields.get("rope_parameters") or {}
    of_sliding = parameters.get("sliding_attention") if architecture in _OF_SLIDING else None
    parameters = parameters.get("full_attention", parameters)
    kind = parameters.get("rope_type")
    if kind is None:
        return {}
    names = _GATHERED_AS.get(architecture, _GATHERED)
    older = {name: parameters[key] for key, name in names.items() if key in parameters}
    if kind != "default":
        not_in_scaling = {*names, *_NOT_IN_SCALING.get(architecture, ())}
        older["rope_scaling"] = {key: value for key, value in parameters.items() if key not in not_in_scaling} | {
            "type": kind
        }
    if of_sliding is not None:
        older[_OF_SLIDING[architecture]] = of_sliding["rope_theta"]
    return older
