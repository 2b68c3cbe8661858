"""The inside of a model in memory: where its decoder layers are in each architecture, which sublayers are skipped,
which modules a quantizer may take, how its weights are stored. Nothing here reads or writes a folder.
"""

__all__ = [
    "architectures",
    "bare_layers",
    "channels",
    "layer_list",
    "linear_modules",
    "module_patterns",
    "offloaded_weights",
    "quantization_config",
    "quantized_weights",
    "skipped_sublayers",
]
