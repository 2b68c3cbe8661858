"""Versions of a text in which tokens are replaced by others that a model finds likely in their places.

A small text that a training reads several times is learned by heart. Each version is new to the training, and the
original's outputs on it are as good a lesson as those on the text itself.

Scheduled sampling (Bengio et al., arXiv 1506.03099) replaces tokens by draws too, but of the model that is trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.sharded_weights import is_sharded
from optimum.streamline.system.distributed import from_main, is_main
from optimum.streamline.system.progress import progress_bar

from .windows import logit_batch, window_generator


def versions_of(
    model: PreTrainedModel, ids: torch.Tensor, count: int, share: float, seed: int, file: Path | None = None
) -> torch.Tensor:
    """Make versions of windows. In each, every token but the first of a window is replaced with probability `share`.

    The new token is drawn from the model's distribution after the tokens before it, in the text as it was given. The
    model runs once on each window. In a distributed run every process gets what the main process draws; of a model that
    they share, all must call this.

    Args:
        model: The model, in evaluation mode.
        ids: Token ids `[windows, length]`.
        count: The number of versions.
        share: The probability that a token is replaced, 0 to 1.
        seed: The seed of all draws. The versions of a window do not depend on the other windows, but for rounding.
        file: Where the versions are kept; if it exists, they are read from it.

    Returns:
        Token ids `[count, windows, length]`, on the CPU.

    Raises:
        StreamlineError: logits of the model are not finite.
    """
    if file is not None and from_main(file.exists()):
        return load_file(file)["versions"].long()
    versions = ids.cpu().repeat(count, 1, 1)
    vocabulary = model.config.get_text_config().vocab_size
    at_once = logit_batch(ids.shape[1], vocabulary)
    with progress_bar("drawing tokens", len(ids)) as bar:
        for places in torch.arange(len(ids)).split(at_once):
            draws = is_main() or is_sharded(model)
            drawn = _draw(model, ids[places], places, count, share, seed) if draws else versions[:, places]
            versions[:, places] = from_main(drawn)  # few windows at a time: a long wait for the main process would fail
            bar.advance(len(places))
    if file is not None and is_main():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"versions": versions.int()}, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)
    return versions


@torch.no_grad()
def _draw(
    model: PreTrainedModel, ids: torch.Tensor, places: torch.Tensor, count: int, share: float, seed: int
) -> torch.Tensor:
    """The versions `[count, windows, length]` of some windows, which are number `places` of the text."""
    logits = model(ids.to(model.device), use_cache=False).logits[:, :-1].float()
    if not bool(logits.isfinite().all()):
        raise StreamlineError("model: its logits are not finite on the healing text; check its weights")
    probabilities = logits.softmax(-1)
    versions = ids.cpu().repeat(count, 1, 1)
    for window, place in enumerate(places.tolist()):
        generator = window_generator(seed, place)
        drawn = torch.multinomial(probabilities[window].cpu(), count, replacement=True, generator=generator).T
        replaced = torch.rand(drawn.shape, generator=generator) < share
        versions[:, window, 1:] = torch.where(replaced, drawn, versions[:, window, 1:])
    return versions
