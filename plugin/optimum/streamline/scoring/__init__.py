"""How much each layer matters: from the hidden states, from the loss without it, from gradients, and from its
channels.
"""

__all__ = ["ablation", "channel_sensitivity", "loss", "merge_search", "similarity", "taylor"]
