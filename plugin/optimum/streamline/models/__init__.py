"""Models in memory: their architecture, their layers and sublayers, their linear modules and their quantized weights.

Nothing here reads a checkpoint or text.
"""

__all__ = [
    "architectures",
    "bare_layers",
    "channels",
    "kept_tensor",
    "layer_list",
    "linear_modules",
    "module_patterns",
    "offloaded_weights",
    "quantization_config",
    "quantized_weights",
    "removed_sublayers",
    "sharded_weights",
    "skipped_sublayers",
]
