"""The pruning methods: one table, one file each."""

from __future__ import annotations

from transformers import PreTrainedConfig

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.bare_layers import refuse_bare
from optimum.streamline.recipe.recipe import Recipe

from .auto import Auto
from .average import Average
from .base import Method
from .blockpruner import BlockPruner
from .come import CoMe, CoMeMp, CoMeSp
from .come_p import CoMeP
from .explicit import Explicit
from .gromov import Gromov
from .layerchop import LayerChop
from .llm_streamline import LLMStreamline
from .shortened_ppl import ShortenedPPL
from .shortened_taylor import ShortenedTaylor
from .shortgpt import ShortGPT
from .sleb import SLEB

METHODS: dict[str, Method] = {
    "auto": Auto(),
    "average": Average(),
    "blockpruner": BlockPruner(),
    "come": CoMe(),
    "come-mp": CoMeMp(),
    "come-p": CoMeP(),
    "come-sp": CoMeSp(),
    "explicit": Explicit(),
    "gromov": Gromov(),
    "layerchop": LayerChop(),
    "llm-streamline": LLMStreamline(),
    "shortened-ppl": ShortenedPPL(),
    "shortened-taylor": ShortenedTaylor(),
    "shortgpt": ShortGPT(),
    "sleb": SLEB(),
}


def method_of(recipe: Recipe, config: PreTrainedConfig) -> Method:
    """The method a recipe names, after it has checked the recipe against a model of this config.

    Raises:
        StreamlineError: there is no such method, or it cannot follow the recipe.
    """
    if recipe.resolved_method not in METHODS:
        raise StreamlineError(f"method {recipe.pruning.method!r}: unknown; known are {', '.join(METHODS)}")
    method = METHODS[recipe.resolved_method]
    refuse_bare(config)
    _check_options(recipe, method)
    method.check(recipe, config)
    return method


def _check_options(recipe: Recipe, method: Method) -> None:
    for field in ("iterative", "protect", "pattern"):
        value = recipe.option(field)
        if value and field not in method.options:
            having = [name for name, other in METHODS.items() if field in other.options]
            raise StreamlineError(
                f"{field} {value!r}: method {recipe.resolved_method} has no such choice; {_has(having)}"
            )


def _has(names: list[str]) -> str:
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'}"
