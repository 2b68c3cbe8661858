"""Rewrite ONNX graphs: one kind of rewriting per file. Nothing here traces or runs a graph.

After tracing: `fix_types`, `prune_unused`, `mask`, `attention`, `static_cache` and `public_names`, in this order. On a
finished export: `fuse_for_ort`, `tied_embedding` and `excluded_nodes` for quantizers, and `to_float32`. `graph_helpers`
has the small edits that they share.
"""

__all__ = [
    "attention",
    "excluded_nodes",
    "fix_types",
    "fuse_for_ort",
    "graph_helpers",
    "mask",
    "prune_unused",
    "public_names",
    "static_cache",
    "tied_embedding",
    "to_float32",
]
