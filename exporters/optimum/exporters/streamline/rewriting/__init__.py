"""Rewrite ONNX graphs: one kind of rewriting per file. Nothing here traces or runs a graph.

After tracing: `repair`, `prune_unused`, `mask`, `attention`, `static_cache` and `public_names`, in this order. On a
finished export: `fuse_for_ort`, `tied_embedding` and `excluded_nodes` for quantizers, and `to_float32`. `edits` has
the small edits that they share.
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
