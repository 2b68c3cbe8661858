"""Config fields under the names that transformers 4 has for them, beside those of transformers 5.

Tools that stay on transformers 4 (optimum-onnx is one) find neither `rope_parameters` nor renamed counts, take their
own defaults in silence, and compute something else. transformers 5 reads both to the same config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Newer name, older name.
_RENAMED = {"num_local_experts": "num_experts"}
# What was a field of its own before it was gathered in `rope_parameters`; the rest was `rope_scaling`.
_GATHERED = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
_GATHERED_AS = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
# What an architecture does not allow in `rope_scaling`, having it elsewhere.
_NOT_IN_SCALING = {"phi3": ("rope_type", "original_max_position_embeddings")}


def add_older_names(folder: Path) -> None:
    """Add them to the `config.json` of a saved checkpoint.

    Rotary embeddings that differ by kind of layer are left as they are: architectures had names of their own for those.
    """
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    older = {old: fields[new] for new, old in _RENAMED.items() if new in fields} | _rope(fields)
    file.write_text(json.dumps({**older, **fields}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    parameters = fields.get("rope_parameters") or {}
    kind = parameters.get("rope_type")
    if kind is None:
        return {}
    architecture = fields["model_type"]
    names = _GATHERED_AS.get(architecture, _GATHERED)
    older = {name: parameters[key] for key, name in names.items() if key in parameters}
    if kind != "default":
        apart = {*names, *_NOT_IN_SCALING.get(architecture, ())}
        older["rope_scaling"] = {key: value for key, value in parameters.items() if key not in apart} | {"type": kind}
    return older
