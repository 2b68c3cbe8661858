"""What of healing a recipe cannot ask for: training what is not there, or settings of a training it does not have."""

from __future__ import annotations

from optimum.streamline.editing.plan import TRAINED
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.recipe.layer_counts import parse_remove
from optimum.streamline.recipe.recipe import Recipe

from .settings import heal_windows, scope_of
from .trainer import check_sharing

# Fields of the recipe that say how and on what is trained, whatever to.
_OF_ANY_TRAINING = ("heal_data", "heal_tokens", "heal_minutes", "heal_lr", "heal_epochs", "heal_batch")


def check_healing(recipe: Recipe) -> None:
    """Refuse what a recipe says of trainings that it does not have: it would be passed over in silence.

    With `heal: none` spelled out, how and on what the other trainings would be is no mistake.

    Raises:
        StreamlineError: naming the field, the value and what would be right.
    """
    _check_what_is_trained(recipe)
    _check_distillation(recipe)
    told = recipe.told_options()
    needed = [("heal_scope", {"lm", "distill"}), ("heal_normalised", {"hidden-mse"})]
    if recipe.healing.trainings is None:
        needed += [(field, {"hidden-mse", "lm", "distill"}) for field in _OF_ANY_TRAINING]
    for field, goals in needed:
        if field in told and not goals & set(recipe.resolved_trainings):
            having = "nothing" if not recipe.resolved_trainings else " and ".join(recipe.resolved_trainings)
            raise StreamlineError(
                f"{field.replace('_', '-')} {recipe.option(field)!r}: {having} is trained to; "
                f"it is of heal {' or '.join(sorted(goals))}"
            )
    if "lora_rank" in told and not recipe.healing.lora:
        raise StreamlineError(f"lora-rank {recipe.healing.lora_rank}: there are no adapters; add lora")


def check_heal_windows(recipe: Recipe, layers: int) -> None:
    """Refuse trainings that would find too few windows, or a batch that the processes cannot share.

    Args:
        recipe: One that its method has checked.
        layers: The original's.

    Raises:
        StreamlineError: naming the field, the value and what would be right.
    """
    if recipe.resolved_trainings:
        stepwise = METHODS[recipe.resolved_method].stepwise
        trainings = parse_remove(str(recipe.pruning.remove), layers) if stepwise else 1
        windows = heal_windows(recipe.healing.tokens, recipe.length)
        check_sharing(windows, recipe.healing.batch, recipe.healing.epochs, trainings)


def _check_what_is_trained(recipe: Recipe) -> None:
    trained, one_of = recipe.resolved_replacement in TRAINED, ", ".join(TRAINED)
    if "hidden-mse" in recipe.resolved_trainings and not trained:
        raise StreamlineError(
            f"heal {recipe.healing.trainings!r}: hidden-mse trains a replacement; use replacement {one_of}"
        )
    if recipe.healing.scope == "replacement" and not trained:
        raise StreamlineError(f"heal-scope 'replacement': there is none; use replacement {one_of}, or scope model")
    if recipe.healing.lora and (
        recipe.healing.scope == "replacement" or not {"lm", "distill"} & set(recipe.resolved_trainings)
    ):
        raise StreamlineError("lora: adapters are trained by heal lm or distill with heal-scope model")
    scopes = [scope_of(recipe, number, trained) for number in range(len(recipe.resolved_trainings))]
    if recipe.healing.lora and recipe.resolved_replacement in ("ffn", "swiglu") and "replacement" not in scopes:
        raise StreamlineError(
            f"lora: adapters alone would leave the {recipe.resolved_replacement}'s own weights random; "
            f"train them first, as heal hidden-mse+{recipe.resolved_trainings[-1]} does"
        )


def _check_distillation(recipe: Recipe) -> None:
    for field in ("heal_kl", "heal_hidden"):
        if recipe.option(field) is not None and "distill" not in recipe.resolved_trainings:
            raise StreamlineError(f"{field.replace('_', '-')} {recipe.option(field)}: is of heal distill only")
    if recipe.pruning.method in ("come-sp", "come-mp") and "distill" not in recipe.resolved_trainings:
        raise StreamlineError(
            f"heal {recipe.healing.trainings!r}: method {recipe.pruning.method} is come and its distillation; "
            "use heal distill, or method come"
        )
    if (recipe.healing.kl, recipe.healing.hidden) == (0, 0):
        raise StreamlineError("heal-kl 0 and heal-hidden 0: nothing of the original is left in heal distill; use lm")
