"""Compare an exported graph with the torch model: `calls.py` has the form of a call, `compare.py` the comparison."""

__all__ = ["calls", "compare"]
