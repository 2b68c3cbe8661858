"""`Streamliner`, the main class of the Python API: it holds one model, and each step is a method of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum.streamline.checkpoints.loading import read_config
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory, source_in_memory
from optimum.streamline.checkpoints.upload import upload_files
from optimum.streamline.editing import plan as editing
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation import results
from optimum.streamline.evaluation.latency import ROUNDS
from optimum.streamline.evaluation.validate import ComparedModel, compared_models_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline.exporting import CALIBRATION_WINDOWS, export, is_calibrated
from optimum.streamline.pipeline.planning import Prepared
from optimum.streamline.pipeline.preflight import result_dtype
from optimum.streamline.pipeline.prune import change, sample_heal_text
from optimum.streamline.pipeline.run import run
from optimum.streamline.pipeline.texts import calibration_text, inputs_of, text_of_healing
from optimum.streamline.pipeline.validation import validate_models
from optimum.streamline.pipeline.write_checkpoint import write_checkpoint
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.files import write_report
from optimum.streamline.reporting.notebook import layer_map, plan_html
from optimum.streamline.reporting.record import PruningRecord
from optimum.streamline.system.atomic_output import check_output, staged_folder
from optimum.streamline.system.library_logs import LOG_FILE, captured_logs
from optimum.streamline.system.notify import silent
from optimum.streamline.text.prompts import Prompts
from optimum.streamline.text.windows import Windows

from .config import StreamlineConfig, recipe_of
from .healing import healing_recipe
from .original_model import Original
from .results import Artifact, Plan, Report, Scores
from .saved_copy import SavedCopy


@dataclass(frozen=True)
class _Pruned:
    """The pruned model: `prepared.model`."""

    plan: Plan
    prepared: Prepared
    record: PruningRecord


class Streamliner:
    """Prunes, heals, saves, exports and validates one causal language model, in one call or step by step.

    `from_pretrained` makes one. The original is never changed: `prune` and `heal` work on a copy, which is `model` from
    then on. Both are held in fp32 in memory, and distillation holds a third, unless `heal_cache` keeps what it gave.

    >>> streamliner = Streamliner.from_pretrained("examples/reference_model")
    >>> streamliner.prune(StreamlineConfig(layers="5-8"))
    Streamliner(reference_model: remove layers 5-8: 16 layers become 12 [#####----#######])
    >>> streamliner.model.config.num_hidden_layers
    12
    """

    def __init__(self, source: ModelSource, config: PreTrainedConfig) -> None:
        self._source, self._original = source, Original(source, config)
        self._pruned: _Pruned | None = None
        self._saved: SavedCopy | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> Streamliner:
        """Name the original. A Hub id is downloaded; weights are read when a step needs them.

        Args:
            model: A checkpoint's folder, a Hub id, or a transformers model in memory with float weights. The steps
                share the weights of a model in memory that is in fp32, and copy others: do not change it meanwhile.
            tokenizer: The tokenizer of a model in memory; a folder or Hub id has its own.
            cache_dir: Where Hub downloads are kept; transformers' own place by default.
            trust_remote_code: Whether code from the checkpoint may run.
            revision: A branch, tag or commit of the Hub repository.

        Raises:
            StreamlineError: it is not a model, or one that cannot be handled, or the tokenizer is missing.
        """
        if isinstance(model, (str, Path)):
            if tokenizer is not None:
                raise StreamlineError(f"tokenizer: model {str(model)!r} has its own; leave it out")
            source = ModelSource(str(model), cache_dir, trust_remote_code, revision)
            return cls(source, read_config(source))
        if not isinstance(model, PreTrainedModel):
            raise StreamlineError(
                f"model: is a {type(model).__name__}; give a checkpoint's folder, a Hub id or a transformers model "
                "(merge a PEFT adapter first, by merge_and_unload())"
            )
        if tokenizer is None:
            raise StreamlineError(f"tokenizer is missing: {type(model).__name__} is in memory; give tokenizer= too")
        if cache_dir or trust_remote_code or revision:
            raise StreamlineError("cache_dir, trust_remote_code, revision: the model is in memory; leave them out")
        return cls(source_in_memory(model, tokenizer), model.config)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The original's tokenizer, loaded when it is first asked for."""
        return self._original.tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The pruned model, in fp32; before `prune` the original, to be looked at and not changed."""
        if self._pruned is not None:
            return self._pruned.prepared.model
        with captured_logs(None):
            return self._original.model_on(self._original.device)

    @property
    def record(self) -> dict[str, Any] | None:
        """What was done, as `streamline.json` will say it; `None` before `prune`."""
        return None if self._pruned is None else self._pruned.record.to_dict()

    def score(self, config: StreamlineConfig | Recipe) -> Scores:
        """Measure how much each layer of the original matters, in one pass over the calibration text.

        Args:
            config: Its `calibration`, `samples`, `length`, `seed` and `device` are used.

        Returns:
            The scores; `scores.block_influence[i]` is the Block Influence of layer i.

        Raises:
            StreamlineError: the text cannot be read, or the model gives no finite numbers on it.
        """
        with captured_logs(None):
            return self._original.score(recipe_of(config))

    def plan(self, config: StreamlineConfig | Recipe, scores: Scores | None = None) -> Plan:
        """Choose what becomes of each layer of the original; no weight moves.

        Args:
            config: Which method chooses, on what text, and how many layers go. With `layers`, and no linear maps
                or corrections, nothing is read or measured.
            scores: What `score` returned earlier, instead of scoring now. A method that looks at more than scores
                reads the text again, which must be the one of the scores.

        Returns:
            The plan, which `prune` takes.

        Raises:
            StreamlineError: the method cannot follow the config on this model, the text cannot be read, or the scores
                are of another model or text.
        """
        with captured_logs(None):
            return self._original.plan(recipe_of(config), scores)

    def prune(self, config: StreamlineConfig | Recipe | editing.Plan) -> Streamliner:
        """Prune a copy of the original, which is `model` from then on; a replacement is in place, and not yet trained.

        Pruning again starts from the original again.

        Args:
            config: A config to plan by; or a plan, made by `plan` or by you, such as `Plan(total=16, removed=(5, 6))`.

        Returns:
            This object, so that steps can be chained.

        Raises:
            StreamlineError: as `plan`; or the plan is of another model.
        """
        plan = config if isinstance(config, editing.Plan) else self.plan(config)
        plan, recipe = self._original.checked_plan(plan if isinstance(plan, Plan) else Plan.of(plan))
        self._make(plan, recipe, None)
        return self

    def heal(self, config: StreamlineConfig | Recipe | None = None) -> Streamliner:
        """Train the pruned model, as the config's `heal` says.

        It makes the pruned model anew from the original and the plan, because a replacement is trained before it is put
        into the model, and some methods train between merges. Changes to `model` since `prune` are lost. If a
        training fails, nothing is pruned any more. Each call with `heal_data` "self" samples the text again.

        Args:
            config: Options that replace those of the config that pruned, such as `heal`, `heal_data` and
                `heal_tokens`; left out, the healing of that config. A `Recipe` replaces the whole healing, and so does
                a config that was given an instance of `Healing`.

        Returns:
            This object, so that steps can be chained.

        Raises:
            StreamlineError: nothing was pruned, nothing is to be trained, the config would have pruned otherwise, the
                text cannot be read, or a training fails.
        """
        pruned = self._pruned_for("heal")
        recipe = healing_recipe(pruned.plan, pruned.prepared.recipe, config)
        self._original.check(recipe)
        plan = replace(pruned.plan, chosen_on=pruned.prepared.chosen_on)
        self._make(plan, recipe, text_of_healing(recipe, self.tokenizer, self._original.config))
        return self

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the pruned model as `optimum-cli streamline prune` does: with record and card, and read back.

        `model` stays as it is; a copy of it is cast to the type that it is stored in.

        Args:
            save_directory: The folder to make, whole or not at all.
            overwrite: Whether an earlier output of this program there may be replaced.

        Returns:
            The folder.

        Raises:
            ParityError: what was written is not the model; nothing is delivered.
            StreamlineError: nothing was pruned, or the folder exists or cannot be written.
        """
        pruned, out = self._pruned_for("save_pretrained"), Path(save_directory)
        prepared = replace(pruned.prepared, model=copy.deepcopy(pruned.prepared.model))
        inputs = inputs_of(self._source, prepared.recipe)
        with staged_folder(out, inputs, overwrite) as folder, captured_logs(folder / LOG_FILE):
            write_checkpoint(prepared, pruned.record, folder, silent)
        self._saved = SavedCopy.of(pruned.prepared.model, out)
        return out

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a model pruned by optimum-streamline",
    ) -> str:
        """Upload the pruned model, as `save_pretrained` writes it and reads it back, to a repository of the Hub.

        Args:
            repo_id: The repository, as `user/name`; it is made if need be.
            private: Whether a new repository is private. The default is the account's setting.
            token: The Hub token. The default is the one that `hf auth login` stored.
            revision: The branch to commit to; `main` by default.
            commit_message: The commit's first line.

        Returns:
            The commit's URL.

        Raises:
            ParityError: as `save_pretrained`; nothing is uploaded.
            StreamlineError: nothing was pruned, or the repository cannot be made or written.
        """
        self._pruned_for("push_to_hub")
        with captured_logs(None), self._saved_copy() as saved:
            how: dict[str, Any] = {"private": private, "token": token, "revision": revision}
            return upload_files(saved.folder, saved.files, repo_id, message=commit_message, **how)

    def export(
        self,
        save_directory: str | Path,
        *,
        format: str = "onnx",  # noqa: A002 -- what the command calls it
        dtype: str = "fp32",
        device: str = "cpu",
        quantize: str = "none",
        quantize_exclude: Sequence[str] = (),
        config: StreamlineConfig | Recipe | None = None,
        last_logits: bool = False,
        max_memory: int | None = None,
        engine: Any = None,
        overwrite: bool = False,
    ) -> Artifact:
        """Export the pruned model, or the original if nothing was pruned, and compare the export with torch.

        An export starts from files. A pruned model that is not saved is written to a temporary folder first: save it to
        have the artifact name its checkpoint.

        Args:
            save_directory: The folder to make, whole or not at all.
            format: `onnx` or `tensorrt`.
            dtype: `fp32`, `fp16`, or `bf16`: what weights, cache and logits are in.
            device: `cpu` or `cuda`: where the export runs to be compared with torch.
            quantize: How the graph is quantized afterwards: `none`, or such as `int4`.
            quantize_exclude: What stays in float: numbers of layers, and names of modules in which `*` stands for
                anything.
            config: Its `calibration`, `samples`, `length` and `seed` give the text for a quantizer that needs
                calibration; by default the config that pruned is used.
            last_logits: Whether the graph gives the logits of each row's last token only.
            max_memory: Bytes of memory to make do with; what is free by default.
            engine: What engine to build, for `tensorrt`: `optimum.exporters.streamline.EngineOptions`.
            overwrite: Whether an earlier output of this program there may be replaced.

        Returns:
            The artifact; `artifact.parity` holds its measured differences from torch, and `open_runner(artifact.path)`
            runs it.

        Raises:
            ParityError: the export does not compute what the model does.
            StreamlineError: an option cannot be used, or the folder exists or cannot be written.
        """
        check_output(Path(save_directory), overwrite)
        windows = self._calibration_of(config, quantize) if is_calibrated(format, quantize) else None
        how: dict[str, Any] = {"format": format, "dtype": dtype, "device": device, "overwrite": overwrite}
        how |= {"quantize": quantize, "quantize_exclude": quantize_exclude, "windows": windows, "engine": engine}
        how |= {"last_logits": last_logits, "max_memory": max_memory}
        if self._pruned is None and not isinstance(self._source, ModelInMemory):
            return Artifact.of(export(self._source.model, Path(save_directory), **how, **self._source.options()))
        with captured_logs(None), self._on_disk() as folder:
            how["trust_remote_code"] = self._source.trust_remote_code
            artifact = Artifact.of(export(str(folder), Path(save_directory), **how))
        if self._saved is None:  # the folder was temporary
            name = self._source.name
            artifact = replace(artifact, source=name if self._pruned is None else f"{name}, pruned and not saved")
            artifact.write(Path(save_directory))
        return artifact

    def validate(
        self,
        config: StreamlineConfig | Recipe,
        *candidates: str | Path,
        save_directory: str | Path | None = None,
        questions: str | Path | None = None,
        rounds: int = ROUNDS,
        overwrite: bool = False,
    ) -> Report:
        """Measure accuracy and speed against the original, and hold them against the config's `budget`.

        Models are run from files, each timed in a process of its own. A model in memory, the original or the pruned
        one, is written to a temporary folder first, unless it was saved.

        Args:
            config: Its `eval_data`, `eval_samples`, `length`, `seed`, `dtype`, `device`, `max_memory`, `budget` and
                `judge` are used.
            candidates: Folders of checkpoints and exports, and Hub ids, also as `name@revision`; left out, the pruned
                model.
            save_directory: A folder for `report.json`, `report.md` and `report.html`.
            questions: A file of multiple-choice questions, one JSON object a line, to measure accuracy and stability.
            rounds: Timed rounds of every model, at least 2; in turn if all fit into memory together.
            overwrite: Whether an earlier report there may be replaced.

        Returns:
            The report: the figures of each model, the original first, and the verdict on the budget.

        Raises:
            StreamlineError: there is no candidate, the models or the text do not allow a comparison, or a candidate
                was made with this text.
            WorkerError: a process that timed a model died.
        """
        if not candidates:
            self._pruned_for("validate")
        if save_directory is not None:
            check_output(Path(save_directory), overwrite)
        how: dict[str, Any] = {"questions": Path(questions) if questions else None, "rounds": rounds}
        named = [str(candidate) for candidate in candidates]
        with captured_logs(None), self._compared_models(named) as compared_models:
            found = validate_models(compared_models, recipe_of(config), notify=silent, **how)
        report = self._report_of(found, named)
        if save_directory is not None:
            write_report(report, Path(save_directory))
        return report

    def streamline(self, save_dir: str | Path, config: StreamlineConfig | Recipe, *, overwrite: bool = False) -> Report:
        """Do what `optimum-cli streamline run` does, into `save_dir`, and save `config` there.

        It reads the original from files, and continues from the files that an earlier call left. It does not use what
        `prune` and `heal` made in memory.

        Args:
            save_dir: The folder of the checkpoint, the exports and the report.
            config: Everything that decides the run.
            overwrite: Whether an earlier output in `save_dir` is replaced, instead of continued.

        Returns:
            The report; `report.verdict.passed` says whether the result is within `config`'s budget.

        Raises:
            StreamlineError: bad input, and nothing is written then; or the original is a model in memory.
        """
        if isinstance(self._source, ModelInMemory):
            raise StreamlineError(
                "streamline: the model is in memory, and the whole chain resumes from files; give the folder that "
                "it is saved in, or call prune, heal, save_pretrained and validate"
            )
        out = Path(save_dir)
        report = run(self._source, recipe_of(config), out, overwrite=overwrite, verbose=False, notify=silent)
        StreamlineConfig(**recipe_of(config).to_dict()).save_pretrained(out)
        return Report.of(report)

    def __repr__(self) -> str:
        if self._pruned is None:
            return f"Streamliner({self._source.name}: {self._original.layers} layers)"
        plan = self._pruned.plan
        return f"Streamliner({self._source.name}: {plan.describe()} {layer_map(plan)}{self._healed()})"

    def _repr_html_(self) -> str:
        if self._pruned is None:
            return f"<p>{escape(self._source.name)}: {self._original.layers} layers</p>"
        return f"<p>{escape(self._source.name + self._healed())}</p>{plan_html(self._pruned.plan)}"

    def _make(self, plan: Plan, recipe: Recipe, heal_text: Windows | Prompts | None) -> None:
        with captured_logs(None):
            original = self._original.model_on(recipe.device)
        stored = result_dtype(self._source, recipe)
        self._pruned = self._saved = None  # lets go of the one before, so that memory holds no third
        prepared = Prepared(
            self._source,
            recipe,
            copy.deepcopy(original),
            self.tokenizer,
            stored,
            plan.chosen_on,
            heal_text,
            plan.scores,
            plan.plain(),
        )
        with captured_logs(None):
            sample_heal_text(prepared, silent)
            record = change(prepared, silent)
        self._pruned = _Pruned(plan, prepared, record)

    def _pruned_for(self, step: str) -> _Pruned:
        if self._pruned is None:
            raise StreamlineError(f"{step}: nothing was pruned yet; call prune first")
        return self._pruned

    def _calibration_of(self, config: StreamlineConfig | Recipe | None, quantize: str) -> Windows:
        recipe = recipe_of(config) if config else self._pruned.prepared.recipe if self._pruned else None
        if recipe is None:
            raise StreamlineError(
                f"config is missing: quantize {quantize!r} needs calibration text; give a config with calibration"
            )
        windows = calibration_text(recipe, self.tokenizer, self._original.config)
        return windows.part(0, min(CALIBRATION_WINDOWS, len(windows.ids)))

    @contextmanager
    def _on_disk(self) -> Iterator[Path]:
        """A folder with the checkpoint of `model`, and of the original before `prune`."""
        if self._pruned is None:
            yield self._source.folder
        else:
            with self._saved_copy() as saved:
                yield saved.folder

    @contextmanager
    def _saved_copy(self) -> Iterator[SavedCopy]:
        """The folder that the pruned model was saved in, if it is current; otherwise a temporary one."""
        if self._saved is not None and self._saved.is_current(self.model):
            yield self._saved
            return
        with TemporaryDirectory(prefix="streamline-pruned-") as scratch:
            self.save_pretrained(Path(scratch) / "checkpoint")
            saved, self._saved = self._saved, None
            assert saved is not None
            yield saved

    @contextmanager
    def _compared_models(self, candidates: Sequence[str]) -> Iterator[list[ComparedModel]]:
        source = self._source
        trusted = source.trust_remote_code
        original = compared_models_of(source, candidates)
        if isinstance(source, ModelInMemory):
            original[0] = ComparedModel("original", str(source.folder), "original")
        if candidates:
            yield original
            return
        with self._on_disk() as folder:
            yield [original[0], ComparedModel("candidate", str(folder), trust_remote_code=trusted)]

    def _report_of(self, report: results.Report, candidates: Sequence[str]) -> Report:
        """The report with the pruned model's layers and scores, and without the paths of temporary folders."""
        original, *others = report.rows
        if isinstance(self._source, ModelInMemory):
            original = replace(original, path="")
        if not candidates:
            pruned = self._pruned_for("validate")
            scores = pruned.plan.scores.block_influence if pruned.plan.scores else None
            report = replace(report, scores=scores, layers=pruned.record.change.new_layers)
            others = others if self._saved else [replace(each, path="") for each in others]
        return Report.of(replace(report, rows=(original, *others)))

    def _healed(self) -> str:
        record = self._pruned.record if self._pruned else None
        return f", healed by {'+'.join(record.recipe.resolved_trainings)}" if record and record.healing else ""
