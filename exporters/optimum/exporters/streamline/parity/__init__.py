"""Whether a graph computes what the model in torch computes: the calls to compare, and the comparison."""

__all__ = ["calls", "compare"]
