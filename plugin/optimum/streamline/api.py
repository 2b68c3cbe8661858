"""The Python API, in Optimum's form: `Streamliner.from_pretrained(model).streamline(save_dir, config)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum.configuration_utils import BaseConfig

from optimum.streamline.checkpoints.loading import read_config
from optimum.streamline.checkpoints.source import ModelSource
from optimum.streamline.evaluation.results import Report
from optimum.streamline.pipeline.run import run
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.recipe.recipe import Recipe


class StreamlineConfig(BaseConfig):
    """A recipe in Optimum's form: saved beside the model as `streamline_config.json`.

    Args:
        fields: Groups of `Recipe`, such as `healing={"tokens": 100_000}`, or flags, such as `remove="25%"`.

    Raises:
        StreamlineError: a field is unknown or out of range.
    """

    CONFIG_NAME = "streamline_config.json"
    FULL_CONFIGURATION_FILE = "streamline_config.json"

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.recipe: Recipe = make_recipe(fields, "StreamlineConfig")

    def to_dict(self) -> dict[str, Any]:
        """The recipe's fields that differ from their defaults, and its text."""
        return self.recipe.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: a recipe already leaves its defaults out."""
        return self.recipe.to_dict()


class Streamliner:
    """Makes a causal language model shallower, repairs it, exports it and proves what it cost."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> Streamliner:
        """Name the original: a checkpoint's folder, or a Hub id, of which `revision` is a branch, tag or commit.

        Raises:
            StreamlineError: it is not a model, or one that cannot be handled.
        """
        source = ModelSource(str(model), cache_dir, trust_remote_code, revision)
        read_config(source)
        return cls(source)

    def streamline(self, save_dir: str | Path, config: StreamlineConfig, *, overwrite: bool = False) -> Report:
        """Do what `optimum-cli streamline run` does, into `save_dir`, and save `config` there.

        Returns:
            The report; `report.verdict.passed` says whether the result is within `config`'s budget.

        Raises:
            StreamlineError: bad input; nothing is written then.
        """
        out = Path(save_dir)
        report = run(self._source, config.recipe, out, overwrite=overwrite, verbose=False, notify=_silent)
        config.save_pretrained(out)
        return report


def _silent(message: str) -> None:
    """A library does not print."""
