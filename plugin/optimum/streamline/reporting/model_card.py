"""The model card, `README.md` of a checkpoint: how the model was made, and how to load it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from statistics import fmean

from optimum.streamline.editing.plan import layer_ranges
from optimum.streamline.healing.stages import HealingResult
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.bare_layers import NEEDS_LOAD
from optimum.streamline.quantization.quantizers import QUANTIZERS

from .record import PruningRecord, method_origin

CARD_FILE = "README.md"
CITATIONS = {
    "average": "averaging of neighbours, a baseline in CoMe's paper (arXiv 2510.15304)",
    "blockpruner": "BlockPruner (arXiv 2406.10594)",
    "come": "CoMe (arXiv 2510.15304)",
    "come-mp": "CoMe-mp (arXiv 2510.15304)",
    "come-p": "CoMe-P (arXiv 2510.15304)",
    "come-sp": "CoMe-sp (arXiv 2510.15304)",
    "explicit": "hand",
    "gromov": "the angle between a block's input and output (Gromov et al., arXiv 2403.17887)",
    "layerchop": "LayerChop (arXiv 2305.14864)",
    "llm-streamline": "LLM-Streamline (arXiv 2403.19135)",
    "shifted": "the loss without each pair of an attention and an MLP, as SLEB (arXiv 2402.09025) does with layers",
    "shortened-ppl": "Shortened LLaMA, by perplexity (arXiv 2402.02834)",
    "shortened-taylor": "Shortened LLaMA, by Taylor expansion (arXiv 2402.02834)",
    "shortgpt": "ShortGPT (arXiv 2403.03853)",
    "sleb": "SLEB (ICML 2024)",
}
# The name of the loss of each kind of training.
LOSSES = {
    "hidden-mse": "hidden-state error",
    "local": "hidden-state error",
    "lm": "next-token loss",
    "distill": "distillation loss",
}

_LOADING = """
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""
_LOADING_BARE = f"""
This model {NEEDS_LOAD}.

```python
from optimum.streamline import load  # pip install optimum-streamline

model = load("this folder")
```

Loading needs no `trust_remote_code`. An ONNX export of this model runs without optimum-streamline.
"""


def model_card(record: PruningRecord) -> str:
    """The text of the `README.md` of a pruned checkpoint."""
    plan = record.plan
    bare = any(layer.kind in ("ffn", "swiglu") for layer in record.change.new_layers)
    lines = [
        "---",
        f"library_name: {'optimum-streamline' if bare else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [optimum-streamline, layer-pruning]",
        *([] if record.source.is_local else [f"base_model: {record.source.model}"]),
        "---",
        "",
        f"# {record.source.name.rpartition('/')[2]}, pruned",
        "",
        f"optimum-streamline made this model from {_origin(record.source)}: {plan.describe()}.",
        f"The layers were chosen by {_choice(record)}{_chosen_on(record)}.",
    ]
    if plan.corrected:
        first, kind = plan.corrected[0]
        lines.append(
            f"The output projections of all attentions and MLPs that stayed, from the {kind} of original layer {first} "
            "on, were fitted again on this text by least squares, towards the hidden states of the original (after "
            "SPRINT, arXiv 2506.03510)."
        )
    lines += _trainings(record)
    if record.recipe.quantization.quantizer in QUANTIZERS:
        when = "before the layers were chosen" if record.recipe.quantize_first else "after pruning"
        lines.append(
            f"The weights were quantized {when}: {QUANTIZERS[record.recipe.quantization.quantizer].description}."
        )
    elif record.quantized:
        lines.append(
            f"The original is quantized ({record.quantized}). The layers that stayed keep their quantized weights."
        )
    lines += ["", "## Loading", *(_LOADING_BARE if bare else _LOADING).splitlines(), ""]
    if record.change.skipped:
        named = "; ".join(f"layer {index}: {' and '.join(skip)}" for index, skip in record.change.skipped.items())
        lines += [
            f"These sublayers output zeros, and `config.json` names them: {named}. Stock transformers computes the",
            "zeros. `optimum.streamline.load` skips the sublayers, with the same result.",
            "",
        ]
    lines += ["## Layers", "", "| layer | original layers | kind |", "|---|---|---|"]
    for index, layer in enumerate(record.change.new_layers):
        originals = ", ".join(str(original) for original in layer.originals)
        if layer.kind == "packed":
            originals = f"attention of {layer.attention_originals[0]}, MLP of {layer.mlp_originals[0]}"
        corrected = ", corrected" if layer.corrected else ""
        mapped = f", a linear map in its {' and its '.join(layer.mapped)}" if layer.mapped else ""
        lines.append(f"| {index} | {originals} | {layer.kind}{corrected}{mapped} |")
    lines += ["", "`streamline.json` holds the scores, the recipe, the seed and the versions.", ""]
    return "\n".join(lines)


def quantized_card(source: ModelSource, description: str, card: str | None) -> str:
    """The text of the `README.md` of a quantized checkpoint.

    Args:
        source: The source of the float checkpoint.
        description: A description of the quantizer (`Quantizer.description`).
        card: The card of the float checkpoint, which follows below; `None` if it has none.
    """
    head, body = _parts(
        (card and _without_paths(card))
        or f"---\nlibrary_name: transformers\n---\n\n# {source.name.rpartition('/')[2]}\n"
    )
    sentence = f"optimum-streamline quantized this model from {_origin(source)}: {description}."
    return f"{head}{sentence}\n\n{body.lstrip()}"


def _parts(card: str) -> tuple[str, str]:
    """Split a card into its metadata, between lines of `---`, and the rest."""
    match = re.match(r"---\n.*?\n---\n\s*", card, re.DOTALL)
    return (match[0], card[match.end() :]) if match else ("", card)


def _without_paths(card: str) -> str:
    """A card without `base_model` entries that are paths on this machine."""
    head, body = _parts(card)
    return re.sub(r"(?m)^base_model: *['\"]?[/~.].*\n", "", head) + body


def _origin(source: ModelSource) -> str:
    """The public name of a model, and of an adapter's base model."""
    return _named(source) + (f", an adapter merged into {_named(source.base)}" if source.base else "")


def _named(source: ModelSource) -> str:
    """The public name of a model, without its path on this machine, and its commit if it has one."""
    return f"`{source.name}`" + (f" at commit {source.commit}" if source.commit else "")


def _trainings(record: PruningRecord) -> list[str]:
    """One sentence for each training, but one for all layers that were trained on their own."""
    alone = [healed for healed in record.healing if healed.layer is not None]
    sentences = [_training(healed, record) for healed in record.healing if healed.layer is None]
    if not alone:
        return sentences
    layers = layer_ranges(tuple(healed.layer for healed in alone if healed.layer is not None))
    before, after = (
        fmean(losses) for losses in zip(*((each.log.before, each.log.best) for each in alone), strict=True)
    )
    return [
        f"Of this model's layers, {layers} were trained one by one {_trained_on(alone[0], record)}: "
        f"held-out {LOSSES['local']}, their mean, {before:.4g} before, {after:.4g} after.",
        *sentences,
    ]


def _training(healed: HealingResult, record: PruningRecord) -> str:
    trained = "The replacement" if healed.scope == "replacement" else "The whole model"
    rank = healed.settings.lora_rank
    adapters = f" by adapters of rank {rank}, merged into it," if rank else ""
    return (
        f"{trained} was trained{adapters} {_trained_on(healed, record)}: held-out {LOSSES[healed.stage]} "
        f"{healed.log.before:.4g} before, {healed.log.best:.4g} after."
    )


def _trained_on(healed: HealingResult, record: PruningRecord) -> str:
    times = "once" if healed.settings.epochs == 1 else f"up to {healed.settings.epochs} times"
    within = f" within {healed.settings.minutes:g} minutes" if healed.settings.minutes else ""
    share = healed.settings.replaced
    replaced = (
        f", after the first time with {share:.0%} of the tokens replaced by draws of the original" if share else ""
    )
    return f"on {healed.windows} of {_data(record, 'heal')}, each {times}{within}{replaced}"


def _choice(record: PruningRecord) -> str:
    if record.plan.chosen_by:
        citation = CITATIONS[record.plan.chosen_by.partition(" ")[0]]
        if record.plan.trials:
            return f"{citation}, whose model healed best in trial trainings of the methods that `auto` tried"
        return f"{citation}, which had the lowest held-out loss of the methods that `auto` tried"
    return _citation(record.recipe.resolved_method)


def _chosen_on(record: PruningRecord) -> str:
    return f", on {_data(record, 'calibration')}" if "calibration" in record.data else ""


def _citation(method: str) -> str:
    """The paper of a built-in method, or the distribution of a third-party one."""
    if method in CITATIONS:
        return CITATIONS[method]
    origin = method_origin(method)
    summary = f" ({METHODS[method].summary})" if METHODS[method].summary else ""
    return f"`{method}`{summary}, a method of {origin['distribution']} {origin['version']}"


def _data(record: PruningRecord, purpose: str) -> str:
    data = record.data[purpose]
    if sampled := data.get("sampled"):
        source = f"that the original sampled at temperature 1 from prompts of `{_public(sampled['from'])}`"
        return f"{data['windows']} windows of {data['length']} tokens {source}"
    return f"{data['windows']} windows of {data['length']} tokens of `{_public(data['spec'])}`"


def _public(spec: str) -> str:
    """A text SPEC with the path of a local file or folder cut to its name."""
    kind, name, rest = re.fullmatch(r"(hub:)?([^,]*)(.*)", spec, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    if os.path.exists(spec):
        return Path(spec).name
    return f"{kind}{Path(name).name if os.path.exists(name) else name}{rest}"
