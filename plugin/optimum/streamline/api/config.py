"""A recipe in Optimum's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum.configuration_utils import BaseConfig

from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.parsing import given_options, make_recipe, read_recipe, write_recipe
from optimum.streamline.recipe.recipe import OPTIONS, Recipe
from optimum.streamline.system.atomic_output import write_file


class StreamlineConfig(BaseConfig):
    """The options of a run, as a config of Optimum: saved beside the model as `streamline_config.json`.

    An option is given by the name of its flag with underscores, or in its group. A group is a mapping, or an instance
    of its class; an instance sets every option of its group.

    Args:
        fields: The options, such as `remove="25%"`, `healing={"tokens": 1000}` or `pruning=Pruning(remove="25%")`.

    Attributes:
        recipe: The same options as a `Recipe`, with the defaults.
        fields: The options as they were given.

    Raises:
        StreamlineError: an option is unknown, given twice, or out of range.

    >>> StreamlineConfig(remove="25%", method="shortgpt").recipe.pruning.method
    'shortgpt'
    >>> config = StreamlineConfig(layers="5-8", calibration="stdlib", evaluation={"data": "stdlib", "samples": 8})
    >>> print(config.to_yaml_string(), end="")
    pruning:
      layers: 5-8
    calibration:
      data: stdlib
    evaluation:
      data: stdlib
      samples: 8
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

    @classmethod
    def from_yaml_file(cls, path: str | Path) -> StreamlineConfig:
        """Read a recipe file, such as the RECIPE of `optimum-cli streamline run -m MODEL RECIPE OUT`.

        Raises:
            StreamlineError: the file cannot be read or is not YAML, or an option is unknown or out of range.
        """
        fields = read_recipe(Path(path))
        make_recipe(fields, f"recipe {path}")  # names the file in the message
        return cls(**fields)

    def to_yaml_string(self) -> str:
        """The recipe as YAML: the options that differ from their defaults, in their groups."""
        return write_recipe(self.recipe)

    def to_yaml_file(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the recipe as a YAML file, which `from_yaml_file` and the command line read.

        Raises:
            StreamlineError: the file exists and `overwrite` is false, or it cannot be written.
        """
        if Path(path).exists() and not overwrite:
            raise StreamlineError(f"output {path}: exists already; choose another, or give overwrite=True")
        write_file(Path(path), self.to_yaml_string())

    def __repr__(self) -> str:
        return f"StreamlineConfig({', '.join(f'{name}={value!r}' for name, value in self.fields.items())})"


def recipe_of(config: StreamlineConfig | Recipe) -> Recipe:
    """The recipe of a config; a recipe is its own."""
    return config if isinstance(config, Recipe) else config.recipe


def given_keys(config: StreamlineConfig | Recipe) -> list[str]:
    """The options that a config sets, by the names of their flags with underscores.

    A recipe does not know what was given. It sets what differs from the default, and its whole `healing`.
    """
    if isinstance(config, StreamlineConfig):
        return list(given_options(config.fields, "StreamlineConfig"))
    differing = {key for key, option in OPTIONS.items() if config.option(key) != option.default}
    return [key for key, option in OPTIONS.items() if option.group == "healing" or key in differing]
