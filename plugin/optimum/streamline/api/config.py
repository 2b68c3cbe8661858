"""A recipe in Optimum's form."""

from __future__ import annotations

from typing import Any

from optimum.configuration_utils import BaseConfig

from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.recipe.recipe import Recipe


class StreamlineConfig(BaseConfig):
    """A recipe in Optimum's form: saved beside the model as `streamline_config.json`.

    Args:
        fields: The fields of `Recipe`, such as `remove="25%", replacement="mlp"`.

    Attributes:
        recipe: The recipe that the fields amount to.
        fields: The fields as they were given.

    Raises:
        StreamlineError: a field is unknown or out of range.

    >>> StreamlineConfig(remove="25%", method="shortgpt").recipe.pruning.method
    'shortgpt'
    """

    CONFIG_NAME = "streamline_config.json"
    FULL_CONFIGURATION_FILE = "streamline_config.json"

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.recipe: Recipe = make_recipe(fields, "StreamlineConfig")
        self.fields: dict[str, Any] = fields

    def to_dict(self) -> dict[str, Any]:
        """The recipe's fields that differ from their defaults, and its text."""
        return self.recipe.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: a recipe already leaves its defaults out."""
        return self.recipe.to_dict()

    def __repr__(self) -> str:
        return f"StreamlineConfig({', '.join(f'{name}={value!r}' for name, value in self.fields.items())})"
