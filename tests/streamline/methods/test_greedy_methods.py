"""SLEB, Shortened LLaMA and BlockPruner, compared with brute force: edit a copy and compute its loss."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from cases import make
from optimum.streamline.checkpoints.loading import load_on_disk, load_stock
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import Plan, PlannedLayer, packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.blockpruner import MAX_UNPAIRED, sublayer_sizes
from optimum.streamline.methods.registry import METHODS, method_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import ARCHITECTURES, decoder_layers
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.ablation import corrected_losses, cross_fitted_losses, removal_losses
from optimum.streamline.scoring.race import MIN_WINDOWS
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.scoring.taylor import taylor_importance
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, every, tiny_model, token_ids

IDS = token_ids(MIN_WINDOWS, 12, seed=1)  # so few that no removal leaves a race early
SOME = ["llama", "qwen3", "gpt2", "gemma2", "opt", "qwen3_moe"]
FAST = {"llama", "gpt_neox", "qwen3_moe"}  # one residual sum after another, one of three terms, and experts
FLAT = Scores(tuple((0.5,) * (LAYERS + 1) for _ in range(LAYERS + 1)))


def planned(model: PreTrainedModel, method: str, **fields: object) -> Plan:
    recipe = make_recipe({"method": method, **fields})
    return method_of(recipe, model.config).plan(recipe, MethodInputs(model, Windows(IDS, "random"), FLAT))


def loss_after(model: PreTrainedModel, removed: set[int], skipped: set[tuple[int, str]] = frozenset()) -> float:
    edited = copy.deepcopy(model)
    apply_plan(edited, Plan(LAYERS, tuple(sorted(removed)), skipped=tuple(sorted(skipped))), None)
    with torch.no_grad():
        logits = edited(IDS).logits.double()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))


@pytest.mark.parametrize("protect", [None, "0,0", "2,1"])
@pytest.mark.parametrize("architecture", SOME)
def test_sleb_takes_at_each_step_what_is_missed_least(architecture: str, protect: str | None) -> None:
    model = tiny_model(architecture)
    first, last = (int(number) for number in (protect or "1,1").split(","))
    removed: set[int] = set()
    for _ in range(2):
        left = [layer for layer in range(first, LAYERS - last) if layer not in removed]
        removed.add(min(left, key=lambda layer: loss_after(model, {*removed, layer})))
    plan = planned(model, "sleb", remove=2, protect=protect)
    assert plan == Plan(LAYERS, tuple(sorted(removed)))


def test_sleb_is_not_one_shot() -> None:
    # Somewhere among a few models the greedy and the one-shot choice have to differ, or one of them is the other.
    models = [tiny_model("llama", seed) for seed in range(6)]
    fields = {"remove": 3, "protect": "0,0"}
    assert any(planned(model, "sleb", **fields) != planned(model, "shortened-ppl", **fields) for model in models)


@pytest.mark.parametrize("protect", [None, "1,2"])
@pytest.mark.parametrize("architecture", SOME)
def test_shortened_ppl_takes_what_is_missed_least_alone(architecture: str, protect: str | None) -> None:
    model = tiny_model(architecture)
    first, last = (int(number) for number in (protect or "0,0").split(","))
    losses = {layer: loss_after(model, {layer}) for layer in range(first, LAYERS - last)}
    expected = tuple(sorted(sorted(losses, key=lambda layer: losses[layer])[:2]))
    assert planned(model, "shortened-ppl", remove=2, protect=protect) == Plan(LAYERS, expected)


@pytest.mark.parametrize("architecture", every())
def test_taylor_importance_is_the_formula(architecture: str) -> None:
    model = tiny_model(architecture)
    before = {name: value.clone() for name, value in model.named_parameters()}
    got = taylor_importance(model, Windows(IDS, "random"))
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())

    exact = tiny_model(architecture).double()
    exact.config._experts_implementation = "eager"  # the faster ones know no float64
    log_p = exact(IDS).logits.log_softmax(-1)[:, :-1]
    loss = -log_p.gather(-1, IDS[:, 1:, None]).mean()
    loss.backward()
    prefix = ARCHITECTURES[architecture].layers
    for layer in range(LAYERS):
        total = sum(
            float((value.detach() * value.grad).abs().sum())
            for name, value in exact.named_parameters()
            if name.startswith(f"{prefix}.{layer}.") and name.rpartition(".")[2] != "bias"
        )
        assert got[layer] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each in FAST else pytest.mark.slow) for each in sorted(ARCHITECTURES)],
)
def test_taylor_importance_on_disk_is_the_same_to_the_bit(architecture: str, tmp_path: Path) -> None:
    source = ModelSource(str(make(tmp_path / "in", architecture, torch.bfloat16, num_hidden_layers=LAYERS)))
    text = Windows(token_ids(6, 12), "random")  # two batches
    models = (load_stock(source, torch.float32), load_on_disk(source, tmp_path))
    whole, on_disk = (taylor_importance(model, text) for model in models)
    assert whole == on_disk
    assert all(parameter.is_meta for parameter in models[1].parameters())


def test_shortened_taylor_takes_the_lowest_that_are_not_protected() -> None:
    model = tiny_model(num_hidden_layers=9)
    importance = taylor_importance(model, Windows(IDS, "random"))
    recipe = make_recipe({"method": "shortened-taylor", "remove": 2})
    scores = Scores(tuple((0.5,) * 10 for _ in range(10)))
    removed = METHODS["shortened-taylor"].plan(recipe, MethodInputs(model, Windows(IDS, "random"), scores)).removed
    assert removed == tuple(sorted(sorted(range(4, 7), key=lambda layer: importance[layer])[:2]))
    everywhere = planned(tiny_model(), "shortened-taylor", remove=2, protect="0,0").removed
    ours = taylor_importance(tiny_model(), Windows(IDS, "random"))
    assert everywhere == tuple(sorted(sorted(range(LAYERS), key=lambda layer: ours[layer])[:2]))


def test_a_gradient_that_is_not_a_number_is_never_ranked() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    recipe = make_recipe({"method": "shortened-taylor", "remove": 1, "protect": "0,0"})
    with pytest.raises(StreamlineError, match=r"the gradient of layer \d is not finite on the calibration text"):
        METHODS["shortened-taylor"].plan(recipe, MethodInputs(model, Windows(IDS, "random"), FLAT))
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def test_a_frozen_weight_stays_frozen() -> None:
    model = tiny_model()
    model.lm_head.requires_grad_(False)
    taylor_importance(model, Windows(IDS, "random"))
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["lm_head.weight"]


def brute_blocks(model: PreTrainedModel, count: int) -> tuple[set[int], set[tuple[int, str]]]:
    row = ARCHITECTURES[model.config.model_type]
    size = {}
    for index, layer in enumerate(decoder_layers(model, row)):
        for name, value in layer.named_parameters():
            module = name.partition(".")[0]
            sublayer = "attention" if module == row.attention else "mlp" if module in row.mlp else "neither"
            size[index, sublayer] = size.get((index, sublayer), 0) + value.numel()
    size = {part: value for part, value in size.items() if part[1] != "neither"}
    out: set[tuple[int, str]] = set()

    def split(parts: set[tuple[int, str]]) -> tuple[set[int], set[tuple[int, str]]]:
        removed = {layer for layer, _ in parts if {(layer, "attention"), (layer, "mlp")} <= parts}
        return removed, {part for part in parts if part[0] not in removed}

    while sum(size[part] for part in out) < count * sum(size.values()) / LAYERS:
        live = [layer for layer in range(LAYERS) if (layer, "attention") not in out]
        left = [part for part in sorted(size) if part not in out and part != (live[-1], "attention" * (len(live) == 1))]
        out.add(min(left, key=lambda part: loss_after(model, *split({*out, part}))))
    return split(out)


@pytest.mark.parametrize(("architecture", "count"), [*((name, 1) for name in SOME), ("qwen3", 3), ("gpt2", 3)])
def test_blockpruner_takes_at_each_step_what_is_missed_least(architecture: str, count: int) -> None:
    model = tiny_model(architecture)
    removed, skipped = brute_blocks(model, count)
    assert planned(model, "blockpruner", remove=count, packed=False) == Plan(
        LAYERS, tuple(sorted(removed)), skipped=tuple(sorted(skipped))
    )


def test_blockpruner_stops_at_the_weight_of_so_many_layers() -> None:
    model = tiny_model("qwen3_moe")  # its layer 3 has a dense MLP, smaller than the experts of the others
    sizes, skipped = sublayer_sizes(model)
    assert not skipped
    assert sizes[3, "mlp"] != sizes[2, "mlp"]
    plan = planned(model, "blockpruner", remove=2, packed=False)
    taken = [sizes[part] for part in plan.skipped]
    taken += [sizes[layer, "attention"] + sizes[layer, "mlp"] for layer in plan.removed]
    assert sum(taken) >= 2 * sum(sizes.values()) / LAYERS
    assert sum(taken) - max(sizes.values()) < 2 * sum(sizes.values()) / LAYERS


def test_blockpruner_keeps_an_attention() -> None:
    plan = planned(tiny_model("opt"), "blockpruner", remove=LAYERS - 1, packed=False)
    skipped = {layer for layer, sublayer in plan.skipped if sublayer == "attention"}
    assert len(skipped | set(plan.removed)) < LAYERS


def test_blockpruner_goes_on_where_an_earlier_run_stopped() -> None:
    model = tiny_model()
    apply_plan(model, Plan(LAYERS, (), skipped=((1, "attention"), (2, "mlp"))), None)
    sizes, skipped = sublayer_sizes(model)
    assert skipped == {(1, "attention"), (2, "mlp")}
    assert sizes[1, "attention"] == sizes[2, "mlp"] == 0
    plan = planned(model, "blockpruner", remove=3, packed=False)
    assert not skipped & set(plan.skipped)
    change = apply_plan(model, plan, None)
    kept = [layer for layer in range(LAYERS) if layer not in plan.removed]
    expected = {
        index: sorted(sublayer for at, sublayer in {*plan.skipped, *skipped} if at == layer)
        for index, layer in enumerate(kept)
    }
    assert change.skipped == {index: skip for index, skip in expected.items() if skip}


def loss_packed(
    model: PreTrainedModel, removed: set[tuple[int, str]], earlier: tuple[tuple[int, str], ...] = ()
) -> float:
    edited, layers = copy.deepcopy(model), sorted({layer for layer, _ in removed})
    packs = model.config.model_type != "gpt_neox"  # there, only whole layers are removed
    apply_plan(edited, packed_plan(LAYERS, removed, earlier) if packs else Plan(LAYERS, tuple(layers)), None)
    with torch.no_grad():
        logits = edited(IDS).logits.double()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))


def rows_of(model: PreTrainedModel, removed: set[tuple[int, str]]) -> list[tuple[int, str]]:
    return [(layer, kind) for layer in range(LAYERS) for kind in ("attention", "mlp") if (layer, kind) not in removed]


@pytest.mark.parametrize("architecture", [*SOME, "gpt_neox"])
def test_shifted_takes_at_each_step_the_pair_that_is_missed_least(architecture: str) -> None:
    model = tiny_model(architecture)
    removed: set[tuple[int, str]] = set()
    for _ in range(2):
        row = rows_of(model, removed)
        # All pairs without which attentions and MLPs still take turns. Parallel ones have no order: whole layers.
        pairs = [
            {one, other}
            for one, other in itertools.combinations(row, 2)
            if takes_turns([each for each in row if each not in (one, other)])
            and (architecture != "gpt_neox" or one[0] == other[0])
        ]
        assert len(pairs) >= len(row) - 1 or architecture == "gpt_neox"
        removed |= min(pairs, key=lambda pair: loss_packed(model, removed | pair))
    plan = planned(model, "shifted", remove=2)
    if architecture == "gpt_neox":
        assert plan == Plan(LAYERS, tuple(sorted({layer for layer, _ in removed})))
    else:
        assert plan == packed_plan(LAYERS, removed)
    assert len(plan.new_layers) == LAYERS - 2


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_with_linear_maps_shifted_keeps_layer_0_and_asks_for_maps(architecture: str) -> None:
    model = tiny_model(architecture)
    free = planned(model, "shifted", remove=LAYERS - 2)
    plan = planned(model, "shifted", remove=LAYERS - 2, replacement="linear")
    assert (free.replacement, plan.replacement, plan.packs) == ("none", "linear", architecture == "llama")
    assert {(0, "attention"), (0, "mlp")} <= {*plan.sublayers_left}
    assert len(plan.new_layers) == 2


def takes_turns(row: list[tuple[int, str]]) -> bool:
    return [kind for _, kind in row] == ["attention", "mlp"] * (len(row) // 2)


def test_shifted_finds_what_whole_layers_do_not() -> None:
    # On some of a few models a pair of two layers is missed less than every whole layer, and never more than the best.
    shifted = 0
    for seed in range(6):
        model = tiny_model("llama", seed)
        ours = planned(model, "shifted", remove=1)
        sleb = planned(model, "sleb", remove=1, protect="0,0")
        removed = {part for part in all_parts() if part not in ours.sublayers_left}
        whole = {part for part in all_parts() if part not in sleb.sublayers_left}
        assert loss_packed(model, removed) <= loss_packed(model, whole) + 1e-6
        shifted += ours.removed != sleb.removed
    assert shifted > 0


def all_parts() -> list[tuple[int, str]]:
    return [(layer, kind) for layer in range(LAYERS) for kind in ("attention", "mlp")]


@pytest.mark.parametrize(("replacement", "seeds"), [("none", (4, 6, 12)), ("corrected", (8, 20))])
def test_a_swap_lowers_both_losses(replacement: str, seeds: tuple[int, ...]) -> None:
    swapped, fields = 0, {"method": "shifted", "remove": 3, "replacement": replacement}
    for seed in seeds:
        model, recipe = tiny_model("llama", seed), make_recipe(fields)
        judged_on = Windows(token_ids(5, 12, seed=2), "other random")
        method, calibration = METHODS["shifted"], Windows(IDS, "random")
        greedy = method.plan(recipe, MethodInputs(model, calibration, FLAT))
        plan = method.plan(recipe, MethodInputs(model, calibration, FLAT, judged_on))
        assert len(plan.new_layers) == LAYERS - 3
        if plan != greedy:
            swapped += 1
            parts = [[part for part in all_parts() if part not in each.sublayers_left] for each in (greedy, plan)]
            removals = [frozenset(each) for each in parts]
            if replacement == "corrected":
                losses = (
                    cross_fitted_losses(model, calibration, removals),
                    corrected_losses(model, judged_on, removals, calibration),
                )
            else:
                losses = (removal_losses(model, windows, removals) for windows in (calibration, judged_on))
            assert all(after < before for before, after in losses)
    assert swapped > 0


def test_what_is_alone_in_its_layer_goes_alone() -> None:
    model = tiny_model()
    skipped = ((1, "mlp"), (3, "attention"))
    apply_plan(model, Plan(LAYERS, (), skipped=skipped), None)
    plan = planned(model, "shifted", remove=2)
    assert len(plan.new_layers) == len(packed_plan(LAYERS, skipped).new_layers) - 2 == LAYERS - 2
    best: set[tuple[int, str]] = set(skipped)
    for _ in range(2):
        row = rows_of(model, best)
        layers = len(packed_plan(LAYERS, best).new_layers)
        fitting = [
            set(some)
            for count in (1, 2)
            for some in itertools.combinations(row, count)
            if len(packed_plan(LAYERS, best | set(some)).new_layers) == layers - 1
            and (count == 1 or all(len(packed_plan(LAYERS, best | {one}).new_layers) >= layers for one in some))
        ]
        best |= min(fitting, key=lambda some: loss_packed(model, best | some, skipped))
    removed = {part for part in all_parts() if part not in plan.sublayers_left}
    assert loss_packed(model, removed, skipped) == pytest.approx(loss_packed(model, best, skipped), rel=1e-6)


def alone(row: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The sublayers that no ordinary layer can hold with another."""
    found = []
    for at, (layer, kind) in enumerate(row):
        partner = row[at + 1 : at + 2] if kind == "attention" else row[max(at - 1, 0) : at]
        if not partner or partner[0][1] == kind:
            found.append((layer, kind))
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_packed_blockpruner_takes_what_can_still_leave_whole_layers(architecture: str, count: int) -> None:
    model = tiny_model(architecture)
    removed: set[tuple[int, str]] = set()
    for left in reversed(range(2 * count)):  # sublayers that go after this one
        fitting = [
            part
            for part in rows_of(model, removed)
            if len(alone(rows_of(model, removed | {part}))) <= MAX_UNPAIRED
            and any(
                takes_turns([each for each in rows_of(model, removed | {part}) if each not in later])
                for later in itertools.combinations(rows_of(model, removed | {part}), left)
            )
        ]
        removed.add(min(fitting, key=lambda part: loss_packed(model, removed | {part})))
    plan = planned(model, "blockpruner", remove=count)
    assert plan == packed_plan(LAYERS, removed)
    assert [layer.kind in ("kept", "packed") for layer in plan.new_layers] == [True] * (LAYERS - count)


@pytest.mark.parametrize("method", ["blockpruner", "shifted"])
@pytest.mark.parametrize("zeros", [((1, "mlp"),), ((1, "mlp"), (3, "attention")), ((1, "mlp"), (2, "attention"))])
def test_no_zeros_are_added_to_a_model_with_zeros(method: str, zeros: tuple[tuple[int, str], ...]) -> None:
    for seed in range(4):
        model = tiny_model("llama", seed)
        apply_plan(model, Plan(LAYERS, (), skipped=zeros), None)
        plan = planned(model, method, remove=2)
        before = {name: bool(value.any()) for name, value in model.named_parameters()}
        apply_plan(model, plan, None)
        assert model.config.num_hidden_layers == len(plan.new_layers) == LAYERS - 2
        after = [name for name, value in model.named_parameters() if not value.any() and "proj" in name]
        assert len(after) <= sum(not live and "proj" in name for name, live in before.items())
        assert {
            (planned.originals[0], kind) for planned in plan.new_layers for kind in kinds_lacking(plan, planned)
        } <= {*zeros}


def kinds_lacking(plan: Plan, planned_layer: PlannedLayer) -> list[str]:
    layer = planned_layer.originals[0]
    lacking = [kind for kind in ("attention", "mlp") if (layer, kind) not in plan.sublayers_left]
    return lacking if planned_layer.kind == "thinned" else []


def test_packing_alone_is_enough_where_zeros_fill_layers() -> None:
    model = tiny_model()
    apply_plan(model, Plan(LAYERS, (), skipped=((1, "mlp"), (2, "attention"))), None)
    for method in ("blockpruner", "shifted"):
        plan = planned(model, method, remove=1)
        assert plan == packed_plan(LAYERS, (), ((1, "mlp"), (2, "attention")))


def test_half_a_layer_of_a_parallel_model_is_a_layer() -> None:
    model = tiny_model("gpt_neox")
    apply_plan(model, Plan(LAYERS, (), skipped=((1, "mlp"), (3, "attention"))), None)
    losses = {layer: loss_after(model, {layer}) for layer in range(LAYERS)}
    assert planned(model, "shifted", remove=1) == Plan(LAYERS, (min(losses, key=lambda layer: losses[layer]),))
    assert len(planned(model, "shifted", remove=LAYERS - 1).removed) == LAYERS - 1


def test_what_must_stay_is_said() -> None:
    model = tiny_model()  # its only attention is in the last layer
    apply_plan(model, Plan(LAYERS, (), skipped=tuple((layer, "attention") for layer in range(LAYERS - 1))), None)
    assert len(planned(model, "shifted", remove=4).new_layers) == 1
    with pytest.raises(
        StreamlineError, match=r"remove 1: at most 0 of 5 layers can go, because one attention and what"
    ):
        planned(model, "shifted", remove=1, protect="4,0")


@pytest.mark.parametrize(("architecture", "fields"), [("gpt_neox", {}), ("opt", {"do_layer_norm_before": False})])
def test_zeros_are_not_left_in_what_cannot_be_packed_unless_they_are_asked_for(
    architecture: str, fields: dict[str, object]
) -> None:
    model = tiny_model(architecture, **fields)
    fault = f"method 'blockpruner': an attention and an MLP of two layers of {architecture} make no layer, so it would"
    instead = r"give packed false \(--no-packed\) to have them, or use shifted or sleb, which remove whole layers"
    with pytest.raises(StreamlineError, match=f"^{fault} leave zeroed sublayers; {instead}$"):
        planned(model, "blockpruner", remove=2)
    assert not planned(model, "blockpruner", remove=2, packed=False).packs
    packed = make_recipe({"method": "blockpruner", "remove": 2})  # no other refusal may advise it for this model
    assert METHODS["blockpruner"].quantized_refusal(packed, model.config)


@pytest.mark.parametrize("method", ["sleb", "shortened-ppl", "shortened-taylor"])
def test_a_linear_map_needs_layer_0(method: str) -> None:
    plan = planned(tiny_model("gpt2"), method, remove=4, protect="0,0", replacement="linear")
    assert plan.removed == (1, 2, 3, 4)
    assert plan.replacement == "linear"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "sleb", "remove": 4}, r"protect '1,1': leaves 3 of 5 layers to choose from, but 4 must go; "),
        ({"method": "shortened-taylor", "remove": 1}, r"protect '4,2': leaves 0 of 5 layers"),
        ({"method": "shortened-ppl", "remove": 3, "protect": "9,0"}, r"protect '9,0': leaves 0 of 5 layers"),
        ({"method": "sleb", "remove": 5, "protect": "0,0"}, r"remove 5: that is 5 of 5 layers"),
        (
            {"method": "sleb", "remove": 1, "replacement": "layer"},
            r"replacement 'layer': method sleb supports none or ",
        ),
        (
            {"method": "blockpruner", "remove": 1, "replacement": "linear"},
            r"supports none or corrected; linear needs another method, such as shortgpt",
        ),
        ({"method": "blockpruner", "remove": 1, "protect": "1,1"}, r"protect '1,1': method blockpruner does not have"),
        ({"method": "blockpruner", "layers": "1"}, r"layers '1': method blockpruner chooses the layers itself"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(fields: dict[str, object], said: str) -> None:
    with pytest.raises(StreamlineError, match=said) as refusal:
        method_of(make_recipe(fields), tiny_model().config)
    assert "\n" not in str(refusal.value)
