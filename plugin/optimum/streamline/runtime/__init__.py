"""Running a model, whatever it runs on: the `Runner` protocol, its implementation in torch, and `open_runner`, which
finds the right one.
"""

__all__ = ["opening", "runner", "torch_runner"]
