"""Recipes: what is refused, in which words, and that YAML and fields are one."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.checks import check_healing
from optimum.streamline.methods.registry import method_of
from optimum.streamline.recipe.healing import CHOOSING_TEXT, REPLACED, Healing
from optimum.streamline.recipe.parsing import make_recipe, read_recipe, write_recipe
from optimum.streamline.recipe.quantities import parse_layers, parse_remove, parse_size
from optimum.streamline.recipe.recipe import JUDGING_TEXT, OPTIONS, Budget, Pruning, Recipe


@pytest.mark.parametrize(("value", "number"), [(1_000_000, 10**6), ("1.5GB", 1_500_000_000), ("2 mb", 2_000_000)])
def test_memory_is_a_number_or_a_size(value: int | str, number: int) -> None:
    recipe = make_recipe({"max_memory": value})
    assert recipe.max_memory == value
    assert parse_size(value, "max-memory") == number


@pytest.mark.parametrize("value", [-5, "5 parts", 1.5, True])
def test_what_is_no_memory_is_refused(value: object) -> None:
    with pytest.raises(StreamlineError, match="max-memory is .*: must be "):
        make_recipe({"max_memory": value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"removes": 3}, r"unknown key 'removes'; did you mean remove\?"),
        ({"heal_token": 3}, r"unknown key 'heal_token'; did you mean heal_tokens\?"),
        ({"prunning": {}}, r"unknown key 'prunning'; did you mean pruning\?"),
        ({"zzz": 3}, "unknown key 'zzz'; known are the groups pruning, healing, .*, and their options"),
        ({"heal": "hope"}, "heal is 'hope': must be none, or one or more of hidden-mse"),
        (
            {"heal": "distill+local"},
            "heal is 'distill.local': must be none, or one or more of hidden-mse or local .first.",
        ),
        (
            {"heal": "lm+hidden-mse"},
            "heal is 'lm.hidden-mse': must be none, or one or more of hidden-mse or local .first.",
        ),
        ({"protect": "1"}, "protect is '1': must be two numbers"),
        ({"heal_kl": 2}, "heal-kl is 2: .* less than or equal to 1"),
        ({"heal_minutes": math.inf}, "heal-minutes is inf: .* finite"),
        ({"heal_lr": math.inf}, "heal-lr is inf: .* finite"),
        ({"heal_hidden": math.inf}, "heal-hidden is inf: .* finite"),
        ({"pattern": "odd"}, "pattern is 'odd': Input should be 'max-gap'"),
        ({"samples": 0}, "samples is 0: .* greater than 0"),
        ({"length": "long"}, "length is 'long': .* integer"),
        ({"budget": {"max_kl": -1}}, "budget.max-kl is -1: .* greater than or equal to 0"),
        ({"budget": 3}, "budget is 3: must be a mapping of options to values; known are max_ppl_ratio, max_kl"),
        ({"healing": {"kl": 2}}, "healing.kl is 2: .* less than or equal to 1"),
        ({"healing": {"heal_kl": 1}}, "healing: unknown key 'heal_kl'; known are trainings, scope"),
        ({"healing": {"micro_bach": 1}}, r"healing: unknown key 'micro_bach'; did you mean micro_batch\?"),
        ({"calibration": {"data": 3}}, "calibration.data is 3: must be a string"),
        ({"heal_kl": 1, "healing": {"kl": 1}}, "healing.kl is 1: is given as heal-kl too; leave one out"),
        ({"healing": {"lora_rank": 8}, "lora_rank": 8}, "lora-rank is 8: is given as healing.lora-rank too"),
        ({"budget": {"max_cost": 1}}, "budget: unknown key 'max_cost'; known are max_ppl_ratio, max_kl"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"judge": "mean"}, "judge is 'mean': Input should be 'bound' or 'point'"),
        ({"remove": True}, "remove is True: must be a number of layers or a share"),
        ({"remove": 0.25}, "remove is 0.25: must be a number of layers or a share"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamlineError, match=f"^recipe: {message}") as caught:
        make_recipe(fields)
    assert "\n" not in str(caught.value)


# What an option takes beside what its type says; `calibration` is also the name of a group.
ALSO: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("layers", "quantize_exclude", "steps"), (int, list)),
    **{key: (int,) for key, option in OPTIONS.items() if float in option.types},
    "calibration": (dict,),
}
WRONG = ["16", 3, 2.0, math.nan, True, None, [], [None], [[1]], {}, {"a": 1}, b"16", date(2024, 1, 1), 10**90]


@pytest.mark.parametrize("key", OPTIONS)
def test_a_value_of_another_type_is_refused(key: str) -> None:
    option = OPTIONS[key]
    kinds = {*option.types, *ALSO.get(key, ()), *([type(None)] if option.default is None else [])}
    refused = [value for value in WRONG if type(value) not in kinds]
    assert len(refused) > 5
    for value in refused:
        for name, fields in (
            (key, {key: value}),
            (f"{option.group}.{option.name}".strip("."), {option.group: {option.name: value}}),
        ):
            if "" not in fields:
                said = f"^recipe: {name.replace('_', '-')} is "
                with pytest.raises(StreamlineError, match=said) as caught:
                    make_recipe(fields)
                assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": "shortgtp", "remove": 1},
            "method 'shortgtp': unknown; known are .*shortgpt",
        ),
        ({}, "remove is missing"),
        ({"remove": 0}, "remove 0: that is 0 of 8 layers"),
        ({"remove": "100%"}, "remove '100%': that is 8 of 8 layers"),
        ({"remove": "some"}, "remove 'some': must be a number of layers or a share"),
        ({"layers": "99"}, "layers '99': there is no layer 99; the model has layers 0 to 7"),
        ({"layers": "0-7"}, "these are all 8 layers"),
        ({"layers": "1", "remove": 1}, "give remove or layers, not both"),
        ({"layers": "1,2", "method": "shortgpt"}, "method shortgpt chooses the layers itself; use method explicit"),
        ({"method": "explicit"}, "layers is missing"),
        ({"layers": "1,3", "replacement": "mlp"}, "a replacement needs one block of at least 2 layers"),
        (
            {"method": "shortgpt", "remove": 1, "replacement": "layer"},
            "replacement 'layer': method shortgpt supports none or linear or corrected",
        ),
        (
            {"remove": 1, "method": "llm-streamline", "iterative": True},
            "iterative True: method llm-streamline does not have",
        ),
    ],
)
def test_a_method_refuses_what_it_cannot_follow(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        method_of(make_recipe(fields), LlamaConfig(num_hidden_layers=8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"heal": "hidden-mse"},
            "heal 'hidden-mse': hidden-mse trains a replacement; use replacement layer, mlp, ffn, swiglu",
        ),
        (
            {"heal": "local+distill", "method": "llm-streamline", "replacement": "mlp"},
            "heal 'local.distill': local trains layers of the original, and replacement mlp is none; train it by",
        ),
        (
            {"heal": "local+distill", "method": "come-mp"},
            "heal 'local.distill': method come-mp heals after every merge, and local would undo that; use heal distill",
        ),
        ({"heal": "local", "lora": True}, "lora: has no training to use; use heal lm or distill"),
        ({"heal": "local", "heal_kl": 0.5}, "heal-kl 0.5: has no effect without heal distill"),
        (
            {"heal": "local", "heal_scope": "model"},
            "heal-scope 'model': has no effect with heal local; it needs heal dis",
        ),
        ({"heal": "distill", "heal_scope": "replacement"}, "heal-scope 'replacement': there is no trained replacement"),
        ({"lora": True}, "lora: has no training to use; use heal lm or distill"),
        (
            {"heal": "lm", "replacement": "ffn", "lora": True},
            "lora: adapters alone would leave the weights of replacement ffn random; train it first, by heal",
        ),
        (
            {"heal": "lm+distill", "replacement": "swiglu", "lora": True, "heal_scope": "model"},
            "lora: adapters alone would leave the weights of replacement swiglu random",
        ),
        ({"heal": "lm", "heal_kl": 0.5}, "heal-kl 0.5: has no effect without heal distill"),
        (
            {"heal_tokens": 9000},
            "heal-tokens 9000: has no effect with heal none; it needs heal distill or hidden-mse or lm or local",
        ),
        ({"heal_data": "a.txt"}, "heal-data 'a.txt': has no effect with heal none"),
        ({"heal_minutes": 1.0}, "heal-minutes 1.0: has no effect with heal none"),
        (
            {"heal": "lm", "heal_normalised": True},
            "heal-normalised True: has no effect with heal lm; it needs heal hidden-mse",
        ),
        (
            {"replacement": "mlp", "heal_scope": "model"},
            "heal-scope 'model': has no effect with heal hidden-mse; it needs heal distill or lm",
        ),
        ({"heal": "none", "heal_scope": "model"}, "heal-scope 'model': has no effect with heal none"),
        ({"heal": "lm", "lora_rank": 4}, "lora-rank 4: has no effect without lora; add lora"),
        ({"method": "come-mp", "heal": "lm"}, "heal 'lm': method come-mp heals by distillation; use heal dist"),
        ({"method": "come-sp", "heal": "none"}, "heal 'none': method come-sp heals by distillation"),
        (
            {"heal": "distill", "heal_kl": 0, "heal_hidden": 0},
            "heal-kl 0 and heal-hidden 0: heal distill would ignore the original",
        ),
    ],
)
def test_what_no_training_of_the_recipe_has_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamlineError, match=message) as caught:
        check_healing(make_recipe({"method": "shortgpt", "remove": 1, **fields}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"heal": "none", "heal_tokens": 9000, "heal_data": "a.txt"},
        {"method": "auto", "heal_tokens": 9000, "heal_kl": 0},
        {"method": "come-mp", "heal": "lm+distill", "lora": True, "lora_rank": 4, "heal_scope": "model"},
        {"method": "llm-streamline", "replacement": "ffn", "heal_normalised": True, "heal_minutes": 1},
        {"method": "come-sp", "heal": "local+distill", "lora": True, "heal_tokens": 9000},
        {"method": "sleb", "replacement": "linear", "heal": "local", "heal_minutes": 1},
        {"method": "llm-streamline", "replacement": "layer", "heal": "lm+lm", "lora": True},
        {"method": "llm-streamline", "replacement": "layer", "heal": "lm", "lora": True},
        {"method": "llm-streamline", "replacement": "ffn", "heal": "lm+lm", "lora": True},
        {"method": "llm-streamline", "replacement": "swiglu", "heal": "hidden-mse+distill", "lora": True},
    ],
)
def test_what_some_training_has_or_none_was_asked_for_is_not(fields: dict[str, Any]) -> None:
    check_healing(make_recipe({"remove": 1, **fields}))


def test_the_method_follows_from_the_rest() -> None:
    assert make_recipe({"remove": 1}).resolved_method == "auto"
    assert make_recipe({"remove": 1}).resolved_trainings == ("distill",)
    assert make_recipe({"remove": 1, "replacement": "mlp"}).resolved_method == "llm-streamline"
    assert make_recipe({"remove": 1, "replacement": "linear"}).resolved_method == "shortgpt"
    assert make_recipe({"remove": 1, "replacement": "corrected"}).resolved_method == "sleb"
    assert make_recipe({"remove": 1, "replacement": "none"}).resolved_method == "auto"
    assert make_recipe({"layers": "1"}).resolved_method == "explicit"
    assert make_recipe({"layers": "1", "replacement": "linear"}).resolved_method == "explicit"
    assert make_recipe({"remove": 1, "replacement": "mlp"}).resolved_trainings == ("hidden-mse",)
    assert make_recipe({"remove": 1, "replacement": "mlp", "heal": "none"}).resolved_trainings == ()
    assert make_recipe({"remove": 1, "method": "layerchop"}).resolved_trainings == ("lm",)
    assert make_recipe({"remove": 1, "replacement": "ffn", "heal": "hidden-mse+distill"}).resolved_trainings == (
        "hidden-mse",
        "distill",
    )


@pytest.mark.parametrize(
    ("value", "total", "count"), [(3, 12, 3), ("3", 12, 3), ("25%", 12, 3), ("25%", 14, 4), ("12.5%", 12, 2)]
)
def test_remove_counts_to_the_nearest_layer(value: int | str, total: int, count: int) -> None:
    assert parse_remove(value, total) == count


@pytest.mark.parametrize("value", ["9" * 5000, "9" * 400 + ".0%", 10**90, "1e3", "٣", "1\n2"])
def test_remove_of_another_form_is_refused(value: int | str) -> None:
    with pytest.raises(
        StreamlineError, match="^remove .*: must be a number of layers or a share such as 25%"
    ) as caught:
        parse_remove(value, 16)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["16", "15-16", "99"])
def test_layers_past_the_last_are_refused(text: str) -> None:
    with pytest.raises(StreamlineError, match=r"there is no layer \d+; the model has layers 0 to 15$"):
        parse_layers(text, 16)


@pytest.mark.parametrize("text", ["a", "5-3", "", "1,,2", "-1", "1.5", "9" * 5000, "0-999999999", "٣"])
def test_layers_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(StreamlineError, match="^layers "):
        parse_layers(text, 16)


def test_yaml_round_trip(tmp_path: Path) -> None:
    fields = {
        "pruning": {"remove": "25%", "replacement": "mlp"},
        "healing": {"tokens": 1000},
        "budget": {"max_ppl_ratio": 1.1},
        "seed": 3,
    }
    recipe = make_recipe(fields)
    file = tmp_path / "recipe.yaml"
    file.write_text(write_recipe(recipe))
    assert make_recipe(read_recipe(file)) == recipe
    fields["healing"]["data"] = CHOOSING_TEXT  # the text is written in any case
    assert read_recipe(file) == {
        **fields,
        "calibration": {"data": CHOOSING_TEXT},
        "evaluation": {"data": JUDGING_TEXT},
    }


def test_either_key_of_an_option_makes_the_same_recipe() -> None:
    flags = {"remove": "25%", "heal_tokens": 1000, "heal_lr": 1, "calibration": "stdlib", "max_kl": 0.5, "seed": 3}
    groups = {
        "pruning": {"remove": "25%"},
        "healing": Healing(tokens=1000, lr=1.0),
        "calibration": {"data": "stdlib"},
        "budget": Budget(max_kl=0.5),
        "seed": 3,
    }
    assert make_recipe(flags) == make_recipe(groups)
    assert make_recipe(flags).fingerprint == make_recipe(groups).fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Healing(tokens=-1), "Healing: tokens is -1: .* greater than 0"),
        (lambda: Pruning(protect="1"), "Pruning: protect is '1': must be two numbers"),
        (lambda: Recipe(length=2), "Recipe: length is 2: .* greater than 7"),
        (lambda: Recipe(healing={"tokens": 3}), "Recipe: healing is {'tokens': 3}: must be of class Healing"),
    ],
)
def test_no_group_holds_a_bad_value(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(StreamlineError, match=f"^{message}"):
        make()


def test_the_docstring_of_a_group_tells_each_option() -> None:
    told = " ".join((Healing.__doc__ or "").split())
    for option in OPTIONS.values():
        if option.group == "healing":
            assert f"{option.name}: {option.option.help}" in told


def test_the_fingerprint_is_that_of_version_0_1() -> None:
    # A run that an earlier version began goes on if it chooses the same: it is known by these numbers.
    fields = {"remove": "25%", "heal_minutes": 1, "heal_lr": 1e-3, "quantize": "int8", "max_kl": 1}
    of_then = {
        "shortgpt": "f8ece05870584e9fcdfe49fca50e411f13dbc7108428691e58882ef894a7f3fd",
        "blockpruner": "b7e2266ea1646ea73c036ba02145bc2710509aa22025756c11bc7b09ff2796d2",
        "auto": "4c1f9e0755da80900ab65c2b162c0a18802350865b8c22b48871abde7e7a2fd9",
    }
    now = {name: make_recipe({**fields, "method": name}).fingerprint for name in of_then}
    unpacked = {name: make_recipe({**fields, "method": name, "packed": False}).fingerprint for name in of_then}
    assert now["shortgpt"] == of_then["shortgpt"]
    assert unpacked["blockpruner"] == of_then["blockpruner"] != now["blockpruner"]
    assert len({now["auto"], unpacked["auto"], of_then["auto"]}) == 3  # it has more candidates now


def test_replaced_tokens_are_in_the_fingerprint_whoever_asked_for_them() -> None:
    def fingerprint(**fields: object) -> str:
        return make_recipe({"layers": "1,3", "heal": "distill", **fields}).fingerprint

    assert fingerprint() == fingerprint(heal_replace=REPLACED) == fingerprint(heal_cache="none")
    assert fingerprint(heal_cache="full") == fingerprint(heal_replace=0.0) != fingerprint()
    assert fingerprint(heal_cache="full", heal_replace=REPLACED) == fingerprint()
    assert fingerprint(heal_epochs=1) == fingerprint(heal_epochs=1, heal_replace=0.0)
    assert len({fingerprint(heal_replace=share) for share in (0.0, 0.1, 0.3)}) == 3


def test_small_updates_are_the_default_of_distillation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    both = make_recipe({"method": "llm-streamline", "remove": 1, "heal": "hidden-mse+distill"})
    assert [both.heal_batch(training) for training in both.resolved_trainings] == [4, 2]
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert [both.heal_batch(training) for training in both.resolved_trainings] == [6, 3]
    given = make_recipe({"method": "come-sp", "remove": 1, "heal_batch": 8})
    assert given.heal_batch("distill") == 8
    # A run that an earlier version began goes on with the batch of then only if that is given.
    assert given.fingerprint != make_recipe({"method": "come-sp", "remove": 1}).fingerprint
    trained = {"method": "shortgpt", "remove": 1, "heal": "lm"}
    assert make_recipe(trained).fingerprint == make_recipe({**trained, "heal_batch": 4}).fingerprint


def test_an_option_that_another_package_reads_is_in_the_fingerprint() -> None:
    one, other = (make_recipe({"method": "theirs", "remove": 4, "packed": packed}) for packed in (True, False))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("text", "message"), [("- 1", "must be keys with values"), ("a: [", "not YAML"), ("x: 1", "unknown key 'x'")]
)
def test_a_bad_recipe_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(StreamlineError, match=message) as caught:
        make_recipe(read_recipe(file), f"recipe {file}")
    assert "\n" not in str(caught.value)


def test_the_judgement_does_not_change_what_is_made() -> None:
    one = make_recipe({"remove": 1})
    judged = {"budget": {"max_kl": 1}, "judge": "point", "format": "onnx"}
    assert one.fingerprint == make_recipe({"remove": 1, **judged}).fingerprint
    assert one.fingerprint != make_recipe({"remove": 2}).fingerprint
    assert one.fingerprint != make_recipe({"remove": 1, "seed": 1}).fingerprint


def test_what_is_spelled_out_and_what_follows_are_one_recipe() -> None:
    one = make_recipe({"remove": 1, "replacement": "mlp"})
    spelled_out = {"remove": "1", "method": "llm-streamline", "replacement": "mlp", "heal": "hidden-mse"}
    assert one.fingerprint == make_recipe(spelled_out).fingerprint


def test_llm_streamline_is_its_papers_unless_told() -> None:
    plain = make_recipe({"method": "llm-streamline", "remove": 1})
    assert (plain.resolved_replacement, plain.resolved_trainings) == ("layer", ("hidden-mse",))
    bare = make_recipe({"method": "llm-streamline", "remove": 1, "replacement": "none"})
    assert (bare.resolved_replacement, bare.resolved_trainings) == ("none", ())
    for recipe in (plain, bare):
        assert make_recipe(recipe.to_dict()) == recipe
    assert plain.fingerprint != bare.fingerprint
    assert plain.fingerprint == make_recipe({"remove": 1, "replacement": "layer"}).fingerprint
