"""Repairing a model by training: a replacement alone, or the edited model or a part of it."""

from .checks import check_heal_windows, check_healing
from .engine import split_windows
from .goals import BlockOutput, Distillation, Goal, NextToken
from .settings import (
    HealLog,
    HealSettings,
    HealStep,
    default_lora_lr,
    default_lr,
    default_model_lr,
    heal_windows,
    model_settings,
    replacement_settings,
)
from .stages import Healed, Healer
from .training import train_model, train_replacement

__all__ = [
    "BlockOutput",
    "Distillation",
    "Goal",
    "HealLog",
    "HealSettings",
    "HealStep",
    "Healed",
    "Healer",
    "NextToken",
    "check_heal_windows",
    "check_healing",
    "default_lora_lr",
    "default_lr",
    "default_model_lr",
    "heal_windows",
    "model_settings",
    "replacement_settings",
    "split_windows",
    "train_model",
    "train_replacement",
]
