"""The names of our own pruning methods, each with one line for the help. Imports nothing, to keep `--help` fast."""

METHOD_SUMMARIES = {
    "auto": "the default: the plan that heals best, of shifted, blockpruner, come-p, sleb and shortgpt",
    "average": "merges the same neighbours as come, by averaging their weights (baseline in 2510.15304)",
    "blockpruner": "removes single attentions and MLPs by loss, so that whole layers are left (2406.10594)",
    "come": "merges the two most similar neighbours by their most sensitive channels, step by step (2510.15304)",
    "come-mp": "as come, with a distillation after each merge (2510.15304)",
    "come-p": "as come, with the best of 21 ratios for each merge, by loss on the calibration text (2510.15304)",
    "come-sp": "as come, with one distillation at the end (2510.15304)",
    "explicit": "removes the layers of --layers, such as 3,7,11-13",
    "gromov": "removes or replaces the block with the least angle from input to output at last tokens (2403.17887)",
    "layerchop": "removes layers by position: evenly spread, or near input, output, middle or both ends (2305.14864)",
    "llm-streamline": "removes or replaces the block with the highest cosine of input and output (2403.19135)",
    "shifted": "removes an attention and an MLP side by side, of one layer or of two, by loss (as sleb, 2402.09025)",
    "shortened-ppl": "removes, all at once, the layers whose single removal gives the lowest perplexity (2402.02834)",
    "shortened-taylor": "removes, all at once, the layers with the lowest sum of |weight x gradient| (2402.02834)",
    "shortgpt": "removes the layers with the lowest Block Influence, all at once or iteratively (2403.03853)",
    "sleb": "removes one layer at a time, the one whose removal raises the loss least (2402.09025)",
}
"""One line on each method, by its name in `registry.METHODS`. The numbers are arXiv ids."""
