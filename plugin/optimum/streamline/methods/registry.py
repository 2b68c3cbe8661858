"""All pruning methods by name: our own, one file each, and the methods of other packages."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from optimum.streamline.errors import StreamlineError, first_line
from optimum.streamline.models.bare_layers import refuse_bare
from optimum.streamline.recipe.recipe import OPTIONS, Recipe

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
from .shifted import Shifted
from .shortened_ppl import ShortenedPPL
from .shortened_taylor import ShortenedTaylor
from .shortgpt import ShortGPT
from .sleb import SLEB
from .third_party import ThirdPartyMethod, third_party_methods

BUILT_IN: dict[str, Method] = {
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
    "shifted": Shifted(),
    "shortened-ppl": ShortenedPPL(),
    "shortened-taylor": ShortenedTaylor(),
    "shortgpt": ShortGPT(),
    "sleb": SLEB(),
}


class _Methods(Mapping[str, Method]):
    """Every method by name. A third-party method is imported when it is looked up."""

    def __getitem__(self, name: str) -> Method:
        """The method of this name.

        Raises:
            KeyError: there is none.
            StreamlineError: several methods have the name, or the registered object is not a method.
        """
        registered = [each for each in third_party_methods() if each.name == name]
        if name in BUILT_IN:
            if registered:
                raise StreamlineError(
                    f"method {name!r}: {registered[0].package} registers this name, but it belongs to a "
                    f"method of optimum-streamline; uninstall {registered[0].distribution}, or rename its method"
                )
            return BUILT_IN[name]
        if not registered:
            raise KeyError(name)
        if len(registered) > 1:
            packages = " and ".join(each.package for each in registered)
            raise StreamlineError(f"method {name!r}: {packages} each register this name; uninstall all but one")
        return _made(registered[0])

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*BUILT_IN, *(each.name for each in third_party_methods())]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return any(each == name for each in self)


METHODS: Mapping[str, Method] = _Methods()


def _made(registered: ThirdPartyMethod) -> Method:
    """Import a third-party method, check it, and make an instance."""
    where = f"method {registered.name!r} of {registered.package}"
    try:
        found: Any = registered.entry_point.load()
    except Exception as error:  # third-party code may raise anything
        raise StreamlineError(
            f"{where}: cannot be imported ({type(error).__name__}: {first_line(error)}); repair or uninstall "
            f"{registered.distribution}"
        ) from error
    value = registered.entry_point.value
    if not (inspect.isclass(found) and issubclass(found, Method)):
        raise StreamlineError(f"{where}: {value} must be a subclass of optimum.streamline.methods.base.Method")
    missing = [*sorted(found.__abstractmethods__), *(["summary"] if not getattr(found, "summary", "") else [])]
    if missing:
        raise StreamlineError(f"{where}: {value} must define {' and '.join(missing)}")
    try:
        made: Method = found()
    except Exception as error:
        raise StreamlineError(
            f"{where}: {value}() must work without arguments ({type(error).__name__}: {first_line(error)})"
        ) from error
    return made


def method_of(recipe: Recipe, config: PreTrainedConfig) -> Method:
    """The recipe's method, after it has checked the recipe against the config of the model.

    Raises:
        StreamlineError: there is no such method, or it does not support the recipe.
    """
    if recipe.resolved_method not in METHODS:
        raise StreamlineError(f"method {recipe.pruning.method!r}: unknown; known are {', '.join(METHODS)}")
    method = METHODS[recipe.resolved_method]
    refuse_bare(config)
    _check_options(recipe, method)
    method.check(recipe, config)
    return method


def _check_options(recipe: Recipe, method: Method) -> None:
    for field in ("iterative", "protect", "pattern", "packed"):
        value = recipe.option(field)
        if value != OPTIONS[field].default and field not in method.options:
            having = [name for name, other in METHODS.items() if field in other.options]
            raise StreamlineError(
                f"{field} {value!r}: method {recipe.resolved_method} does not have this option; {_has(having)}"
            )


def _has(names: list[str]) -> str:
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'}"
