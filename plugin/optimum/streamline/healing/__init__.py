"""Healing, the training that repairs a pruned model: its stages, losses, settings, training loop and checkpoints."""

__all__ = [
    "checks",
    "local",
    "lora",
    "losses",
    "output_cache",
    "self_text",
    "settings",
    "stages",
    "trainable_parts",
    "trainer",
    "training_checkpoints",
    "transformers_trainer",
    "trials",
]
