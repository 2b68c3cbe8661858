"""The model card: what a stranger who finds the checkpoint has to know.

A plain function of a record; knows no weights.
"""

from __future__ import annotations

from pathlib import Path

from .record import Record

CITATIONS = {
    "shortgpt": "ShortGPT (arXiv 2403.03853)",
    "llm-streamline": "LLM-Streamline (arXiv 2403.19135)",
    "explicit": "layers chosen by hand",
}


def model_card(record: Record) -> str:
    """The text of the checkpoint's `README.md`."""
    recipe, plan = record.recipe, record.plan
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [optimum-streamline, layer-pruning]",
        *([] if Path(record.source).exists() else [f"base_model: {record.source}"]),
        "---",
        "",
        f"# {record.source.rstrip('/').rsplit('/', 1)[-1]}, made shallower",
        "",
        f"Made by optimum-streamline from `{record.source}`: {plan.describe()}.",
        f"The choice: {CITATIONS.get(recipe.method_name, recipe.method_name)}, on {_data(record, 'calibration')}.",
    ]
    if record.healing:
        log = record.healing
        lines.append(
            f"The replacement was trained on {_data(record, 'heal')}: held-out hidden-state error {log.before:.4g} "
            f"before, {log.best:.4g} after."
        )
    lines += ["", "## Loading", "", "```python", "from transformers import AutoModelForCausalLM", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("this folder")', "```", ""]
    if record.change.dead:
        layers = ", ".join(str(layer) for layer in record.change.dead)
        lines += [
            f"Layer {layers} (of this model) has an attention that is all zeros, named in `config.json`. Stock",
            "transformers computes with the zeros; `optimum.streamline.load` drops them, with the same result.",
            "",
        ]
    lines += ["## Layers", "", "| layer | original layers | kind |", "|---|---|---|"]
    for index, place in enumerate(record.change.places):
        originals = ", ".join(str(layer) for layer in place.originals)
        lines.append(f"| {index} | {originals} | {place.kind} |")
    lines += ["", "`streamline.json` holds the scores, the recipe, the seed and the versions.", ""]
    return "\n".join(lines)


def _data(record: Record, purpose: str) -> str:
    data = record.data[purpose]
    return f"{data['windows']} windows of {data['length']} tokens of `{data['spec']}`"
