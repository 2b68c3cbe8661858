"""What real users give these commands, rebuilt in small, and what comes of it; writes the tables of docs/inputs.md.

A case is named for its kind. Faults of text, tokenizers and windows have more tests in files of their own; here each
goes through a command, and its line is read as its user would read it.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cases import LICENSE, TEXT, edit_config, edit_weights, make, tokenizer
from console import Outcome, command
from optimum.streamline.evaluation import validate
from optimum.streamline.model_files.artifact import Artifact
from pages import check_part
from reference import REFERENCE
from timer import Timer
from tokenizers_made import rolled, with_beginning

COMMIT = "c0ffee" * 6 + "c0de"
QUICK = ("--calibration", LICENSE, "--samples", "4", "--length", "32")
JUDGED = ("--eval-data", LICENSE, "--eval-samples", "4", "--length", "32")
EVAL = ("--eval-data", "stdlib")
Words = list[object]


@dataclass(frozen=True)
class Case:
    """One input.

    Args:
        kind: The fault it is an example of.
        what: The input, in words.
        make: Makes it in a folder; returns the words of the command after `streamline`.
        code: The exit code that is right.
        says: What the command must say.
        check: What must be true of the folder afterwards.
        marks: Of pytest.
    """

    kind: str
    what: str
    make: Callable[[Path], Words]
    code: int
    says: str
    check: Callable[[Path], object] | None = None
    marks: tuple[pytest.MarkDecorator, ...] = ()


def prune(folder: Path, *flags: object) -> Words:
    return ["prune", "-m", folder / "model", folder / "out", "--layers", 3, *(flags or QUICK)]


def fp8(folder: Path) -> Path:
    """Weights in 8-bit floats by blocks of 128 x 128, as DeepSeek's are."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 4}
    model = make(folder / "model", "qwen3", torch.bfloat16, **sizes)

    def pack(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.endswith("proj.weight")]:
            rows, columns = weights[name].shape
            blocks = weights[name].float().reshape(rows // 128, 128, columns // 128, 128)
            scales = blocks.abs().amax((1, 3)) / 448
            packed = (blocks / scales[:, None, :, None]).reshape(rows, columns)
            weights[name], weights[f"{name}_scale_inv"] = packed.to(torch.float8_e4m3fn), scales

    edit_weights(model, pack)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    edit_config(model, quantization_config=quantization)
    return folder


def overflowing(folder: Path) -> Path:
    model = make(folder / "model", dtype=torch.bfloat16)
    names = [f"model.layers.2.mlp.{name}_proj.weight" for name in ("up", "down")]
    edit_weights(model, lambda weights: [weights[name].mul_(700) for name in names])
    return folder


def with_code(folder: Path) -> Path:
    model = make(folder / "model")
    (model / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n"
        "from .parts_own import Part\n\n\n"
        "class OwnForCausalLM(Part, LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (model / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    pass\n"
    )
    (model / "parts_own.py").write_text("class Part:\n    pass\n")
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(model, auto_map=classes)
    return folder


def is_loadable_with_its_code(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    for trusted, name in ((False, "LlamaForCausalLM"), (True, "OwnForCausalLM")):
        model = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=trusted)
        assert type(model).__name__ == name


def without_dtype(folder: Path) -> Path:
    edit_config(make(folder / "model", dtype=torch.bfloat16), dtype=None)
    return folder


def is_stored_in_bf16(folder: Path) -> None:
    assert {value.dtype for value in load_file(folder / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def foreign_weights(folder: Path) -> Words:
    from optimum.streamline.checkpoints.loading import load_stock, load_tokenizer
    from optimum.streamline.checkpoints.saving import save_model
    from optimum.streamline.editing.apply import apply_plan
    from optimum.streamline.editing.plan import Plan
    from optimum.streamline.model_files.source import ModelSource

    source = ModelSource(str(make(folder / "model")))
    model = load_stock(source)
    apply_plan(model, Plan(8, (3, 4)), None)
    save_model(model, load_tokenizer(source), None, folder / "pruned")
    shutil.copy(folder / "model" / "model.safetensors", folder / "model" / "consolidated.safetensors")
    return [
        "validate",
        folder / "model",
        folder / "pruned",
        *JUDGED,
        "--max-size-ratio",
        0.6,
        "--output",
        folder / "out",
    ]


def size_leaves_the_foreign_file_out(folder: Path) -> None:
    rows = json.loads((folder / "out" / "report.json").read_text())["rows"]
    assert rows[0]["disk_bytes"] == (folder / "model" / "model.safetensors").stat().st_size


def text_file(folder: Path, name: str, content: bytes) -> Words:
    make(folder / "model")
    (folder / name).write_bytes(content)
    return prune(folder, "--calibration", folder / name, *QUICK[2:])


def rows_of_json() -> bytes:
    return "".join(json.dumps({"text": part}) + "\n" for part in TEXT.split("\n\n")).encode()


def parquet(folder: Path) -> Words:
    from datasets import Dataset

    make(folder / "model")
    Dataset.from_dict({"text": TEXT.split("\n\n")}).to_parquet(folder / "text.parquet")
    return prune(folder, "--calibration", folder / "text.parquet", *QUICK[2:])


def weights_as_text(folder: Path) -> Words:
    make(folder / "model")
    return prune(folder, "--calibration", folder / "model" / "model.safetensors", *QUICK[2:])


def class_without_files(folder: Path) -> Words:
    model = make(folder / "model")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return prune(folder)


def rolled_candidate(folder: Path) -> Words:
    shutil.copytree(REFERENCE, folder / "rolled")
    rolled(folder / "rolled")
    return ["validate", REFERENCE, folder / "rolled", *JUDGED, "--output", folder / "out"]


def more_tokens_than_embeddings(folder: Path) -> Words:
    model = make(folder / "model", vocab_size=len(tokenizer()))
    more = type(tokenizer()).from_pretrained(model)
    more.add_tokens(["the ", "and ", "of "])
    more.save_pretrained(model)
    return prune(folder)


def beginning_tokenizer(folder: Path) -> Words:
    shutil.copytree(REFERENCE, folder / "model")
    with_beginning("<s>").save_pretrained(folder / "model")
    return prune(folder)


def every_window_begins_with_it(folder: Path) -> None:
    assert len(json.loads((folder / "out" / "streamline.json").read_text())["data"]["calibration"]["prefix"]) == 1


def compressed_tensors(folder: Path) -> Words:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}}
    fields = {"quant_method": "compressed-tensors", "config_groups": groups, "format": "pack-quantized"}
    edit_config(make(folder / "model"), quantization_config=fields)
    return prune(folder)


def pickled(folder: Path) -> Words:
    model = make(folder / "model", "opt")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return prune(folder)


def evil_pickle(folder: Path) -> Words:
    pickled(folder)
    torch.save({"model.decoder.embed_tokens.weight": print}, folder / "model" / "pytorch_model.bin")
    return prune(folder)


def of_the_hub(folder: Path) -> Words:
    """`org/small` at the branch `v1`, as the Hub's client keeps it."""
    repository = folder / "cache" / "models--org--small"
    make(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    return ["prune", "-m", "org/small@v1", folder / "out", "--layers", 3, *QUICK, "--cache_dir", folder / "cache"]


def commit_is_recorded(folder: Path) -> None:
    record = json.loads((folder / "out" / "streamline.json").read_text())["source"]
    assert (record["model"], record["revision"], record["commit"]) == ("org/small", "v1", COMMIT)
    assert f"`org/small` at commit {COMMIT}" in (folder / "out" / "README.md").read_text()


def by_flag(folder: Path) -> Words:
    words = of_the_hub(folder)
    return [*words[:2], "org/small", *words[3:], "--revision", "v1"]


def adapter(folder: Path, base: str | None = None) -> Path:
    """A LoRA adapter in `folder / "model"`, of a base of its own unless another is named."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    make(folder / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(target_modules=["q_proj", "up_proj"])
    )
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    adapted.save_pretrained(folder / "model")
    if base is not None:
        edit_config(folder / "model", "adapter_config.json", base_model_name_or_path=base)
    return folder


def adapter_beside_model(folder: Path) -> Path:
    adapter(folder)
    shutil.copytree(folder / "base", folder / "model", dirs_exist_ok=True)
    return folder


def adapter_is_in_the_weights(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    base, made = (load_file(folder / each / "model.safetensors")[name] for each in ("base", "out"))
    change = load_file(folder / "model" / "adapter_model.safetensors")
    a, b = (change[f"base_model.model.{name.replace('weight', f'lora_{which}.weight')}"] for which in "AB")
    assert torch.allclose(made, base + b @ a * (8 / 8), atol=1e-5)
    assert not torch.allclose(made, base, atol=1e-3)


def pointer(folder: Path) -> Words:
    make(folder / "model")
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
    (folder / "model" / "model.safetensors").write_text(text)
    return prune(folder)


def foreign_graph(folder: Path) -> Words:
    make(folder / "model")
    (folder / "onnx").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, folder / "onnx")
    (folder / "onnx" / "model.onnx").write_bytes(b"\x08\x0a")
    return ["validate", folder / "model", folder / "onnx", *JUDGED, "--output", folder / "out"]


def own_export(folder: Path) -> Words:
    make(folder / "model")
    Artifact(str(folder / "model"), "onnx", "fp32", "org/small", "0", {}, (0,)).write(folder / "model")
    return prune(folder)


def value_head(folder: Path) -> Words:
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    edit_weights(make(folder / "model"), lambda weights: weights.update(head))
    return prune(folder)


def integers(folder: Path) -> Words:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(
        make(folder / "model"), lambda weights: weights.update({name: torch.ones_like(weights[name], dtype=torch.int8)})
    )
    return prune(folder)


def integer_bias(folder: Path) -> Words:
    name = "model.layers.1.self_attn.q_proj.bias"
    model = make(folder / "model", "qwen2", num_hidden_layers=5)
    edit_weights(model, lambda weights: weights.update({name: torch.ones_like(weights[name], dtype=torch.bool)}))
    return prune(folder)


def code_that_is_not_whole(folder: Path) -> Words:
    (with_code(folder) / "model" / "parts_own.py").unlink()
    return [*prune(folder), "--trust-remote-code"]


def other_width(folder: Path) -> Words:
    edit_config(make(folder / "model"), hidden_size=64)
    return prune(folder)


def doubles(folder: Path) -> Words:
    edit_weights(make(folder / "model"), lambda w: w.update({name: value.double() for name, value in w.items()}))
    return prune(folder)


def column_of_a_table(folder: Path) -> Words:
    words = text_file(folder, "own.jsonl", rows_of_json().replace(b'"text"', b'"body"'))
    return [f"{word},body" if word == folder / "own.jsonl" else word for word in words]


def no_path_of_the_table_is_on_the_card(folder: Path) -> None:
    card = (folder / "out" / "README.md").read_text()
    assert str(folder) not in card
    assert "of `own.jsonl,body`" in card


def gptq(folder: Path) -> Words:
    edit_config(make(folder / "model"), quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    return prune(folder)


def no_path_is_on_the_card(folder: Path) -> None:
    card = (folder / "out" / "README.md").read_text()
    assert str(folder) not in card
    assert "from `model`:" in card
    assert "of `own.txt`" in card


ONNX = (pytest.mark.onnx,)
CASES = [
    Case("output is another model", "weights in fp8 by blocks, on a machine without a GPU", lambda f: prune(fp8(f)), 2,
         "quantized (fp8), which transformers can read on cpu but not save"),
    Case("output is another model", "weights that overflow fp16 when it is computed in, stored as fp16",
         lambda f: [*prune(overflowing(f)), "--dtype", "fp16"], 1,
         "its logits are not finite in float16"),
    Case("output is another model", "a model with code of its own", lambda f: prune(with_code(f)), 0,
         "which is not run: transformers' LlamaForCausalLM is used", is_loadable_with_its_code),
    Case("output is another model", "the same, with --trust-remote-code", lambda f: [*prune(with_code(f)), "--trust-remote-code"], 0,
         "which is run, because --trust-remote-code was given", is_loadable_with_its_code),
    Case("stored in another dtype", "bf16 weights and no dtype in the config", lambda f: prune(without_dtype(f)), 0,
         "saved", is_stored_in_bf16),
    Case("used another file beside the model", "consolidated.safetensors beside the weights, a limit of size", foreign_weights, 3,
         "size ratio 0.9", size_leaves_the_foreign_file_out),
    Case("used another file beside the model", "a LoRA adapter beside a whole model", lambda f: prune(adapter_beside_model(f)), 0,
         "is an adapter: merged into its base model '", adapter_is_in_the_weights),
    Case("refused although transformers reads it", "a LoRA adapter given as the model", lambda f: prune(adapter(f)), 0,
         "is an adapter: merged into its base model '", adapter_is_in_the_weights),
    Case("refused although transformers reads it", "the same, its base gone", lambda f: prune(adapter(f, "/gone/base")), 2,
         "its base '/gone/base' does not exist"),
    Case("binary data read as text", "text in parquet", parquet, 0, "text.parquet"),
    Case("binary data read as text", "text in JSON lines", lambda f: text_file(f, "text.jsonl", rows_of_json()), 0,
         "text.jsonl, 4 windows of 32 tokens"),
    Case("binary data read as text", "text in a gzip file",
         lambda f: text_file(f, "text.txt.gz", gzip.compress(TEXT.encode())), 0,
         "text.txt.gz, 4 windows of 32 tokens"),
    Case("binary data read as text", "weights given as text", weights_as_text, 2, "model.safetensors"),
    Case("binary data read as text", "bytes that are no text under a text's name",
         lambda f: text_file(f, "text.txt", b"text " * 99 + b"\xff\xfe\x00\x01"), 2, "text.txt"),
    Case("tokenizer not checked", "a tokenizer class without its files", class_without_files, 2,
         "it cannot read this text, or its files are missing"),
    Case("tokenizer not checked", "a candidate whose vocabulary is rolled by one", rolled_candidate, 2,
         "its tokenizer gives other tokens for the evaluation text than the original's"),
    Case("tokenizer not checked", "a tokenizer with three tokens more than embeddings", more_tokens_than_embeddings,
         2, "the model has embeddings for"),
    Case("no BOS in windows", "a tokenizer that adds BOS", beginning_tokenizer, 0, "saved",
         every_window_begins_with_it),
    Case("gave a traceback", "a checkpoint of compressed-tensors, the package not installed", compressed_tensors, 2,
         "quantized (compressed-tensors), which cannot be read here"),
    Case("refused although transformers reads it", "weights in pytorch_model.bin alone", pickled, 0, "with torch.load(weights_only=True)"),
    Case("refused although transformers reads it", "such a file that holds more than tensors", evil_pickle, 2, "pytorch_model.bin: holds pickled objects other than tensors"),
    Case("refused although transformers reads it", "a Hub model as name@revision", of_the_hub, 0, "saved", commit_is_recorded),
    Case("refused although transformers reads it", "a Hub model with --revision", by_flag, 0, "saved", commit_is_recorded),
    Case("gave an unclear message", "a Git LFS pointer in place of the weights", pointer, 2, "is a Git LFS pointer, not the weights"),
    Case("gave an unclear message", "an ONNX folder of another program as a candidate", foreign_graph, 2,
         "holds an ONNX graph that another program made (model.onnx)"),
    Case("gave an unclear message", "our own export given to prune", own_export, 2,
         "is an export (onnx), not a checkpoint; give the checkpoint that it was made from, 'org/small'"),
    Case("gave an unclear message", "fp8 weights given to export", lambda f: ["export", "-m", fp8(f) / "model", f / "out"], 2,
         "quantized (fp8)", marks=ONNX),
    Case("gave an unclear message", "GPTQ weights without their package", gptq, 2, "its package is not installed"),
    Case("gave an unclear message", "a model that is not finite in fp16, given to export",
         lambda f: ["export", "-m", overflowing(f) / "model", f / "out", "--dtype", "fp16"], 2,
         "in this dtype the model's logits are not finite", marks=ONNX),
    Case("gave an unclear message", "a value head beside a whole model", value_head, 2, "such as a value head"),
    Case("gave an unclear message", "integers under the name of a weight", integers, 2, "up_proj.weight holds I8"),
    Case("gave an unclear message", "booleans under the name of a bias", integer_bias, 2, "q_proj.bias holds BOOL"),
    Case("gave an unclear message", "code that lacks a file, with --trust-remote-code", code_that_is_not_whole, 2,
         "its code modeling_own.OwnForCausalLM needs parts_own.py, which is missing"),
    Case("gave an unclear message", "weights of another width than the config", other_width, 2, "do not have the shape that config.json gives"),
    Case("gave an unclear message", "weights of 64 bits", doubles, 2, "none of its weights is stored in fp32, fp16, bf16"),
    Case("published a path", "a column of a local table", column_of_a_table, 0, "saved", no_path_of_the_table_is_on_the_card),
    Case("published a path", "a local original and a local text", lambda f: text_file(f, "own.txt", TEXT.encode()), 0, "saved",
         no_path_is_on_the_card),
]  # fmt: skip

# Folders and files that are no checkpoint, as they come under a person's hand.
Wrong = Callable[[Path], object]
WRONG: dict[str, tuple[Wrong, str]] = {
    "an empty folder": (lambda p: p.mkdir(), "has no config.json"),
    "a file": (lambda p: p.write_text("text"), "is a file; give the folder of a checkpoint"),
    "a report of this program": (
        lambda p: (p.mkdir(), (p / "report.json").write_text("{}")),
        "a report of this program",
    ),
    "a folder with its checkpoint one level down": (lambda p: make(p / "checkpoint-500"), "there is one in checkpoint-500"),
    "GGUF files": (lambda p: (p.mkdir(), (p / "model-q4.gguf").write_bytes(b"GGUF")), "GGUF"),
    "a diffusion pipeline": (lambda p: (p.mkdir(), (p / "model_index.json").write_text("{}")), "diffusion pipeline"),
    "weights in their authors' own form": (
        lambda p: (p.mkdir(), (p / "params.json").write_text("{}"), (p / "consolidated.00.pth").write_bytes(b"0")),
        "convert it to a transformers checkpoint",
    ),
    "weights without a config": (lambda p: (make(p) / "config.json").unlink(), "fetch the config.json"),
    "a config without weights": (lambda p: (make(p) / "model.safetensors").unlink(), "has no weights"),
    "an encoder": (lambda p: (p.mkdir(), edit_config(p, model_type="bert")), "architecture 'bert': is not supported"),
    "a speech model": (lambda p: (p.mkdir(), edit_config(p, model_type="whisper")), "'whisper': is not supported"),
    "an unknown model type": (lambda p: (p.mkdir(), edit_config(p, model_type="mine")), "`mine`"),
    "a page in place of the weights": (
        lambda p: (make(p) / "model.safetensors").write_text("<!doctype html><title>404</title>"),
        "is not a safetensors file, or is incomplete",
    ),
    "an index that names a lost shard": (
        lambda p: (
            (make(p) / "model.safetensors").unlink(),
            (p / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}})),
        ),
        "names 'model-1.safetensors', which is missing",
    ),
    "an index that names a file elsewhere": (
        lambda p: (
            (make(p) / "model.safetensors").unlink(),
            (p / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}})),
        ),
        "weights must lie in the checkpoint's own folder",
    ),
    "a path that is not there": (lambda p: None, "no such folder"),
}  # fmt: skip
COMMANDS: dict[str, Callable[[Path, Path], Words]] = {
    "score": lambda wrong, out: ["score", "-m", wrong, out, *QUICK],
    "prune": lambda wrong, out: ["prune", "-m", wrong, out, "--layers", 3, *QUICK],
    "run": lambda wrong, out: ["run", "-m", wrong, out, "--layers", 3, *QUICK, *EVAL],
    "quantize": lambda wrong, out: ["quantize", "-m", wrong, out, "--quantize", "bnb-nf4"],
    "export": lambda wrong, out: ["export", "-m", wrong, out],
    "validate, the original": lambda wrong, out: ["validate", wrong, REFERENCE, *JUDGED, "--output", out],
    "validate, a candidate": lambda wrong, out: ["validate", REFERENCE, wrong, *JUDGED, "--output", out],
    "orthogonality": lambda wrong, out: ["orthogonality", "-m", wrong, "--layers", 3, *QUICK, *EVAL, "--output", out],
}


def offline_command(*words: object) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(validate, "time_alternating", Timer())
        return command(*words)


Run = Callable[[Case], tuple[Outcome, Path]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The outcome of a case, and its folder; each is run once."""
    done: dict[str, tuple[Outcome, Path]] = {}

    def run_once(case: Case) -> tuple[Outcome, Path]:
        if case.what not in done:
            folder = tmp_path_factory.mktemp("case")
            done[case.what] = offline_command(*case.make(folder)), folder
        return done[case.what]

    return run_once


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=case.marks, id=f"{case.kind}: {case.what}") for case in CASES]
)
def test_an_input_of_a_real_user(case: Case, run: Run) -> None:
    outcome, folder = run(case)
    assert outcome.code == case.code, outcome.err
    assert case.says in " ".join((outcome.out + outcome.err).split())
    assert "Traceback" not in outcome.err
    if case.code in (1, 2):
        assert outcome.err.count("\n") == 1
        assert outcome.err.startswith("error: ")
        assert not (folder / "out").exists()
    if case.check is not None:
        case.check(folder)


Answer = Callable[[str, str], Outcome]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """What a command answers to a wrong model; each is asked once."""
    made: dict[str, Path] = {}
    asked: dict[tuple[str, str], Outcome] = {}

    def ask(wrong: str, to: str) -> Outcome:
        if wrong not in made:
            made[wrong] = tmp_path_factory.mktemp("wrong") / "model"
            WRONG[wrong][0](made[wrong])
        if (wrong, to) not in asked:
            asked[wrong, to] = offline_command(*COMMANDS[to](made[wrong], made[wrong].parent / "out"))
        return asked[wrong, to]

    return ask


@pytest.mark.parametrize(
    "to", [pytest.param(name, marks=ONNX if name in ("export", "orthogonality") else ()) for name in COMMANDS]
)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_model_is_one_line_that_says_what_it_is(wrong: str, to: str, answer: Answer) -> None:
    outcome = answer(wrong, to)
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert WRONG[wrong][1] in outcome.err


def tables(run: Run, answer: Answer) -> str:
    lines = [
        "| what other programs did | input | exit code | what the command says | also tested |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        outcome, folder = run(case)
        also = case.check.__name__.replace("_", " ") if case.check else ""
        lines.append(f"| {case.kind} | {case.what} | {outcome.code} | {said(case, outcome, folder)} | {also} |")
    lines += ["", "| given as a model | what `prune` says |", "|---|---|"]
    for wrong in WRONG:
        error = answer(wrong, "prune").err
        lines.append(f"| {wrong} | {plain(error)} |")
    return "\n".join(lines)


def said(case: Case, outcome: Outcome, folder: Path) -> str:
    spoken = outcome.err or next((line for line in outcome.out.splitlines() if case.says in line), case.says)
    return plain(spoken.replace(f"{folder}/", ""))


def plain(line: str) -> str:
    """A line without paths of this machine, for a table."""
    line = line.replace(f"{LICENSE.parent}/", "")
    words = [
        word if "/pytest-" not in word else word[: word.find("/")] + word.rsplit("/", 1)[1] for word in line.split()
    ]
    return "`" + " ".join(words).replace("|", "\\|").replace("`", "'") + "`"


@pytest.mark.onnx
def test_the_page_says_what_comes_of_each(run: Run, answer: Answer, request: pytest.FixtureRequest) -> None:
    check_part("inputs.md", "inputs", tables(run, answer), request)
