import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from errors import UserError
from optimizers.config import AdamWGroup, MuonGroup, OptimizerConfig, ParameterGroup, ScheduleConfig
from optimizers.param_groups import assign_parameters, unwrapped_named_parameters

HIDDEN = MuonGroup(parameters=[r"layers\.\d+\.(wq|wo)\.weight"], lr=0.01)
REST = AdamWGroup(parameters=[r"tok_embeddings\.weight", r"(layers\.\d+\.)?norm\.weight"], lr=0.003)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.wq = nn.Linear(4, 6, bias=False)
        self.wo = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.wo(self.wq(self.norm(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.RMSNorm(4)
        self.output = nn.Linear(4, 5, bias=False)
        self.output.weight = self.tok_embeddings.weight


def names(root: nn.Module, groups: dict[str, ParameterGroup]) -> dict[str, list[str]]:
    named = unwrapped_named_parameters(root)
    by_id = {id(p): name for name, p in named}
    assigned = assign_parameters(named, groups)
    return {group: [by_id[id(p)] for p in members] for group, members in assigned.items()}


def test_each_parameter_is_in_its_group_and_a_tied_one_once() -> None:
    assert names(Model(), {"hidden": HIDDEN, "rest": REST}) == {
        "hidden": [f"layers.{i}.{w}.weight" for i in (0, 1) for w in ("wq", "wo")],
        "rest": ["tok_embeddings.weight", "layers.0.norm.weight", "layers.1.norm.weight", "norm.weight"],
    }


def test_names_of_compiled_and_checkpointed_layers_are_those_of_the_unwrapped_model() -> None:
    root = Model()
    unwrapped = dict(root.named_parameters())
    root.layers[0] = checkpoint_wrapper(root.layers[0])
    for layer in root.layers:
        layer.compile()
    assert "layers.0._checkpoint_wrapped_module.wq.weight" in dict(root.named_parameters())
    named = unwrapped_named_parameters(root)
    assert [name for name, _ in named] == list(unwrapped)
    assert all(parameter is unwrapped[name] for name, parameter in named)
    assert names(root, {"hidden": HIDDEN, "rest": REST})["hidden"][0] == "layers.0.wq.weight"


def test_frozen_parameters_need_no_group() -> None:
    root = Model()
    root.tok_embeddings.weight.requires_grad_(False)
    rest = dataclasses.replace(REST, parameters=[r".*norm\.weight"])
    assert names(root, {"hidden": HIDDEN, "rest": rest})["rest"][0] == "layers.0.norm.weight"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"hidden": HIDDEN, "rest": AdamWGroup(parameters=["norm"], lr=1.0)},
            "no group.*tok_embeddings.weight",
        ),
        # a pattern must match the full name
        (
            {"hidden": HIDDEN, "rest": AdamWGroup(parameters=["tok", "norm"], lr=1.0)},
            "no group.*tok_embeddings",
        ),
        (
            {"hidden": HIDDEN, "rest": REST, "probe": MuonGroup(parameters=[r".*\.0\.wq\.weight"], lr=1.0)},
            r"several groups.*: layers\.0\.wq\.weight \(hidden, probe\);",
        ),
        (
            {"hidden": HIDDEN, "rest": REST, "probe": MuonGroup(parameters=["wr"], lr=1.0)},
            "no trainable.*: probe;",
        ),
        (
            {"all": MuonGroup(parameters=[".*"], lr=1.0)},
            r"not matrices: layers\.0\.norm\.weight \[4\] \(all\)",
        ),
    ],
    ids=["unmatched", "partial match", "ambiguous", "empty", "vector in Muon group"],
)
def test_errors_name_wrong_groups(groups: dict[str, ParameterGroup], message: str) -> None:
    with pytest.raises(UserError, match=message):
        names(Model(), groups)


def test_long_lists_of_names_are_truncated() -> None:
    many = [(f"p{i}", nn.Parameter(torch.zeros(1))) for i in range(30)]
    with pytest.raises(UserError, match=r"p7 and 22 more;"):
        assign_parameters(many, {"one": AdamWGroup(parameters=["q"], lr=1.0)})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (MuonGroup, {"lr": -0.1}, "lr must be at least 0.0 .* got -0.1"),
        (MuonGroup, {"lr": float("nan")}, "lr must be at least 0.0 .* got nan"),
        (MuonGroup, {"momentum": 1.0}, r"momentum \(1.0\)"),
        (MuonGroup, {"num_iterations": 0}, "num_iterations must be at least 1 .* got 0"),
        (MuonGroup, {"parameters": []}, "parameters is empty"),
        (AdamWGroup, {"parameters": ["a("]}, re.escape("parameters: 'a(' is not a regular expression")),
        (AdamWGroup, {"weight_decay": float("inf")}, "weight_decay must be .* got inf"),
        (AdamWGroup, {"beta1": -0.5}, r"beta1 \(-0.5\)"),
        (AdamWGroup, {"beta2": 1.0}, r"beta2 \(1.0\)"),
        (AdamWGroup, {"eps": 0.0}, "eps must be at least 1e-30 .* got 0.0"),
        (ScheduleConfig, {"warmup_steps": -1}, "warmup_steps must be at least 0 .* got -1"),
        (ScheduleConfig, {"decay_ratio": 1.5}, 'decay_ratio must be .* at most 1.0, or "none"; got 1.5'),
        (
            AdamWGroup,
            {"weight_decay_gamma": -1.0},
            'weight_decay_gamma must be at least 0.0 .*"none"; got -1.0',
        ),
        (
            AdamWGroup,
            {"weight_decay_gamma": 2.0},
            'weight_decay_gamma is 2.0, which a weight_decay of 0 does not read; set it to "none"',
        ),
        (ScheduleConfig, {"min_lr_ratio": -0.1}, "min_lr_ratio must be .* at most 1.0; got -0.1"),
        (OptimizerConfig, {"groups": {}}, "groups is empty"),
    ],
)
def test_errors_name_the_value_out_of_range(kind: type, values: dict[str, object], message: str) -> None:
    required: dict[type, dict[str, object]] = {
        MuonGroup: {"parameters": ["a"], "lr": 1.0},
        AdamWGroup: {"parameters": ["a"], "lr": 1.0},
    }
    with pytest.raises(UserError, match=message):
        kind(**{**required.get(kind, {}), **values})
