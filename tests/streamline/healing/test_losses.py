"""What distillation makes of all logits of the original, of the most probable tokens, and of drawn tokens."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from optimum.streamline.healing import losses
from optimum.streamline.healing.losses import AllLogits, Distillation, NextToken, SampledTokens, TopTokens, outputs_of
from tiny import LAYERS, tiny_model, token_ids


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def exact(target: torch.Tensor, logits: torch.Tensor) -> float:
    p, q = (each.double().log_softmax(-1) for each in (target, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_all_logits_give_the_divergence() -> None:
    target, logits = random_logits(0, 2, 5, 30), random_logits(1, 2, 5, 30)
    assert float(AllLogits(target).divergence(logits)) == pytest.approx(exact(target, logits), rel=1e-5)


@pytest.mark.parametrize("kept", [1, 7, 29])
def test_top_tokens_give_the_divergence_over_them_and_the_rest(kept: int) -> None:
    target, logits = random_logits(0, 2, 5, 30), random_logits(1, 2, 5, 30).requires_grad_()
    top = target.log_softmax(-1).topk(kept)
    p, q = target.double().softmax(-1), logits.detach().double().softmax(-1)
    expected = 0.0
    for window, position in np.ndindex(2, 5):
        named = top.indices[window, position].tolist()
        pairs = [(float(p[window, position, token]), float(q[window, position, token])) for token in named]
        pairs.append((1 - sum(there for there, _ in pairs), 1 - sum(here for _, here in pairs)))
        expected += sum(there * math.log(there / here) for there, here in pairs) / 10
    found = TopTokens(top.indices, top.values).divergence(logits)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert float(found) <= exact(target, logits.detach()) + 1e-6
    found.backward()
    assert logits.grad.isfinite().all()


def test_top_tokens_that_have_all_the_probability_leave_nothing_to_the_rest() -> None:
    target = torch.full((1, 1, 8), -1e4)
    target[..., :2] = 0
    logits = random_logits(1, 1, 1, 8).requires_grad_()
    top = target.log_softmax(-1).topk(2)
    found = TopTokens(top.indices, top.values).divergence(logits)
    assert float(found) == pytest.approx(exact(target, logits.detach()), rel=1e-5)
    found.backward()
    assert logits.grad.isfinite().all()


def test_drawn_tokens_estimate_the_divergence_and_its_gradient_without_bias() -> None:
    target, logits = random_logits(0, 1, 400, 12), random_logits(1, 1, 400, 12).requires_grad_()
    log_probabilities = target.log_softmax(-1)
    draws = torch.multinomial(log_probabilities.exp()[0], 50, replacement=True, generator=torch.Generator())[None]
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    found = SampledTokens(draws, entropy).divergence(logits)
    terms = (log_probabilities.detach() - logits.detach().log_softmax(-1)).gather(-1, draws)
    assert float(found) == pytest.approx(exact(target, logits.detach()), abs=4 * float(terms.std()) / math.sqrt(20_000))
    [drawn] = torch.autograd.grad(found, logits)
    [true] = torch.autograd.grad(AllLogits(target).divergence(logits), logits)
    assert torch.allclose(drawn.mean(1), true.mean(1), atol=4 * float((drawn - true).std()) / 20)


TARGETS = {
    "all": AllLogits,
    "top": lambda logits: TopTokens(*reversed(logits.log_softmax(-1).topk(5))),
    "sampled": lambda logits: SampledTokens(logits.topk(3).indices, logits.softmax(-1).sum(-1)),
}


@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_a_part_of_the_tokens_is_that_of_all_windows(kind: str) -> None:
    target, logits = random_logits(0, 2, 5, 30), random_logits(1, 2, 5, 30)
    whole, flat = TARGETS[kind](target), logits.flatten(0, 1)[None]
    parts = [float(whole.part(slice(at, at + 3)).divergence(flat[:, at : at + 3])) for at in (0, 3, 6)]
    last = float(whole.part(slice(9, 10)).divergence(flat[:, 9:]))
    assert float(whole.divergence(logits)) == pytest.approx((3 * sum(parts) + last) / 10, rel=1e-5)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "llama"])  # capped logits, learned positions, an own head
@pytest.mark.parametrize("loss", ["next token", "distillation"])
def test_a_loss_by_few_tokens_is_that_of_all(architecture: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, ids, results, seen = tiny_model(architecture), token_ids(2, 12), [], list[int]()
    depths = tuple(range(1, LAYERS + 1))
    healing = (
        NextToken() if loss == "next token" else Distillation(partial(outputs_of, teacher), depths, kl=0.7, hidden=2.0)
    )
    for at_once in (losses.LOGITS, 5 * teacher.config.vocab_size):
        monkeypatch.setattr(losses, "LOGITS", at_once)
        model = tiny_model(architecture, seed=3).requires_grad_(True)
        hook = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
        value = healing.loss(model, ids)
        value.backward()
        hook.remove()
        results.append([value, *(parameter.grad for parameter in model.parameters())])
    assert seen[0] == 12
    # One token in the pass through the layers; then 24 tokens, and again for the gradient.
    assert sorted(seen[1:]) == [1, 4, 4, *[5] * 8]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_divergences_by_few_tokens_are_those_of_whole_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    original, model, ids = tiny_model(), tiny_model(seed=3), token_ids(3, 12)
    whole, seen = losses.window_divergences(original, model, ids), list[int]()
    monkeypatch.setattr(losses, "LOGITS", 5 * original.config.vocab_size)
    for each in (original, model):
        each.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.numel()))
    parts = losses.window_divergences(original, model, ids)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)
    assert parts.dtype == torch.float64
    assert max(seen) <= losses.LOGITS
