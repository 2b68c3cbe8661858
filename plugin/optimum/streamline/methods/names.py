"""The names of the pruning methods, each with one line for the help. Light, because `--help` imports it."""

METHOD_SUMMARIES = {
    "auto": "the default: blockpruner, come-p or (unhealed) linear maps, by held-out loss; heals by distill",
    "average": "merges the same neighbours as come by averaging their weights (baseline of 2510.15304)",
    "blockpruner": "removes attentions and MLPs one at a time by loss, as many weights as the layers have (2406.10594)",
    "come": "merges the two most similar neighbours by their channels, step by step (2510.15304)",
    "come-mp": "as come, with a distillation after each merge (2510.15304)",
    "come-p": "as come, with the best of 21 ratios for each merge, by loss on the calibration text (2510.15304)",
    "come-sp": "as come, with one distillation at the end (2510.15304)",
    "explicit": "removes the layers of --layers, such as 3,7,11-13",
    "gromov": "removes or replaces the block of lowest angular distance on last tokens (2403.17887)",
    "layerchop": "removes layers by position: evenly spread, or near input, output, middle or both ends (2305.14864)",
    "llm-streamline": "removes or replaces the block of highest input-output cosine (2403.19135)",
    "shortened-ppl": "removes the layers whose single removal gives the lowest perplexity, all at once (2402.02834)",
    "shortened-taylor": "removes the layers of lowest sum of |weight x gradient|, all at once (2402.02834)",
    "shortgpt": "removes the layers of lowest Block Influence, all at once or iteratively (2403.03853)",
    "sleb": "removes one layer at a time, each time the one whose removal raises the loss least (2402.09025)",
}
"""One line on each method, by its name in `registry.METHODS`. Numbers are those of the papers on arXiv."""
