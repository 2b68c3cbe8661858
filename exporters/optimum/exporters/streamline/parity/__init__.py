"""Compare an exported graph with the torch model: `calls.py` describes model calls as data, `compare.py` runs them."""

__all__ = ["calls", "compare"]
