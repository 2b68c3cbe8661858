"""The names of the pruning methods, each with one line for the help. Light: a command reads it to print its help."""

METHOD_SUMMARIES = {
    "auto": "the default: blockpruner or come-p, unhealed also linear maps, by held-out loss; then heal distill",
    "average": "the same neighbours as come, their weights averaged (baseline of 2510.15304)",
    "blockpruner": "attentions and MLPs, one at a time by loss, to the weight of so many layers (2406.10594)",
    "come": "the two neighbours most alike merged by their channels, step by step (2510.15304)",
    "come-mp": "as come, healed by a distillation after each merge (2510.15304)",
    "come-p": "as come, the ratio of each merge by trying 21 of them on calibration text (2510.15304)",
    "come-sp": "as come, then healed by one distillation (2510.15304)",
    "explicit": "the layers given by --layers, such as 3,7,11-13",
    "gromov": "the block of least angular distance on last tokens, removed or replaced (2403.17887)",
    "layerchop": "layers by their place: evenly spread, or near input, output, middle or both (2305.14864)",
    "llm-streamline": "the block of highest input-output cosine, removed or replaced (2403.19135)",
    "shortened-ppl": "the layers without each of which perplexity is lowest, all at once (2402.02834)",
    "shortened-taylor": "the layers of lowest sum of |weight x gradient|, all at once (2402.02834)",
    "shortgpt": "the layers of lowest Block Influence, all at once or iteratively (2403.03853)",
    "sleb": "one layer at a time, each time the one whose loss hurts least (2402.09025)",
}
"""One line on each method, by its name in `registry.METHODS`. Numbers are those of the papers on arXiv."""
