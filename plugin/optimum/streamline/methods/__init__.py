"""The pruning methods, one file each. `base.py` defines the interface, `registry.py` lists the methods by name."""

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
    "protected_ends",
    "registry",
    "shortened_ppl",
    "shortened_taylor",
    "shortgpt",
    "sleb",
]
