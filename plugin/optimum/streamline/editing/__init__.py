"""The plan of an edit, and the edits: removing, merging and replacing layers, and folding in linear maps."""

__all__ = ["apply", "linear_map", "merging", "plan"]
