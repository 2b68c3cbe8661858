"""Merging two layers, and channel sensitivities, compared with slow implementations of the paper's rules."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.merging import (
    average_layers,
    fold_norms,
    merge_layers,
    replace_pair,
    share_of_first,
    shared_copy,
)
from optimum.streamline.editing.plan import Merge, Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, decoder_layers, layer_kinds
from optimum.streamline.scoring.channel_sensitivity import closest_pair, measure_channels, ratio_of_first
from optimum.streamline.scoring.merge_search import candidate_losses
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, UNMERGEABLE, every, tiny_model, token_ids

MERGEABLE = sorted(set(ARCHITECTURES) - UNMERGEABLE)
FIRST = 3
# Where biases can be had beside those of the architecture's own, and one kind of attention in the layers merged.
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"layer_types": ["full_attention"] * LAYERS},
    "smollm3": {"no_rope_layers": [1, 1, 0, 0, 0]},
}


def model_of(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture, **FIELDS.get(architecture, {}))


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return decoder_layers(model, architecture_of(model.config))


def some_channels(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Random sensitivities: which channels are merged must not depend on how they were measured."""
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    neurons = dict(model.named_modules())[_path(model, "mlp_out")].weight.shape
    width = max(neurons) if model.config.model_type != "gpt2" else neurons[0]
    draw = torch.Generator().manual_seed(5)
    return [
        {"attention": torch.rand(heads, generator=draw), "mlp": torch.rand(width, generator=draw)}
        for _ in range(model.config.num_hidden_layers)
    ]


def _path(model: PreTrainedModel, field: str) -> str:
    architecture = architecture_of(model.config)
    value = getattr(architecture, field)
    return f"{architecture.layers}.0.{value if isinstance(value, str) else value[0]}"


def merged(model: PreTrainedModel, first: int, attention: float, mlp: float) -> PreTrainedModel:
    model = copy.deepcopy(model)
    merge = Merge(first, attention, mlp)
    replace_pair(model, first, merge_layers(model, merge, some_channels(model)))
    return model


@pytest.mark.parametrize("architecture", every(MERGEABLE))
def test_folding_leaves_the_function(architecture: str) -> None:
    model, ids = model_of(architecture), token_ids()
    before = logits(model, ids)
    data = architecture_of(model.config)
    for layer in layers_of(model):
        fold_norms(layer, data)
    torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=0)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    if architecture in ("gpt2", "gpt_neox", "opt", "starcoder2"):
        plain = (x - x.mean(1, keepdim=True)) / x.var(1, unbiased=False, keepdim=True).sqrt()
    else:
        plain = x / x.square().mean(1, keepdim=True).sqrt()
    for norm in (data.attention_norm, data.mlp_norm):
        torch.testing.assert_close(layers_of(model)[2].get_submodule(norm)(x), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("architecture", every(MERGEABLE))
def test_all_channels_of_one_layer_is_removal_of_the_other(architecture: str, share: float) -> None:
    model, ids = model_of(architecture), token_ids()
    removed = copy.deepcopy(model)
    apply_plan(removed, Plan(LAYERS, (FIRST + 1 if share else FIRST,)), None)
    other = merged(model, FIRST, share, share)
    assert other.config.to_dict() == removed.config.to_dict()
    torch.testing.assert_close(logits(other, ids), logits(removed, ids), atol=1e-5, rtol=0)


def written_by(layer: nn.Module, path: str, keep: list[int], channels: int, share: float) -> None:
    """Make a projection write what `keep` of its channels write and `share` of its bias, in place."""
    projection = layer.get_submodule(path)
    weight = projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
    width = weight.shape[1] // channels
    with torch.no_grad():
        for channel in range(channels):
            if channel not in keep:
                weight[:, channel * width : (channel + 1) * width] = 0
        if getattr(projection, "bias", None) is not None:
            projection.bias.mul_(share)


def mlp_of(layer: nn.Module) -> Any:
    return layer.mlp if hasattr(layer, "mlp") else lambda x: layer.fc2(layer.activation_fn(layer.fc1(x)))


def both(model: PreTrainedModel, first: int, attention: float, mlp: float, ids: torch.Tensor) -> torch.Tensor:
    """The logits with layer `first` writing what the kept channels of both layers write, no weight concatenated.

    Both layers compute whole, on their own norms; only what the channels that are not kept write is left out.
    """
    model = copy.deepcopy(model)
    data, channels = architecture_of(model.config), some_channels(model)
    one, two = layers_of(model)[first], layers_of(model)[first + 1]
    for kind, share, path in (("attention", attention, data.attention_out), ("mlp", mlp, data.mlp_out[0])):
        count = len(channels[first][kind])
        kept = round(share * count)
        ranks = [sorted(range(count), key=lambda j, i=i, k=kind: -float(channels[i][k][j])) for i in (first, first + 1)]
        written_by(one, path, ranks[0][:kept], count, share)
        written_by(two, path, ranks[1][: count - kept], count, 1 - share)
    for norm in data.head_norms:
        gains = [layer.get_submodule(norm).weight.data for layer in (one, two)]
        gain = attention * gains[0] + (1 - attention) * gains[1]
        for layer in (one, two):
            layer.get_submodule(norm).weight.data = gain
    apply_plan(model, Plan(LAYERS, (first + 1,)), None)
    seen: dict[str, torch.Tensor] = {}
    for norm in (data.attention_norm, data.mlp_norm):
        one.get_submodule(norm).register_forward_pre_hook(lambda _, args, norm=norm: seen.update({norm: args[0]}))

    def add_attention(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        normed = two.get_submodule(data.attention_norm)(seen[data.attention_norm])
        attend = two.get_submodule(data.attention)
        # The normed stream comes first, by place or by name.
        kwargs = kwargs if args else {**kwargs, "hidden_states": normed}
        other = attend(normed, *args[1:], **kwargs) if args else attend(**kwargs)
        return (output[0] + other[0], *output[1:])

    def add_mlp(_: object, args: object, output: torch.Tensor) -> torch.Tensor:
        stream = seen[data.mlp_norm]
        return output + mlp_of(two)(two.get_submodule(data.mlp_norm)(stream))

    one.get_submodule(data.attention).register_forward_hook(add_attention, with_kwargs=True)
    one.get_submodule(data.mlp[-1]).register_forward_hook(add_mlp)
    return logits(model, ids)


@pytest.mark.parametrize(("attention", "mlp"), [(0.5, 0.25), (1.0, 0.0)])
@pytest.mark.parametrize("architecture", every(MERGEABLE))
def test_a_merged_layer_writes_what_the_kept_channels_write(architecture: str, attention: float, mlp: float) -> None:
    model, ids = model_of(architecture).double(), token_ids()
    torch.testing.assert_close(
        logits(merged(model, FIRST, attention, mlp), ids),
        both(model, FIRST, attention, mlp, ids),
        atol=1e-5,  # transformers' norms compute in float32
        rtol=0,
    )


def test_channels_keep_their_order_the_first_layers_before_the_seconds() -> None:
    model = model_of("llama")
    channels = [{"attention": torch.tensor([1.0, 1.0]), "mlp": torch.arange(48.0) % 7} for _ in range(LAYERS)]
    new = merge_layers(model, Merge(1, 0.5, 1 / 3), channels)
    one, two = layers_of(model)[1], layers_of(model)[2]
    # 16 of the first: the six 6s (6, 13, ..), the six 5s, and the first four 4s; of the second the first 32 likewise.
    firsts = sorted(sorted(range(48), key=lambda j: (-(j % 7), j))[:16])
    seconds = sorted(sorted(range(48), key=lambda j: (-(j % 7), j))[:32])
    for name, (norm, rows) in {
        "mlp.up_proj": ("post_attention_layernorm", [(one, j) for j in firsts] + [(two, j) for j in seconds]),
        # Two key-value heads of 8, each serving two query heads; ties go to the first head.
        "self_attn.k_proj": ("input_layernorm", [(of, j) for of in (one, two) for j in range(8)]),
        "self_attn.q_proj": ("input_layernorm", [(of, j) for of in (one, two) for j in range(16)]),
    }.items():
        rows_expected = [
            of.get_submodule(name).weight[j].double() * of.get_submodule(norm).weight.double() for of, j in rows
        ]
        torch.testing.assert_close(
            new.get_submodule(name).weight.double(), torch.stack(rows_expected), rtol=1e-6, atol=0
        )
        biases = torch.stack([of.get_submodule(name).bias[j] for of, j in rows])
        assert torch.equal(new.get_submodule(name).bias, biases)
    columns = [of.self_attn.o_proj.weight[:, j] for of in (one, two) for j in range(16)]
    assert torch.equal(new.self_attn.o_proj.weight, torch.stack(columns, 1))
    torch.testing.assert_close(new.self_attn.o_proj.bias, (one.self_attn.o_proj.bias + two.self_attn.o_proj.bias) / 2)
    torch.testing.assert_close(new.mlp.down_proj.bias, one.mlp.down_proj.bias / 3 + two.mlp.down_proj.bias * 2 / 3)


def test_a_share_stands_for_whole_channels() -> None:
    model = tiny_model("llama", intermediate_size=49)
    assert 1 / 49 * 49 < 1
    new = merge_layers(model, Merge(1, 0.0, 1 / 49), [{"attention": torch.ones(2), "mlp": torch.ones(49)}] * LAYERS)
    columns = [layers_of(model)[layer].mlp.down_proj.weight for layer in (1, 2)]
    assert torch.equal(new.mlp.down_proj.weight, torch.cat([columns[0][:, :1], columns[1][:, :48]], 1))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma", "phi3"])
def test_a_layer_that_does_nothing_merges_into_nothing(architecture: str) -> None:
    model, ids = model_of(architecture), token_ids()
    data = architecture_of(model.config)
    for path in (data.attention_out, data.mlp_out[0]):
        for parameter in layers_of(model)[2].get_submodule(path).parameters():
            nn.init.zeros_(parameter)
    before = logits(model, ids)
    for first in (1, 2):
        other = copy.deepcopy(model)
        scores, channels = measure_channels(other, Windows(ids, "random"))
        assert not channels[2]["attention"].any()
        assert not channels[2]["mlp"].any()
        ratio = ratio_of_first(scores, first)
        heads, neurons = len(channels[0]["attention"]), len(channels[0]["mlp"])
        merge = Merge(first, share_of_first(ratio, heads), share_of_first(ratio, neurons))
        replace_pair(other, first, merge_layers(other, merge, channels))
        torch.testing.assert_close(logits(other, ids), before, atol=1e-5, rtol=0)


# Which norm each projection reads.
READS = {
    "llama": {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    },
    "gpt2": {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"},
}
READS["qwen3"] = READS["llama"]


def folded(architecture: str, layer: nn.Module, name: str) -> torch.Tensor:
    """A parameter in float64, the gain and the bias of the norm it reads taken into it: W g, and c + W b."""
    value, (path, _, kind) = layer.get_parameter(name).double(), name.rpartition(".")
    if path in READS[architecture].values():
        return torch.ones_like(value) if kind == "weight" else torch.zeros_like(value)
    if path not in READS[architecture]:
        return value
    norm = layer.get_submodule(READS[architecture][path])
    if kind == "weight":  # gpt2's matrices stand the other way round
        return norm.weight.double()[:, None] * value if architecture == "gpt2" else value * norm.weight.double()
    if architecture != "gpt2":  # whose norms alone have a bias
        return value
    weight = layer.get_parameter(f"{path}.weight").double()
    return value + norm.bias.double() @ weight


@pytest.mark.parametrize(("architecture", "biases"), [("llama", 7), ("qwen3", 0), ("gpt2", 6)])
def test_the_average_is_of_folded_parameters(architecture: str, biases: int) -> None:
    model = model_of(architecture)
    one, two = layers_of(model)[1], layers_of(model)[2]
    new = average_layers(model, 1, 0.3)
    names = [name for name, _ in one.named_parameters()]
    assert [name for name, _ in new.named_parameters()] == names
    assert sum(name.endswith("bias") for name in names) == biases
    for name in names:
        expected = 0.3 * folded(architecture, one, name) + 0.7 * folded(architecture, two, name)
        torch.testing.assert_close(new.get_parameter(name).double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gpt_neox", "opt"])
def test_sensitivities_are_the_papers(architecture: str) -> None:
    model, ids = model_of(architecture), token_ids(6, 12)
    data = architecture_of(model.config)
    _, channels = measure_channels(model, Windows(ids, "random"))
    heads, groups = model.config.num_attention_heads, len(channels[0]["attention"])
    assert groups == (2 if architecture in ("llama", "qwen3") else 4)
    for index, layer in enumerate(layers_of(model)):
        inputs: dict[str, torch.Tensor] = {}
        paths = {"attention": data.attention_out, "mlp": data.mlp_out[0]}
        hooks = [
            layer.get_submodule(path).register_forward_pre_hook(
                lambda _, args, kind=kind, to=inputs: to.update({kind: args[0].double().reshape(ids.numel(), -1)})
            )
            for kind, path in paths.items()
        ]
        logits(model, ids)
        for hook in hooks:
            hook.remove()
        weights = {}
        for kind, path in paths.items():
            weight = layer.get_submodule(path).weight.detach().double()
            weights[kind] = weight if isinstance(layer.get_submodule(path), nn.Linear) else weight.T
        tokens, neurons = inputs["mlp"].shape
        for j in range(0, neurons, 7):
            mean = sum(abs(float(inputs["mlp"][t, j])) for t in range(tokens)) / tokens
            reach = sum(abs(float(weights["mlp"][r, j])) for r in range(32))
            assert float(channels[index]["mlp"][j]) == pytest.approx(mean * reach, rel=1e-5)
        width = inputs["attention"].shape[1] // heads
        for group in range(groups):
            served = [head for head in range(heads) if head // (heads // groups) == group]
            new_layers = [head * width + dim for head in served for dim in range(width)]
            each = [
                float(inputs["attention"][:, c].abs().mean()) * float(weights["attention"][:, c].abs().sum())
                for c in new_layers
            ]
            assert float(channels[index]["attention"][group]) == pytest.approx(sum(each) / len(each), rel=1e-5)


def raw_stream(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """h_0, .., h_L in float64, taken without `measure_scores`."""
    layers, stream = layers_of(model), []
    hooks = [layer.register_forward_pre_hook(lambda _, args: stream.append(args[0].double())) for layer in layers]
    hooks.append(
        layers[-1].register_forward_hook(
            lambda _, args, out: stream.append((out[0] if isinstance(out, tuple) else out).double())
        )
    )
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return stream


@pytest.mark.parametrize("seed", range(4))
def test_pair_and_ratio_are_the_papers(seed: int) -> None:
    model, ids = tiny_model("llama", seed=seed), token_ids(6, 12, seed=seed)
    stream = raw_stream(model, ids)
    cosine = lambda i, j, w, t: float(nn.functional.cosine_similarity(stream[i][w, t], stream[j][w, t], dim=0))  # noqa: E731
    distance = [
        sum(math.acos(max(0.0, min(1.0, cosine(i, i + 2, w, -1)))) / math.pi for w in range(6)) / 6
        for i in range(LAYERS - 1)
    ]
    influence = [
        sum(1 - max(0.0, min(1.0, cosine(i, i + 1, w, t))) for w in range(6) for t in range(12)) for i in range(LAYERS)
    ]
    scores, _ = measure_channels(model, Windows(ids, "random"))
    first = closest_pair(model, scores)
    assert first == distance.index(min(distance))
    assert ratio_of_first(scores, first) == pytest.approx(
        influence[first] / sum(influence[first : first + 2]), rel=1e-5
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio"), [(-4e-16, 9e-16, 0.0), (9e-16, -4e-16, 1.0), (-4e-16, -9e-16, 0.5), (0.3, 0.1, 0.75)]
)
def test_rounding_makes_no_part_of_less_than_nothing(ours: float, theirs: float, ratio: float) -> None:
    scores = Scores(((1.0, 1 - ours, 0.0), (1 - ours, 1.0, 1 - theirs), (0.0, 1 - theirs, 1.0)))
    assert ratio_of_first(scores, 0) == pytest.approx(ratio, abs=1e-12)


def test_pairs_are_of_one_kind_of_attention() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model("qwen2", layer_types=kinds)
    scores, _ = measure_channels(model, Windows(token_ids(), "random"))
    assert len(set(layer_kinds(model.config))) == 2
    assert min(range(4), key=scores.block_angle(2).__getitem__) != 1
    assert closest_pair(model, scores) == 1


@pytest.mark.parametrize(
    ("ratio", "channels", "of_first"),
    [
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.29, 10, 2),
        (0.71, 10, 8),
        (0.5, 5, 3),
        (0.49, 2, 0),
        (0.51, 2, 2),
        (0, 4, 0),
        (1, 4, 4),
    ],
)
def test_the_smaller_part_is_cut_to_whole_channels(ratio: float, channels: int, of_first: int) -> None:
    assert share_of_first(ratio, channels) * channels == pytest.approx(of_first, abs=1e-12)


def test_what_stands_before_a_pair_runs_once_a_batch() -> None:
    model, calls = model_of("llama"), [0] * LAYERS
    channels = some_channels(model)
    for index, layer in enumerate(layers_of(model)):
        # A copy of a layer keeps its hooks: those of the layer that is built anew stand for the pair.
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    builds = [lambda share=share: merge_layers(model, Merge(2, share, share), channels) for share in (0.0, 0.5, 1.0)]
    candidate_losses(model, 2, builds, Windows(token_ids(6, 12), "x"))
    batches = 2
    assert calls == [batches, batches, 3 * batches, 0, 3 * batches]


def test_no_finite_loss_of_any_candidate_is_said() -> None:
    model = model_of("llama")
    channels = some_channels(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = torch.nan
    build = lambda: merge_layers(model, Merge(1, 0.5, 0.5), channels)  # noqa: E731
    with pytest.raises(StreamlineError, match="the loss on the calibration text is not finite for any merge"):
        candidate_losses(model, 1, [build], Windows(token_ids(), "x"))


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_losses_of_candidates_are_those_of_whole_models(architecture: str, first: int) -> None:
    model, ids = model_of(architecture), token_ids(6, 12)
    channels = some_channels(model)
    merges = [Merge(first, 0.5, share) for share in (0.0, 0.25, 1.0)]
    found = candidate_losses(
        model, first, [lambda merge=merge: merge_layers(model, merge, channels) for merge in merges], Windows(ids, "x")
    )
    for merge, loss in zip(merges, found, strict=True):
        log = logits(merged(model, first, merge.attention, merge.mlp), ids).double().log_softmax(-1)
        literal = [-float(log[w, t, ids[w, t + 1]]) for w in range(6) for t in range(11)]
        assert loss == pytest.approx(sum(literal) / len(literal), rel=1e-5)


def test_a_shared_copy_shares_weights_and_nothing_else() -> None:
    model = model_of("llama")
    other = shared_copy(model)
    assert all(
        a is b
        for a, b in zip(
            model.state_dict(keep_vars=True).values(), other.state_dict(keep_vars=True).values(), strict=True
        )
    )
    replace_pair(other, 1, layers_of(other)[1])
    assert other.config.num_hidden_layers == len(layers_of(other)) == LAYERS - 1
    assert model.config.num_hidden_layers == len(layers_of(model)) == LAYERS
    assert [layer.self_attn.layer_idx for layer in layers_of(model)] == list(range(LAYERS))
    assert all(layer.self_attn.config is other.config for layer in layers_of(other))
    assert merge_layers(other, Merge(0, 0.5, 0.5), some_channels(other)).self_attn.config is other.config
