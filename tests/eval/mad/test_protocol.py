"""The models of MAD, and the protocol by which a run is trained and scored."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from errors import UserError
from eval.mad import train as training
from eval.mad.accuracy import macro_accuracy
from eval.mad.examples import Examples, draw_sets
from eval.mad.model import AutoEncoder, LanguageModel, attention_kinds, build_model, sinusoids
from eval.mad.optimizers import MemberOptimizers
from eval.mad.runs import RATES, Outcome, Recipe, Run, grid
from eval.mad.settings import TASKS, Setting, settings
from eval.mad.stack import stack_modules
from eval.mad.train import DataSets, Stack, train
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
    targets = torch.tensor([[0, 0, 0, 0, 1, IGNORE_INDEX]])
    predictions = torch.tensor([[0, 0, 0, 2, 0, 3]])
    assert macro_accuracy(predictions, targets, 5).item() == pytest.approx(0.75 / 3)


def test_accuracy_on_random_batches_is_the_literal_rule() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(-3, 6, (3, 35), generator=generator)
        targets[targets < 0] = IGNORE_INDEX
        predictions = torch.randint(6, (3, 35), generator=generator)
        wanted = []
        for row in zip(predictions.tolist(), targets.tolist(), strict=True):
            pairs = [(p, t) for p, t in zip(*row, strict=True) if t >= 0]
            shares = []
            for label in {each for pair in pairs for each in pair}:
                own = [p == t for p, t in pairs if t == label]
                shares.append(sum(own) / len(own) if own else 0.0)
            wanted.append(sum(shares) / len(shares))
        assert macro_accuracy(predictions, targets, 8).tolist() == pytest.approx(wanted)


def test_the_score_is_the_mean_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.zeros_like(tokens), 4).float()

    monkeypatch.setattr(training, "BATCH", 2)
    runs = [_run(), _run(weight_decay=0.1)]
    data = DataSets(runs, CPU)
    stack = Stack(runs, data)
    stack.model = Constant()
    # batches of two rows: all of class 0, then class 0 in full and class 1 not at all; then a row of class 0
    targets = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 1], [0, 0]])
    data.test = Examples(targets[None], targets[None])
    assert stack.test().tolist() == pytest.approx([(1.0 + 0.5 + 1.0) / 3] * 2)


def _train(run: Run) -> Outcome:
    outcomes: list[Outcome] = []
    train([run], CPU, lambda _, outcome: outcomes.append(outcome))
    (outcome,) = outcomes
    return outcome


def test_a_run_ends_when_it_is_solved() -> None:
    outcome = _train(_run(max_epochs=60))
    assert outcome.accuracy >= 0.999
    assert outcome.num_epochs < 60
    again = _train(_run(max_epochs=60))
    assert replace(again, seconds=0.0) == replace(outcome, seconds=0.0)


def test_muon_solves_it_too() -> None:
    outcome = _train(_run(optimizer="muon", lr=1e-2, schedule="cosine", max_epochs=60))
    assert outcome.accuracy >= 0.999


def test_the_grid_is_three_rates_by_two_weight_decays() -> None:
    runs = grid(Recipe(attention="softmax"), SMALL)
    assert len(set(runs)) == 6
    assert {run.lr for run in runs} == {1e-4, 5e-4, 1e-3}
    assert {run.weight_decay for run in runs} == {0.0, 0.1}


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("kind", attention_kinds())
def test_every_parameter_has_the_rate_and_the_weight_decay_of_its_run(kind: str, optimizer: Any) -> None:
    setting = settings("compression", "baseline")[0]
    runs = [each for each in grid(Recipe(attention=kind, optimizer=optimizer), setting) if each.lr < 1e-2]
    stack = stack_modules([build_model(kind, setting, 0) for _ in runs])
    optimizers = MemberOptimizers(stack, runs)
    optimizers.set_rates(0, [True] * len(runs))
    hidden = [] if optimizers.muon is None else optimizers.muon.parameters
    own = {id(p) for p in stack.parameters()} - {id(p) for p in hidden}
    for run, adamw in zip(runs, optimizers.adamw, strict=True):
        for group in adamw.param_groups:
            assert len(group["params"]) == len(own)
            assert group["weight_decay"] == run.weight_decay
            assert float(group["lr"]) == pytest.approx(run.lr if optimizer == "adamw" else 1e-3)
    if optimizers.muon is not None:
        assert all(p.ndim == 3 for p in hidden)
        assert len(hidden) >= 2 * (3 + 2)
        assert optimizers.muon.lr_N11.flatten().tolist() == pytest.approx([run.lr for run in runs])
        assert optimizers.muon.weight_decay_N11.flatten().tolist() == pytest.approx(
            [run.weight_decay for run in runs]
        )


def test_schedules() -> None:
    for schedule in ("constant", "cosine"):
        recipe = Recipe(attention="softmax", schedule=schedule, max_epochs=200)
        reference = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=200, eta_min=1e-6)
        for epoch in range(200):
            wanted = cosine.get_last_lr()[0] if schedule == "cosine" else 1e-3
            assert recipe.epoch_rate(1e-3, epoch) == pytest.approx(wanted, rel=1e-6)
            reference.step()
            cosine.step()


def test_rows_have_the_tokens_that_a_setting_says() -> None:
    for task in TASKS:
        setting = replace(settings(task, "baseline")[0], num_train_rows=2)
        train_set, test_set = draw_sets(setting, 0)
        assert train_set.inputs_NT.shape[1] == test_set.inputs_NT.shape[1] == setting.num_tokens


def test_every_task_has_a_model() -> None:
    for task in TASKS:
        model = build_model("softmax", settings(task, "baseline")[0], seed=0)
        assert isinstance(model, AutoEncoder) == (task == "compression")
