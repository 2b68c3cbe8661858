"""Comparing a runner with torch finds a fault in any call, and says where it is."""

import pytest

from optimum.exporters.streamline.parity import compare
from optimum.exporters.streamline.parity.model_calls import answer_with
from optimum.streamline.errors import ParityError

pytestmark = pytest.mark.onnx

CHECKS = ["prefill", "continuation", "decode", "left-padded prefill", "left-padded decode"]


class Faulty:
    """A runner with one fault: scaled logits, an ignored mask, or a forgotten cache."""

    def __init__(self, runner, scale=1.0, ignore_mask=False, forget_before=0):
        self.runner, self.scale, self.ignore_mask, self.forget_before = runner, scale, ignore_mask, forget_before

    def prefill(self, ids, mask=None):
        logits, cache = self.runner.prefill(ids, None if self.ignore_mask else mask)
        return logits * self.scale, cache

    def decode(self, ids, cache):
        return self.runner.prefill(ids) if ids.shape[1] == self.forget_before else self.runner.decode(ids, cache)


class WrongInOneLogit:
    """A runner that returns one wrong logit in one of its calls."""

    def __init__(self, runner, call, place, error=50.0):
        self.runner, self.call, self.place, self.error = runner, call, place, error
        self.calls = 0

    def prefill(self, ids, mask=None):
        return self.spoil(*self.runner.prefill(ids, mask))

    def decode(self, ids, cache):
        return self.spoil(*self.runner.decode(ids, cache))

    def spoil(self, logits, cache):
        if self.calls == self.call:
            logits[self.place] += self.error
        self.calls += 1
        return logits, cache


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("prefill", {"scale": float("nan")}),
        ("prefill", {"scale": 1.001}),
        ("continuation", {"forget_before": 3}),
        ("decode", {"forget_before": 1}),
        ("left-padded prefill", {"ignore_mask": True}),
    ],
)
def test_each_check_finds_its_fault(exported, check, fault):
    made = exported("llama")
    with pytest.raises(ParityError, match=f"parity: {check} differs"):
        compare.check_parity(made.stock(), answer_with(Faulty(made.runner(), **fault)), compare.TOLERANCES["fp32"])


@pytest.mark.parametrize("error", [50.0, float("nan")])
@pytest.mark.parametrize(
    ("call", "place", "said"),
    [
        (0, (0, 5, 17), "row 0, position 5, token 17"),
        (1, (0, 1, 2), "row 0, position 13, token 2"),
        (2, (0, 0, 127), "row 0, position 15, token 127"),
        (3, (1, 8, 17), "row 1, position 3, token 17"),  # a text of 7 tokens after 5 of padding
        (3, (2, 11, 0), "row 2, position 3, token 0"),  # the last of 4
        (4, (2, 0, 9), "row 2, position 4, token 9"),
    ],
)
def test_the_refusal_says_where_it_diverged(exported, call, place, said, error):
    made = exported("llama")
    with pytest.raises(ParityError, match=f"parity: {CHECKS[call]} differs .*; most at {said}$"):
        compare.check_parity(made.stock(), answer_with(WrongInOneLogit(made.runner(), call, place, error)), 1e-4)


def test_what_is_said_of_padding_is_of_no_consequence(exported):
    made = exported("llama")
    wrong_in_padding = WrongInOneLogit(made.runner(), CHECKS.index("left-padded prefill"), (1, 4, 17))
    assert compare.check_parity(made.stock(), answer_with(wrong_in_padding), 1e-4) == made.artifact.parity
