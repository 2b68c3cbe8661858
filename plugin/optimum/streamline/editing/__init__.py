"""Changing a model's layers in place: what a `Plan` says, and how layers are removed, merged, replaced, or patched by
a linear map.
"""

__all__ = ["apply", "linear_map", "merging", "plan"]
