"""What the steps of `Streamliner` return: the library's own values, which also show themselves in a notebook."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from optimum.streamline.editing import plan
from optimum.streamline.evaluation import results
from optimum.streamline.model_files import artifact
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting import notebook
from optimum.streamline.scoring import similarity
from optimum.streamline.text.windows import Windows


@dataclass(frozen=True, repr=False, eq=False)
class Scores(similarity.Scores):
    """How much each layer of a model changes the residual stream, from `Streamliner.score`.

    `block_influence[i]` is the Block Influence of layer i (ShortGPT, arXiv 2403.03853), 0 to 2, lower is less.

    Args:
        similarity: `[layers + 1][layers + 1]`; the mean over tokens of cos(h_i, h_j), with h_0 the embeddings and h_i
            the output of layer i - 1.
        last_angle: `[layers + 1][layers + 1]`; the mean angle over pi between the two on each window's last token.
        windows: The calibration windows `[windows, length]` they were measured on.
    """

    windows: Windows | None = None

    @classmethod
    def of(cls, scores: similarity.Scores, windows: Windows) -> Scores:
        """These scores, measured on these windows."""
        return cls(scores.similarity, scores.last_angle, windows)

    def __repr__(self) -> str:
        return notebook.scores_line(self)

    def _repr_html_(self) -> str:
        return notebook.scores_html(self)


@dataclass(frozen=True, repr=False, eq=False)
class Plan(plan.Plan):
    """What becomes of each layer, from `Streamliner.plan`, or written by hand: `Plan(total=16, removed=(5, 6))`.

    Args:
        total: How many layers the original has.
        removed: The layers that lose their place, rising, 0-based.
        replacement: What stands in for them: `none`, `layer`, `mlp`, `ffn`, `swiglu`, `linear` or `corrected`.
        skipped: Attentions and MLPs that are taken out of layers that stay, as (layer, `attention` or `mlp`), rising.
        merges: Pairs of neighbours to merge, in order.
        chosen_by: Which method chose, where the recipe left that open.
        tried: Each method that was tried then, with its plan's loss on held-out text, nats per token.
        trials: The rounds of trial trainings, each with the share of the training that was done and each candidate's
            KL divergence from the original after it, nats per token. Only the whole chain makes trials.
        packs: Whether what is left is arranged in as few layers as possible.
        already_skipped: For a plan that packs or corrects, the attentions and MLPs that the original skips already.
        recipe: The recipe that it was made by; `None` for a plan that you wrote yourself.
        scores: The scores it was made from; `None` where nothing was measured.
        chosen_on: The text it was made on; `None` where none was read.
    """

    recipe: Recipe | None = None
    scores: similarity.Scores | None = None
    chosen_on: Windows | None = field(default=None)

    @classmethod
    def of(cls, made: plan.Plan, recipe: Recipe | None = None, **made_from: Any) -> Plan:
        """The same plan with the recipe, the scores and the text it was made from."""
        return cls(**_own_fields(made, plan.Plan), recipe=recipe, **made_from)

    def plain(self) -> plan.Plan:
        """The plan alone, as the rest of the library takes it."""
        return plan.Plan(**_own_fields(self, plan.Plan))

    def __repr__(self) -> str:
        return notebook.plan_line(self)

    def _repr_html_(self) -> str:
        return notebook.plan_html(self)


@dataclass(frozen=True, repr=False, eq=False)
class Verdict(results.Verdict):
    """Whether the candidates of a report are within the budget: `passed`, and `limits` one by one."""

    def __repr__(self) -> str:
        return notebook.verdict_line(self)

    def _repr_html_(self) -> str:
        return notebook.verdict_html(self)


@dataclass(frozen=True, repr=False, eq=False)
class Report(results.Report):
    """What a validation found: `rows`, one a model, the original first, and `verdict`. `to_json` keeps it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdict", Verdict(self.verdict.limits, self.verdict.judge))

    @classmethod
    def of(cls, report: results.Report) -> Report:
        """The same report, which shows itself in a notebook."""
        return cls(**_own_fields(report, results.Report))

    def __repr__(self) -> str:
        return notebook.report_line(self)

    def _repr_html_(self) -> str:
        return notebook.report_html(self)


@dataclass(frozen=True, repr=False, eq=False)
class Artifact(artifact.Artifact):
    """An export on disk, from `Streamliner.export`: `open_runner(artifact.path)` runs it."""

    @classmethod
    def of(cls, exported: artifact.Artifact) -> Artifact:
        """The same export, which shows itself in a notebook."""
        return cls(**_own_fields(exported, artifact.Artifact))

    def __repr__(self) -> str:
        return notebook.artifact_line(self)

    def _repr_html_(self) -> str:
        return notebook.artifact_html(self)


def _own_fields(value: Any, kind: Any) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in fields(kind)}
