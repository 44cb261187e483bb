"""The models of MAD, and the protocol by which a run is trained and scored."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from errors import UserError
from eval.mad.accuracy import batch_accuracy, macro_accuracy
from eval.mad.examples import Examples
from eval.mad.model import AutoEncoder, LanguageModel, attention_kinds, build_model, sinusoids
from eval.mad.settings import TASKS, Setting, settings
from eval.mad.train import RATES, Recipe, Run, build_optimizers, grid, set_rates, train
from models.attention.base import Attention, HeadProjections
from tokens import IGNORE_INDEX

CPU = torch.device("cpu")
SMALL = Setting(task="memorization", vocab_size=8, seq_len=4, num_train_rows=256)


def _run(*, lr: float = 1e-3, weight_decay: float = 0.0, **fields: Any) -> Run:
    recipe = Recipe(attention="softmax", **fields)
    return Run(recipe=recipe, setting=SMALL, lr=lr, weight_decay=weight_decay)


@pytest.mark.parametrize("kind", attention_kinds())
def test_every_attention_trains(kind: str) -> None:
    for task in ("in-context-recall", "compression"):
        model = build_model(kind, settings(task, "baseline")[0], seed=0)
        tokens = torch.randint(16, (2, 12), generator=torch.Generator().manual_seed(0))
        logits = model(tokens)
        assert logits.shape == (2, 12, 16)
        for parameter in model.parameters():
            assert parameter.isfinite().all()
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", ["softmax", "parallax"])
def test_attention_has_16_heads_of_width_8_and_its_scale(kind: str) -> None:
    model = build_model(kind, settings("in-context-recall", "baseline")[0], seed=0)
    modules = [module for module in model.modules() if isinstance(module, HeadProjections)]
    assert [(m.size.num_heads, m.size.num_kv_heads, m.size.head_dim) for m in modules] == [(16, 16, 8)] * 2
    assert {m.size.mlp_width for m in modules} == {352}


@pytest.mark.parametrize("kind", ["linear", "gated-deltanet", "kda", "mesanet", "mamba2"])
def test_fixed_states_have_4096_elements(kind: str) -> None:
    model = build_model(kind, settings("in-context-recall", "baseline")[0], seed=0)
    module = next(module for module in model.modules() if isinstance(module, Attention))
    state = module.new_state(1, 8, device=CPU, dtype=torch.float32)
    assert [state[name].numel() for name in ("state", "value_state", "vk") if name in state] == [4096]


def test_softmax_of_width_8_is_torch_attention() -> None:
    model = build_model("softmax", settings("in-context-recall", "baseline")[0], seed=0)
    module = next(module for module in model.modules() if isinstance(module, HeadProjections))
    q, k, v = (torch.randn(2, 9, 16, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    got = module.attend(q, None, k, v, None, 9)  # pyrefly: ignore
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(got, wanted.transpose(1, 2))


def test_the_language_model_sees_the_past_alone() -> None:
    model = build_model("parallax", settings("in-context-recall", "baseline")[0], seed=0)
    assert isinstance(model, LanguageModel)
    tokens = torch.arange(12).unsqueeze(0)
    changed = torch.cat((tokens[:, :7], tokens[:, 7:].flip(1)), dim=1)
    assert torch.equal(model(tokens)[:, :7], model(changed)[:, :7])


def test_the_autoencoder_reads_the_last_state_alone() -> None:
    model = build_model("softmax", settings("compression", "baseline")[0], seed=0)
    assert isinstance(model, AutoEncoder)
    tokens = torch.arange(12).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 0] = 15
    assert (model(tokens) != model(changed)).any(2).all()
    vectors = sinusoids(12, CPU)
    torch.testing.assert_close(vectors[3, [0, 63]], torch.tensor([math.sin(3.0), math.sin(3e-4)]))
    torch.testing.assert_close(vectors[3, [64, 127]], torch.tensor([math.cos(3.0), math.cos(3e-4)]))


def test_weights_follow_the_seed_and_mads_init() -> None:
    setting = settings("in-context-recall", "baseline")[0]
    first, second, other = (build_model("softmax", setting, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert first["head.bias"].count_nonzero() == 0
    assert first["encoder.embedding.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    uniform = first["encoder.layers.0.mlp.gate.weight"]
    assert uniform.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.02)
    assert uniform.abs().max() <= 128**-0.5
    normal = build_model("softmax", settings("compression", "baseline")[0], seed=0)
    assert normal.state_dict()["encoder.layers.0.mlp.gate.weight"].std().item() == pytest.approx(
        0.02, rel=0.05
    )


def test_an_unknown_attention_is_named() -> None:
    with pytest.raises(UserError, match=r"'sofmax'.*softmax,parallax"):
        build_model("sofmax", SMALL, seed=0)


def test_accuracy_is_the_mean_over_classes() -> None:
    # class 0: 3 of 4, class 1: 0 of 1, class 2: predicted only, class 3: neither
    targets = torch.tensor([[0, 0, 0], [0, 1, IGNORE_INDEX]])
    predictions = torch.tensor([[0, 0, 0], [2, 0, 3]])
    assert macro_accuracy(predictions, targets, 5).item() == pytest.approx(0.75 / 3)


def test_accuracy_on_random_batches_is_the_literal_rule() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(-3, 6, (7, 5), generator=generator)
        targets[targets < 0] = IGNORE_INDEX
        predictions = torch.randint(6, (7, 5), generator=generator)
        pairs = [
            (p, t)
            for p, t in zip(predictions.flatten().tolist(), targets.flatten().tolist(), strict=True)
            if t >= 0
        ]
        shares = []
        for label in {each for pair in pairs for each in pair}:
            own = [p == t for p, t in pairs if t == label]
            shares.append(sum(own) / len(own) if own else 0.0)
        assert macro_accuracy(predictions, targets, 8).item() == pytest.approx(sum(shares) / len(shares))


def test_the_score_is_the_mean_over_batches() -> None:
    class Constant(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.zeros_like(tokens), 4).float()

    targets = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 1]])
    # batches of two rows: all of class 0, then class 0 in full and class 1 not at all
    assert batch_accuracy(Constant(), Examples(targets, targets), 2) == pytest.approx((1.0 + 0.5) / 2)


def test_a_run_ends_when_it_is_solved() -> None:
    outcome = train(_run(max_epochs=60), CPU)
    assert outcome.accuracy >= 0.999
    assert outcome.num_epochs < 60
    again = train(_run(max_epochs=60), CPU)
    assert (again.accuracy, again.loss, again.num_epochs) == (
        outcome.accuracy,
        outcome.loss,
        outcome.num_epochs,
    )


def test_muon_solves_it_too() -> None:
    outcome = train(_run(optimizer="muon", lr=1e-2, schedule="cosine", max_epochs=60), CPU)
    assert outcome.accuracy >= 0.999


def test_the_grid_is_three_rates_by_two_weight_decays() -> None:
    runs = grid(Recipe(attention="softmax"), SMALL)
    assert len(set(runs)) == 6
    assert {run.lr for run in runs} == {1e-4, 5e-4, 1e-3}
    assert {run.weight_decay for run in runs} == {0.0, 0.1}


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("kind", attention_kinds())
def test_weight_decay_holds_for_every_parameter(kind: str, optimizer: str) -> None:
    model = build_model(kind, settings("compression", "baseline")[0], seed=0)
    run = _run(optimizer=optimizer, weight_decay=0.1)
    groups = [group for each in build_optimizers(model, run) for group in each.param_groups]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert {group["weight_decay"] for group in groups} == {0.1}
    if optimizer == "muon":
        hidden = next(group["params"] for group in groups if group["name"] == "hidden")
        assert all(p.ndim == 2 for p in hidden)
        assert len(hidden) >= 2 * (3 + 2)


def test_schedules() -> None:
    model = build_model("softmax", SMALL, seed=0)
    for schedule in ("constant", "cosine"):
        run = _run(schedule=schedule, lr=1e-3, max_epochs=200)
        optimizers = build_optimizers(model, run)
        reference = torch.optim.AdamW(model.parameters(), lr=1e-3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=200, eta_min=1e-6)
        for epoch in range(200):
            set_rates(optimizers, run, epoch)
            wanted = cosine.get_last_lr()[0] if schedule == "cosine" else 1e-3
            assert optimizers[0].param_groups[0]["lr"] == pytest.approx(wanted, rel=1e-6)
            reference.step()
            cosine.step()


def test_every_task_has_a_model() -> None:
    for task in TASKS:
        model = build_model("softmax", settings(task, "baseline")[0], seed=0)
        assert isinstance(model, AutoEncoder) == (task == "compression")
