"""Compare an exported graph with torch: `model_calls.py` describes model calls as data, `compare.py` runs them."""

__all__ = ["compare", "model_calls"]
