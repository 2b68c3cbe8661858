"""Rewriting of graphs, one kind a file: repair, removal of what nothing reads, attention and its mask, static caches,
names. Nothing here runs a graph.
"""

__all__ = [
    "attention",
    "edits",
    "excluded_nodes",
    "fuse_for_ort",
    "mask",
    "prune_unused",
    "public_names",
    "repair",
    "static_cache",
    "tied_embedding",
    "to_float32",
]
