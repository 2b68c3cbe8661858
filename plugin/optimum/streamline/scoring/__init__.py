"""Importance scores of layers and channels: from hidden states, the loss after a removal, gradients, or activations.

Methods in `methods/` choose layers by these scores.
"""

__all__ = ["ablation", "channel_sensitivity", "loss", "merge_search", "race", "similarity", "taylor"]
