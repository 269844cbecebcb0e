"""Groups of weights: globs, the first match, freezing, and rules that decide nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hearth.config.objectives import ParameterGroupSection
from hearth.errors import ConfigError
from hearth.training.optimizers import trainable_parameters
from hearth.training.optimizers.groups import resolve_settings

Make = Callable[..., Any]


def rules(*given: dict[str, Any]) -> list[ParameterGroupSection]:
    return [ParameterGroupSection.model_validate(rule) for rule in given]


def test_matrices_decay_and_norms_and_biases_do_not(make_net: Make) -> None:
    settings = resolve_settings(make_net(), [], weight_decay=0.1)
    decays = {name: chosen.weight_decay for name, chosen in settings.items()}
    assert decays == {
        "embed.weight": 0.1,
        "hidden.weight": 0.1,
        "hidden.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "down.weight": 0.1,
        "lm_head.weight": 0.1,
    }


def test_hidden_matrices_are_neither_embedding_nor_output_nor_vector(make_net: Make) -> None:
    settings = resolve_settings(make_net(), [], weight_decay=0.1)
    assert [name for name, chosen in settings.items() if chosen.hidden] == ["hidden.weight", "down.weight"]


def test_the_first_match_counts(make_net: Make) -> None:
    given = rules(
        {"match": "hidden.bias", "weight_decay": 0.5},
        {"match": "hidden.*", "weight_decay": 0.0, "learning_rate_scale": 2.0},
    )
    settings = resolve_settings(make_net(), given, weight_decay=0.1)
    assert (settings["hidden.bias"].weight_decay, settings["hidden.bias"].rate) == (0.5, 1.0)
    assert (settings["hidden.weight"].weight_decay, settings["hidden.weight"].rate) == (0.0, 2.0)


def test_frozen_weights_do_not_train_and_stay(make_net: Make, make_optimizer: Make, train_net: Make) -> None:
    model = make_net()
    before = model.embed.weight.detach().clone()
    keys = {"parameter_groups": [{"match": "embed.*", "freeze": True}], "learning_rate": 0.1}
    optimizer = make_optimizer(model, **keys)
    train_net(model, optimizer, 2)
    assert "embed.weight" not in trainable_parameters(model)
    assert torch.equal(model.embed.weight, before)
    make_optimizer(model, **keys)  # once more on the frozen model: the rule still matches


@pytest.mark.parametrize(
    ("match", "close"),
    [("*.lm_haed.*", "lm_head.weight"), ("head", "lm_head.weight"), ("qqq", "embed.weight")],
)
def test_a_glob_that_matches_nothing_names_close_weights(make_net: Make, match: str, close: str) -> None:
    with pytest.raises(ConfigError, match="matches no weight") as caught:
        resolve_settings(make_net(), rules({"match": match}), weight_decay=0.1)
    assert match in str(caught.value)
    assert close in str(caught.value.fix)


def test_a_shadowed_glob_is_refused(make_net: Make) -> None:
    with pytest.raises(ConfigError, match=r"parameter_groups\[1\].*earlier group"):
        resolve_settings(make_net(), rules({"match": "*"}, {"match": "hidden.*"}), weight_decay=0.1)


def test_a_glob_over_weights_that_do_not_train_is_refused(make_net: Make) -> None:
    model = make_net()
    model.embed.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="do not train"):
        resolve_settings(model, rules({"match": "embed.*", "weight_decay": 0.0}), weight_decay=0.1)


def test_everything_frozen_is_refused(make_net: Make) -> None:
    with pytest.raises(ConfigError, match="no weight of the model trains"):
        resolve_settings(make_net(), rules({"match": "*", "freeze": True}), weight_decay=0.1)


def test_tied_output_is_no_hidden_matrix(tiny_model: Any) -> None:
    settings = resolve_settings(tiny_model, [], weight_decay=0.1)
    hidden = [name for name, chosen in settings.items() if chosen.hidden]
    assert hidden
    assert all(".layers." in name and name.endswith("proj.weight") for name in hidden)
