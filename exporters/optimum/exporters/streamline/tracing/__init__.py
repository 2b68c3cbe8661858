"""Build the ONNX graph of a torch model without holding its weights in memory.

`trace.py` traces a model that has one layer of each kind. `stamp_layers.py` copies each traced layer to every layer of
its kind. `bind_weights.py` connects the graph to the weights on disk. `build.py` calls them in order.
"""

__all__ = ["bind_weights", "build", "skeleton", "stamp_layers", "trace"]
