"""The flags of `optimum-cli streamline`. What the commands do is in `optimum.streamline.cli`, imported when one runs.

This file is imported by every optimum-cli command, so it imports nothing but argparse and optimum's base class.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

SPEC = (
    "a text file, a table (FILE[,COLUMN]), a folder of these,\n"
    "hub:DATASET[@REVISION][,CONFIG[,SPLIT[,COLUMN]]], or stdlib"
)
# As in `optimum.streamline.recipe`; a test compares.
CHOOSING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,train"
JUDGING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,test"


def _error(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def _read_strictly(parser: argparse.ArgumentParser) -> None:
    # argparse hands what a subcommand does not know up to the root parser, which answers with its whole usage; and
    # it takes flags between two positional arguments only when asked to.
    parse = parser.parse_known_args

    def parse_all(args: Any = None, namespace: Any = None, **_: Any) -> tuple[argparse.Namespace, list[str]]:
        parser.parse_known_args = parse  # type: ignore[method-assign]
        namespace, unknown = parser.parse_known_intermixed_args(args, namespace)
        if unknown:
            _error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    parser.parse_known_args = parse_all  # type: ignore[method-assign,assignment]


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", required=True, help="a checkpoint's folder, or a Hub id, also as name@revision"
    )
    _source_flags(parser)


def _source_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of the Hub model (default: its main branch)")
    parser.add_argument("--cache_dir", help="where Hub downloads are kept")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code from the checkpoint run")
    parser.add_argument("--verbose", action="store_true", help="show what other libraries say, too")


def _recipe_flag(group: Any, flag: str, text: str, kind: Callable[[str], Any] = str) -> None:
    # A flag that is not given leaves no trace, so that a recipe file's value, or the default, stands.
    group.add_argument(flag, default=argparse.SUPPRESS, type=kind, help=text, metavar=flag.strip("-").upper())


def _recipe_switch(group: Any, flag: str, text: str) -> None:
    group.add_argument(flag, default=argparse.SUPPRESS, action="store_true", help=text)


def _calibration_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    _recipe_flag(group, "--calibration", f"text the choices are made on: {SPEC}\n(default {CHOOSING_TEXT})")
    _recipe_flag(group, "--samples", "calibration windows (default 128); auto reads some more", int)
    _common_recipe_flags(group)


def _common_recipe_flags(group: Any) -> None:
    _recipe_flag(group, "--length", "tokens a window (default 512)", int)
    _recipe_flag(group, "--device", "cpu (default) or cuda")
    _recipe_flag(group, "--seed", "of everything random (default 0)", int)


def _prune_flags(parser: argparse.ArgumentParser, quantizes: bool = True) -> None:
    group = parser.add_argument_group("what to remove")
    methods = "\n".join(f"  {name}: {line}" for name, line in METHOD_LINES.items())
    _recipe_flag(
        group,
        "--method",
        "how layers are chosen; left out, explicit with --layers, shortgpt with --replacement linear,\n"
        f"llm-streamline with any other --replacement but none, else auto:\n{methods}",
    )
    _recipe_flag(group, "--remove", "layers to lose, net (4), or a share of them (25%%)")
    _recipe_flag(group, "--layers", "explicit layers, 0-based, such as 3,7,11-13")
    _recipe_switch(group, "--iterative", "shortgpt: score anew after each removal")
    _recipe_flag(
        group,
        "--protect",
        "how many of the first and of the last layers stay (default of sleb: 1,1; of shortened-taylor: 4,2;\n"
        "of shortened-ppl: 0,0; the other methods have no such choice)",
    )
    _recipe_flag(group, "--pattern", "layerchop: max-gap (default), input, output, middle or both")
    group = parser.add_argument_group("what stands in for it")
    _recipe_flag(
        group,
        "--replacement",
        "none (default, but for llm-streamline, whose is layer, and auto, which unhealed may choose linear);\n"
        "linear: a least-squares map, folded into the layer before;\nor, for one block, a trained "
        "layer: layer (a decoder layer), mlp (one without attention),\nffn or swiglu (no norm, no residual: needs "
        "optimum.streamline.load)",
    )
    _healing_flags(parser)
    group = parser.add_argument_group("what it is made on")
    _recipe_flag(group, "--dtype", "what the result is stored in: fp32, fp16 or bf16 (default: as the original)")
    _calibration_flags(parser)
    if quantizes:
        _quantization_flags(parser)


def _healing_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("healing")
    _recipe_flag(
        group,
        "--heal",
        "none, or trainings joined by +: hidden-mse (the replacement, to its block's output; default where there is "
        "one),\nlm (cross-entropy), distill (to the original's logits and hidden states);\n"
        "default of auto, come-sp and come-mp: distill; of layerchop: lm; of the others: none",
    )
    _recipe_flag(
        group,
        "--heal-scope",
        "what lm and distill train: replacement or model (default: replacement for an lm that comes first,\n"
        "with a trained replacement, and with --lora if a training follows; else model)",
    )
    _recipe_flag(group, "--heal-data", f"text it is trained on: {SPEC}\n(default {CHOOSING_TEXT})")
    _recipe_flag(group, "--heal-tokens", "tokens to train on (default 200000)", int)
    _recipe_flag(
        group,
        "--heal-minutes",
        "longest time of each training, shared out among come-mp's merges (default: no limit)",
        float,
    )
    _recipe_flag(
        group, "--heal-lr", "peak learning rate (default: by what is trained, to what, and the model's width)", float
    )
    _recipe_flag(group, "--heal-epochs", "passes over these tokens (default 4: each is seen four times)", int)
    _recipe_flag(
        group, "--heal-batch", "windows an update, over all processes: a multiple of their number (default 4)", int
    )
    _recipe_switch(group, "--heal-normalised", "hidden-mse: divide each token's error by its squared norm")
    _recipe_flag(group, "--heal-kl", "distill: share of the KL, the rest is cross-entropy (default 1)", float)
    _recipe_flag(group, "--heal-hidden", "distill: weight of the layers' hidden-state error (default 10)", float)
    _recipe_switch(group, "--lora", "train low-rank adapters, merged before saving, not the weights")
    _recipe_flag(group, "--lora-rank", "their rank (default 16)", int)


def _quantization_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization")
    lines = "\n".join(f"  {name}: {line}" for name, line in CHECKPOINT_QUANTIZATION_LINES.items())
    _recipe_flag(
        group,
        "--quantize",
        f"none (default); of the checkpoint, one of\n{lines}\n"
        f"or of the ONNX export, where there is one, {', '.join(QUANTIZATION_LINES)}",
    )
    _recipe_flag(
        group,
        "--quantize-exclude",
        "what stays in float, by commas: numbers of this model's layers, and modules such as *.mlp.down_proj",
    )
    _recipe_flag(group, "--steps", "prune,quantize (default) or quantize,prune, which can only remove layers")


def _judgement_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("judgement")
    _recipe_flag(group, "--eval-data", f"text the result is judged on: {SPEC}\n(default {JUDGING_TEXT})")
    _recipe_flag(group, "--eval-samples", "evaluation windows (default 64)", int)
    _recipe_flag(group, "--max-ppl-ratio", "largest perplexity over the original's", float)
    _recipe_flag(group, "--max-kl", "largest KL(original || candidate), nats per token", float)
    _recipe_flag(group, "--min-speedup", "least decode speed-up over the original in the same runtime", float)
    _recipe_flag(group, "--max-size-ratio", "largest size on disk over the original's in the same runtime", float)
    _recipe_flag(
        group,
        "--judge",
        "what must be within each limit: bound (default), the whole interval of a figure; or point, the figure",
    )


def _exclude_flag(group: Any) -> None:
    group.add_argument(
        "--quantize-exclude",
        default="",
        metavar="WHAT",
        help="what stays in float, by commas: numbers of this model's layers, and modules such as lm_head or\n"
        "*.mlp.down_proj",
    )


def _output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this program")


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what it would bring; write nothing")
    parser.add_argument(
        "--save-recipe",
        type=Path,
        metavar="FILE",
        help="write the recipe that the flags amount to, when all else is done",
    )


# What `optimum.exporters.streamline.quantize.WAYS` says of each, which importing would take seconds; a test compares.
QUANTIZATION_LINES = {
    "int8": "weights in 8 bits, activations too, scaled as they come",
    "int8-static": "the same, activations scaled by what text gave (QDQ)",
    "int4": "weights in 4 bits, blocks of 32 rounded to nearest (MatMulNBits)",
    "int4-hqq": "the same, offsets chosen by half-quadratic optimization",
    "int4-gptq": "the same, weights rounded by what they do to text (GPTQ)",
}

# What the exporters' `ENGINE_WAYS` say of each; the same test.
ENGINE_QUANTIZATION_LINES = {
    "int8": "weights and activations in 8 bits, scaled by what text gave",
    "fp8": "the same in 8-bit floats, which begin with compute capability 8.9",
    "int4": "weights in 4 bits, blocks of 64 rounded to nearest",
}

# What `optimum.streamline.quantizers.QUANTIZERS` says of each; the same test.
CHECKPOINT_QUANTIZATION_LINES = {
    "bnb-int8": "weights in 8 bits, activations too (LLM.int8, bitsandbytes)",
    "bnb-nf4": "weights in 4 bits, NormalFloat, blocks of 64 (bitsandbytes)",
    "torchao-int4": "weights in 4 bits, groups of 32 (torchao; on a CPU a byte holds one)",
}

# Repeated from `methods.METHODS`, which cannot be imported here; a test holds the two together.
METHOD_LINES = {
    "auto": "the default: blockpruner or come-p, unhealed also linear maps, by held-out loss; then heal distill",
    "average": "the same neighbours as come, their weights averaged (baseline of 2510.15304)",
    "blockpruner": "attentions and MLPs, one at a time by loss, to the weight of so many layers (2406.10594)",
    "come": "the two neighbours most alike merged by their channels, step by step (2510.15304)",
    "come-mp": "as come, healed by a distillation after each merge (2510.15304)",
    "come-p": "as come, the ratio of each merge by trying 21 of them on calibration text (2510.15304)",
    "come-sp": "as come, then healed by one distillation (2510.15304)",
    "explicit": "the layers given by --layers, such as 3,7,11-13",
    "gromov": "the block of least angular distance on last tokens, removed or replaced (2403.17887)",
    "layerchop": "layers by their place: evenly spread, or near input, output, middle or both (2305.14864)",
    "llm-streamline": "the block of highest input-output cosine, removed or replaced (2403.19135)",
    "shortened-ppl": "the layers without each of which perplexity is lowest, all at once (2402.02834)",
    "shortened-taylor": "the layers of lowest sum of |weight x gradient|, all at once (2402.02834)",
    "shortgpt": "the layers of lowest Block Influence, all at once or iteratively (2403.03853)",
    "sleb": "one layer at a time, each time the one whose loss hurts least (2402.09025)",
}


class _Command(BaseOptimumCLICommand):
    """A subcommand: its flags here, its body the function of its name in `optimum.streamline.cli`."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Make a wrong flag one line and exit code 2, as any other wrong input; no flag is guessed from its start."""
        parser.error = _error  # type: ignore[method-assign]
        parser.allow_abbrev = False
        _read_strictly(parser)
        parser.formatter_class = argparse.RawTextHelpFormatter

    def run(self) -> None:
        """Run the command and exit with its code."""
        from optimum.streamline import cli

        sys.exit(cli.run_command(self.COMMAND.name, self.args))


class RunCommand(_Command):
    """`optimum-cli streamline run`."""

    COMMAND = CommandInfo(
        name="run", help="Make shallower, repair, save, export, and prove it; resumes where it stopped."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `run`."""
        _Command.parse_args(parser)
        _model_flags(parser)
        parser.add_argument("recipe", type=Path, nargs="?", help="a YAML recipe; flags go over what it says")
        _output_flags(parser)
        _plan_flags(parser)
        _prune_flags(parser)
        _recipe_flag(parser, "--format", "what to export to: none (default) or onnx")
        _judgement_flags(parser)


class ScoreCommand(_Command):
    """`optimum-cli streamline score`."""

    COMMAND = CommandInfo(name="score", help="How much each layer matters: table, JSON and plot.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `score`."""
        _Command.parse_args(parser)
        _model_flags(parser)
        parser.add_argument("output", type=Path, nargs="?", help="a folder for scores.json and the plot")
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this program")
        _calibration_flags(parser)


class PruneCommand(_Command):
    """`optimum-cli streamline prune`."""

    COMMAND = CommandInfo(name="prune", help="Score, plan, edit, heal and save a checkpoint.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `prune`."""
        _Command.parse_args(parser)
        _model_flags(parser)
        _output_flags(parser)
        _plan_flags(parser)
        _prune_flags(parser)


class QuantizeCommand(_Command):
    """`optimum-cli streamline quantize`."""

    COMMAND = CommandInfo(name="quantize", help="Quantize a checkpoint for torch; an ONNX export has its own.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `quantize`."""
        _Command.parse_args(parser)
        _model_flags(parser)
        _output_flags(parser)
        lines = "\n".join(f"  {name}: {line}" for name, line in CHECKPOINT_QUANTIZATION_LINES.items())
        parser.add_argument("--quantize", required=True, help=f"one of\n{lines}")
        _exclude_flag(parser)
        parser.add_argument("--device", default="cpu", help="cpu (default) or cuda: where it is quantized")


class ExportCommand(_Command):
    """`optimum-cli streamline export`."""

    COMMAND = CommandInfo(name="export", help="Export a checkpoint, checked against torch.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `export`."""
        _Command.parse_args(parser)
        _model_flags(parser)
        _output_flags(parser)
        parser.add_argument("--format", default="onnx", help="onnx (default) or tensorrt")
        parser.add_argument("--task", default="text-generation", help="text-generation (default)")
        parser.add_argument("--opset", type=int, help="23 of onnx, 24 of tensorrt: there is no other")
        parser.add_argument("--dtype", default="fp32", help="fp32 (default), fp16, or bf16: of onnx on cuda alone")
        parser.add_argument("--device", default="cpu", help="cpu (default) or cuda: where it is compared with torch")
        parser.add_argument(
            "--max-memory",
            metavar="SIZE",
            help="memory to make do with, such as 1.5GB; what is free by default, and never less than two layers\n"
            "take, or about five times the largest weight",
        )
        parser.add_argument(
            "--last-logits",
            action="store_true",
            help="logits of each row's last token only, for a shorter prefill where text is generated; fed 0 as\n"
            "num_logits_to_keep the graph gives all, which scoring text needs",
        )
        group = parser.add_argument_group("engine, of format tensorrt")
        group.add_argument("--builder", help="tensorrt (default), on and for the GPU that is here, or tensorrt-rtx")
        group.add_argument("--compute-capability", help="GPUs to build for without one, as 89,120: of tensorrt-rtx")
        group.add_argument("--max-batch", type=int, help="rows (default 1)")
        group.add_argument("--max-length", type=int, help="tokens of a text (default 2048, or what the model has)")
        group.add_argument("--max-input", type=int, help="new tokens a call (default as many as a text has)")
        group = parser.add_argument_group("quantization, of the graph that was compared with torch")
        tables = (QUANTIZATION_LINES, ENGINE_QUANTIZATION_LINES)
        ways, engines = ("\n".join(f"  {name}: {line}" for name, line in table.items()) for table in tables)
        group.add_argument(
            "--quantize", default="none", help=f"none (default), or one of\n{ways}\nof tensorrt\n{engines}"
        )
        _exclude_flag(group)
        group.add_argument(
            "--calibration",
            help=f"for int8-static and int4-gptq, of tensorrt int8 and fp8: {SPEC}\n(default {CHOOSING_TEXT})",
        )
        group.add_argument("--samples", type=int, help="calibration windows (default 32)")
        group.add_argument("--length", type=int, help="tokens a window (default 256)")
        group.add_argument("--seed", type=int, help="of what text is drawn (default 0)")


class OrthogonalityCommand(_Command):
    """`optimum-cli streamline orthogonality`."""

    COMMAND = CommandInfo(
        name="orthogonality",
        help="Does pruning leave quantizing what it was? Measured, in both orders.",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `orthogonality`."""
        _Command.parse_args(parser)
        _model_flags(parser)
        parser.add_argument("recipe", type=Path, nargs="?", help="a YAML recipe of the pruning; flags go over it")
        parser.add_argument(
            "--output", type=Path, default=Path("streamline-orthogonality"), help="a folder for the report"
        )
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this program")
        names = ", ".join((*QUANTIZATION_LINES, *CHECKPOINT_QUANTIZATION_LINES))
        parser.add_argument(
            "--quantizers",
            default="int8,int4",
            help=f"by commas (default int8,int4), of\n{names};\nthe first five in ONNX Runtime, the others in torch",
        )
        _prune_flags(parser, quantizes=False)
        _judgement_flags(parser)


class ValidateCommand(_Command):
    """`optimum-cli streamline validate`."""

    COMMAND = CommandInfo(name="validate", help="Accuracy and latency of candidates against the original.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `validate`."""
        _Command.parse_args(parser)
        parser.add_argument("original", help="the original checkpoint, which --revision is of")
        parser.add_argument(
            "candidate",
            nargs="+",
            help="checkpoints or exports; an export of the original is recognised. A Hub id as name@revision",
        )
        parser.add_argument("--output", type=Path, default=Path("streamline-report"), help="a folder for the report")
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this program")
        _source_flags(parser)
        _judgement_flags(parser)
        parser.add_argument(
            "--questions",
            type=Path,
            metavar="FILE",
            help="multiple-choice questions, for accuracy and stability: one JSON object a line, such as\n"
            '{"question": "The capital of France is", "options": [" Paris", " London"], "answer": 0}',
        )
        group = parser.add_argument_group("how it is measured")
        _recipe_flag(group, "--dtype", "what checkpoints are computed in: fp32 (default), fp16 or bf16")
        group.add_argument("--rounds", type=int, default=10, help="timed rounds of every model in turn (default 10)")
        _common_recipe_flags(group)


class StreamlineCommand(BaseOptimumCLICommand):
    """`optimum-cli streamline`, the group of the commands above."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Make an unknown command one line."""
        parser.error = _error  # type: ignore[method-assign]

    COMMAND = CommandInfo(name="streamline", help="Make language models shallower, and prove what it cost.")
    SUBCOMMANDS: ClassVar[tuple[CommandInfo, ...]] = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in (
            RunCommand,
            ScoreCommand,
            PruneCommand,
            QuantizeCommand,
            ExportCommand,
            ValidateCommand,
            OrthogonalityCommand,
        )
    )
