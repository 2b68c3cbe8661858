"""Repairing a pruned model by training: the order of the trainings, their losses and settings, the training loop, and
its checkpoints.
"""

__all__ = ["checks", "lora", "losses", "settings", "stages", "trainable_parts", "trainer", "training_checkpoints"]
