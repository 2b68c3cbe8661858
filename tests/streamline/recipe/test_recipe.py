"""Recipes: what is refused, in which words, and that YAML and fields are one."""

from __future__ import annotations

import dataclasses
import math
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from transformers import LlamaConfig

from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.checks import check_healing
from optimum.streamline.methods.registry import method_of
from optimum.streamline.recipe.layer_counts import parse_layers, parse_remove
from optimum.streamline.recipe.parsing import make_recipe, read_recipe, write_recipe
from optimum.streamline.recipe.recipe import CHOOSING_TEXT, JUDGING_TEXT, Budget, Recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"removes": 3}, "unknown key 'removes'; known are method, remove, layers"),
        ({"heal": "hope"}, "heal is 'hope': must be none, or one or more of hidden-mse"),
        ({"heal": "lm+hidden-mse"}, "heal is 'lm.hidden-mse': must be none, or one or more of hidden-mse .first."),
        ({"protect": "1"}, "protect is '1': must be two numbers"),
        ({"heal_kl": 2}, "heal-kl is 2: .* less than or equal to 1"),
        ({"heal_minutes": math.inf}, "heal-minutes is inf: .* finite"),
        ({"heal_lr": math.inf}, "heal-lr is inf: .* finite"),
        ({"heal_hidden": math.inf}, "heal-hidden is inf: .* finite"),
        ({"pattern": "odd"}, "pattern is 'odd': Input should be 'max-gap'"),
        ({"samples": 0}, "samples is 0: .* greater than 0"),
        ({"length": "long"}, "length is 'long': .* integer"),
        ({"budget": {"max_kl": -1}}, "budget.max-kl is -1: .* greater than or equal to 0"),
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


# What a field takes beside what its type says.
ALSO: dict[str, tuple[type, ...]] = dict.fromkeys(("layers", "quantize_exclude", "steps"), (int, list))
WRONG = ["16", 3, 2.0, math.nan, True, None, [], [None], [[1]], {}, {"a": 1}, b"16", date(2024, 1, 1), 10**90]


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda field: field.name)
def test_a_value_of_another_type_is_refused(field: dataclasses.Field[Any]) -> None:
    of = get_type_hints(Recipe)[field.name]
    kinds = set(get_args(of) or [of])
    if float in kinds:
        kinds.add(int)
    if Budget in kinds:
        kinds.add(dict)
    refused = [value for value in WRONG if type(value) not in {*kinds, *ALSO.get(field.name, ())}]
    assert len(refused) > 5
    for value in refused:
        with pytest.raises(StreamlineError, match=f"^recipe: {field.name.replace('_', '-')} is ") as caught:
            make_recipe({field.name: value})
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
        ({"layers": "1,2", "method": "shortgpt"}, "method shortgpt chooses its own; use method explicit"),
        ({"method": "explicit"}, "layers is missing"),
        ({"layers": "1,3", "replacement": "mlp"}, "a replacement needs one block of at least 2 layers"),
        (
            {"method": "shortgpt", "remove": 1, "replacement": "layer"},
            "replacement 'layer': method shortgpt takes none or linear",
        ),
        ({"remove": 1, "method": "llm-streamline", "iterative": True}, "iterative True: method llm-streamline has no"),
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
            "heal-tokens 9000: has no effect with heal none; it needs heal distill or hidden-mse or lm",
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
        {"method": "llm-streamline", "replacement": "layer", "heal": "lm+lm", "lora": True},
        {"method": "llm-streamline", "replacement": "layer", "heal": "lm", "lora": True},
        {"method": "llm-streamline", "replacement": "ffn", "heal": "lm+lm", "lora": True},
        {"method": "llm-streamline", "replacement": "swiglu", "heal": "hidden-mse+distill", "lora": True},
    ],
)
def test_what_some_training_has_or_none_was_asked_for_is_not(fields: dict[str, Any]) -> None:
    check_healing(make_recipe({"remove": 1, **fields}))


def test_the_method_follows_from_the_rest() -> None:
    assert make_recipe({"remove": 1}).method_name == "auto"
    assert make_recipe({"remove": 1}).healing == ("distill",)
    assert make_recipe({"remove": 1, "replacement": "mlp"}).method_name == "llm-streamline"
    assert make_recipe({"remove": 1, "replacement": "linear"}).method_name == "shortgpt"
    assert make_recipe({"remove": 1, "replacement": "none"}).method_name == "auto"
    assert make_recipe({"layers": "1"}).method_name == "explicit"
    assert make_recipe({"layers": "1", "replacement": "linear"}).method_name == "explicit"
    assert make_recipe({"remove": 1, "replacement": "mlp"}).healing == ("hidden-mse",)
    assert make_recipe({"remove": 1, "replacement": "mlp", "heal": "none"}).healing == ()
    assert make_recipe({"remove": 1, "method": "layerchop"}).healing == ("lm",)
    assert make_recipe({"remove": 1, "replacement": "ffn", "heal": "hidden-mse+distill"}).healing == (
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


@pytest.mark.parametrize("text", ["a", "5-3", "", "1,,2", "-1", "1.5", "9" * 5000, "0-999999999", "٣"])
def test_layers_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(StreamlineError, match="^layers "):
        parse_layers(text, 16)


def test_yaml_round_trip(tmp_path: Path) -> None:
    text = {"calibration": CHOOSING_TEXT, "heal_data": CHOOSING_TEXT, "eval_data": JUDGING_TEXT}
    fields = {"remove": "25%", "replacement": "mlp", "seed": 3, "budget": {"max_ppl_ratio": 1.1}}
    recipe = make_recipe(fields)
    file = tmp_path / "recipe.yaml"
    file.write_text(write_recipe(recipe))
    assert make_recipe(read_recipe(file)) == recipe
    assert read_recipe(file) == {**fields, **text}  # of which what is there by default is told too


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
    assert (plain.stand_in, plain.healing) == ("layer", ("hidden-mse",))
    bare = make_recipe({"method": "llm-streamline", "remove": 1, "replacement": "none"})
    assert (bare.stand_in, bare.healing) == ("none", ())
    for recipe in (plain, bare):
        assert make_recipe(recipe.to_dict()) == recipe
    assert plain.fingerprint != bare.fingerprint
    assert plain.fingerprint == make_recipe({"remove": 1, "replacement": "layer"}).fingerprint
