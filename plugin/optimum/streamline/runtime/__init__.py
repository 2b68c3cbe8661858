"""Running models in any runtime: the `Runner` protocol, its torch implementation, and `open_runner`."""

__all__ = ["opening", "runner", "torch_runner"]
