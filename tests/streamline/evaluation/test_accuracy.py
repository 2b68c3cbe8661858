"""Accuracy, compared with a slow float64 computation, and for models whose logits are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation import accuracy
from optimum.streamline.evaluation.accuracy import Accuracy, compare, measure_accuracy
from optimum.streamline.runtime.opening import open_runner
from optimum.streamline.runtime.runner import Logits, TokenIds
from optimum.streamline.text.windows import Windows
from tiny import VOCABULARY, tiny_model, token_ids


class TableRunner:
    """A bigram model: the logits of a token are a row of a table."""

    runtime = "table"

    def __init__(self, table: Logits) -> None:
        self.table = table
        self.calls = 0

    def prefill(self, input_ids: TokenIds) -> tuple[Logits, Any]:
        self.calls += 1
        return self.table[input_ids], None

    def decode(self, input_ids: TokenIds, cache: Any) -> tuple[Logits, Any]:
        return self.table[input_ids], cache


def table(seed: int, vocabulary: int = 11) -> Logits:
    return np.random.default_rng(seed).normal(0, 3, (vocabulary, vocabulary)).astype(np.float32)


def windows(count: int = 6, length: int = 9, vocabulary: int = 11) -> Windows:
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return Windows(ids, "random")


def literal(original: Logits, candidate: Logits, ids: list[int]) -> tuple[float, float, float]:
    """The definitions, one token and one probability at a time."""

    def probabilities(row: Logits) -> list[float]:
        weights = [math.exp(float(value) - float(row.max())) for value in row]
        return [weight / sum(weights) for weight in weights]

    loss = kl = agreed = 0.0
    for position in range(len(ids) - 1):
        p, q = probabilities(original[position]), probabilities(candidate[position])
        loss += -math.log(q[ids[position + 1]])
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        agreed += p.index(max(p)) == q.index(max(q))
    return loss, kl, agreed


def measure(*tables: Logits, data: Windows | None = None) -> list[Accuracy]:
    names = [f"model {number}" for number in range(len(tables))]
    return measure_accuracy([TableRunner(each) for each in tables], names, data or windows())


def test_sums_are_those_of_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "CHUNK_LOGITS", 11 * 3)  # several chunks a window, the last one short
    data = windows()
    original, candidate = table(1), table(2)
    own, other = measure(original, candidate, data=data)
    for index, ids in enumerate(data.ids.tolist()):
        loss, kl, agreed = literal(original[ids], candidate[ids], ids)
        assert math.isclose(other.loss[index], loss, rel_tol=1e-12)
        assert math.isclose(other.kl[index], kl, rel_tol=1e-12)
        assert other.agreement[index] == agreed
        assert math.isclose(own.loss[index], literal(original[ids], original[ids], ids)[0], rel_tol=1e-12)
    assert 0 < other.agreement.sum() < other.tokens.sum()
    assert set(other.tokens) == {8.0}


def test_perplexity_is_weighted_by_tokens_and_its_ratio_is_paired() -> None:
    data = windows(40)
    own, other = measure(table(1), table(1) * 1.05, data=data)
    perplexity = math.exp(own.loss.sum() / (40 * 8))
    assert math.isclose(own.perplexity(0).value, perplexity, rel_tol=1e-12)
    ratio = other.perplexity_ratio(own, 0)
    assert math.isclose(ratio.value, other.perplexity(0).value / perplexity, rel_tol=1e-12)
    assert ratio.low < ratio.value < ratio.high
    # Unpaired, the windows' own differences would drown that of the models.
    absolute = own.perplexity(0)
    assert (ratio.high - ratio.low) < 0.5 * (absolute.high - absolute.low) / absolute.value


def test_a_model_is_equal_to_itself() -> None:
    own, twin = measure(table(1), table(1))
    for each in (own, twin):
        ratio, kl, agreement = each.perplexity_ratio(own, 0), each.mean_kl(0), each.mean_agreement(0)
        assert (ratio.low, ratio.value, ratio.high) == (1.0, 1.0, 1.0)
        assert (kl.low, kl.value, kl.high) == (0.0, 0.0, 0.0)
        assert (agreement.low, agreement.value, agreement.high) == (1.0, 1.0, 1.0)


def test_the_original_runs_once_a_window() -> None:
    runners = [TableRunner(table(seed)) for seed in range(3)]
    measure_accuracy(runners, ["a", "b", "c"], windows(count=5))
    assert [runner.calls for runner in runners] == [6, 6, 6]  # and once to ask for its vocabulary


def test_a_candidate_that_is_not_a_number_is_reported_not_hidden() -> None:
    broken = table(1)
    broken[3, 5] = np.nan
    _, other = measure(table(1), broken)
    assert math.isnan(other.perplexity(0).value)
    assert math.isnan(other.mean_kl(0).value)
    assert other.mean_agreement(0).value < 1


def test_a_candidate_that_rules_out_a_token_is_infinitely_far() -> None:
    certain = table(1)
    certain[:, 4] = -np.inf
    _, other = measure(table(1), certain)
    assert math.isinf(other.mean_kl(0).value)


def test_a_token_both_rule_out_counts_for_nothing() -> None:
    original, candidate = table(1), table(2)
    original[:, 10] = candidate[:, 10] = -np.inf
    ids = windows(vocabulary=10).ids[0].numpy()
    full = compare(original[ids], candidate[ids], ids)
    without = compare(original[ids][:, :10], candidate[ids][:, :10], ids)
    assert np.allclose(full, without, rtol=1e-12)


def test_an_original_that_is_not_a_number_is_refused() -> None:
    broken = table(1)
    broken[3, 5] = np.nan
    with pytest.raises(StreamlineError, match="model 0: its logits are not finite"):
        measure(broken, table(1))


def test_vocabularies_must_match() -> None:
    with pytest.raises(StreamlineError, match="model 1: has a vocabulary of 13 tokens, but model 0 has 11"):
        measure(table(1), table(1, 13))
    with pytest.raises(StreamlineError, match="token 12 is outside"):
        measure(table(1), table(2), data=windows(vocabulary=13))


def test_a_real_model_by_transformers_own_loss(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    ids = token_ids(3, 20)
    (own,) = measure_accuracy([open_runner(str(tmp_path))], ["tiny"], Windows(ids, "random"))
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in ids]
    assert np.allclose(own.loss / own.tokens, losses, rtol=1e-5)
    assert own.perplexity(0).value < 10 * VOCABULARY
