"""The plan of an edit, and the edits: removing, merging and replacing layers, linear maps and corrections."""

__all__ = [
    "apply",
    "candidate_corrections",
    "correction",
    "linear_map",
    "merging",
    "packing",
    "plan",
    "residual_stream",
    "state_files",
]
