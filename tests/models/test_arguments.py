"""Arguments are declared once; the constructors, ``create_model`` and the configuration follow the declarations."""

import json
from dataclasses import fields

import pytest

from stvit_video.common.errors import UsageError
from stvit_video.config.schema import BY_NAME
from stvit_video.models import create_model
from stvit_video.models.arguments import (
    CONFIGURED,
    SemanticArguments,
    STGMArguments,
    SwinArguments,
    SwinSemanticArguments,
    ViTArguments,
    read_rules,
)
from stvit_video.models.zoo import FAMILIES, list_models

SIZES = {"num_frames": 4, "image_size": 64, "num_classes": 5}


@pytest.mark.parametrize("declared", [ViTArguments, SwinArguments, STGMArguments, SwinSemanticArguments])
def test_every_argument_is_explained_and_its_default_is_allowed(declared: type) -> None:
    rules = read_rules(declared)
    assert list(rules) == [field.name for field in fields(declared)]
    for field in fields(declared):
        assert rules[field.name].about
        if field.default is not field.default_factory:  # neither given: MISSING
            assert rules[field.name].check(field.default) == field.default


def test_constructors_refuse_what_the_declarations_do_not_allow() -> None:
    with pytest.raises(ValueError, match="stgm_depth is 5; allowed: a whole number from 2 to 4"):
        SemanticArguments(stgm_depth=5)
    with pytest.raises(ValueError, match="pooling 'median' is unknown; choose one of mask, max, mean"):
        STGMArguments(pooling="median")  # type: ignore[arg-type]


def test_configuration_keys_are_the_declarations() -> None:
    for name, rule in CONFIGURED.items():
        key = BY_NAME[f"MODEL.{name.upper()}"]
        assert (key.about, key.choices, key.low, key.high) == (rule.about, rule.choices, rule.low, rule.high)
        assert key.default == (rule.default if rule.key == "default" else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_arguments_rebuild_the_model(family: str) -> None:
    """As the metadata of a checkpoint keeps them: flat and in JSON."""
    name = min(list_models(f"{family}_*hard*") or list_models(f"{family}_*"), key=len)
    settings = {"dim": 16, "depth": 6, "num_heads": 2}
    if "swin" in family:
        settings = {"dim": 16, "depths": (1, 1, 6, 1), "num_heads": (1, 1, 2, 2), "window": (2, 4, 4)}
    settings |= {"units": 1} if "_r_" in family else {}
    model = create_model(name, **SIZES, **settings, drop_path=0.1)
    recorded = json.loads(json.dumps(model.arguments))
    assert set(recorded) == {*SIZES, *settings, "drop_path"}  # nothing that was not given
    again = create_model(name, **recorded)
    assert json.dumps(again.arguments) == json.dumps(model.arguments)
    again.load_state_dict(model.state_dict())


def test_an_override_goes_before_the_preset() -> None:
    model = create_model("stvit_vit_tiny_patch16", **SIZES, preset="fast", base_depth=5, dim=24)
    assert model.base_depth == 5
    assert create_model("stvit_vit_tiny_patch16", **SIZES, preset="fast", dim=24).base_depth == 2
    with pytest.raises(UsageError, match="preset 'balanced' is unknown; choose one of paper, fast"):
        create_model("stvit_r_swin_small", **SIZES, preset="balanced")
