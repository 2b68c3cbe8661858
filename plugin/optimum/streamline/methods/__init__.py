"""The pruning methods, one file each. `base.py` says how to write one, `registry.py` lists them."""

__all__ = [
    "auto",
    "average",
    "base",
    "blockpruner",
    "come",
    "come_p",
    "contiguous_block",
    "explicit",
    "gromov",
    "layerchop",
    "llm_streamline",
    "names",
    "protected_ends",
    "registry",
    "shifted",
    "shortened_ppl",
    "shortened_taylor",
    "shortgpt",
    "sleb",
    "third_party",
]
