"""From a model in torch to an ONNX graph without weights in memory: trace one layer of each kind, copy it to every
place, bind the weights on disk.
"""

__all__ = ["bind_weights", "build", "skeleton", "stamp_layers", "trace"]
