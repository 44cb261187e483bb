"""Members that are trained at once, against each trained alone."""

import math
from dataclasses import replace

import pytest
import torch

from eval.mad import examples
from eval.mad import optimizers as mad_optimizers
from eval.mad import train as training
from eval.mad.model import attention_kinds, build_model
from eval.mad.optimizers import parameter_groups
from eval.mad.packs import pack
from eval.mad.runs import BATCH, RATES, Optimizer, Outcome, Recipe, Run, grid
from eval.mad.settings import Setting, settings
from eval.mad.stack import named_stacked_parameters, split_members, stack_modules
from eval.mad.train import DataSets, Stack, train
from optimizers.config import MuonGroup, ParameterGroup
from tests.eval.mad.literal_training import train_literally

CPU = torch.device("cpu")
SMALL = Setting(task="memorization", vocab_size=8, seq_len=4, num_train_rows=128)
RECALL = Setting(task="in-context-recall", vocab_size=16, seq_len=16, num_train_rows=20)
ROWS = 4


def _in_fp32(run: Run) -> dict[str, ParameterGroup]:
    return {
        name: replace(group, dtype="float32") if isinstance(group, MuonGroup) else group
        for name, group in parameter_groups(run).items()
    }


@pytest.fixture(autouse=True)
def _small_and_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test few rows; orthogonalize in fp32, since 16-bit products are slow on a CPU and hide differences."""
    monkeypatch.setattr(examples, "NUM_TEST_ROWS", 64)
    monkeypatch.setattr(mad_optimizers, "parameter_groups", _in_fp32)


@pytest.mark.parametrize("task", ["in-context-recall", "compression"])
@pytest.mark.parametrize("kind", attention_kinds())
def test_a_stack_computes_what_its_members_do(kind: str, task: str) -> None:
    setting = settings("compression" if task == "compression" else "in-context-recall", "baseline")[0]
    models = [build_model(kind, setting, seed).double() for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    for parameter in (parameter for model in models for parameter in model.parameters()):
        parameter.data += 0.1 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
    stack = stack_modules([build_model(kind, setting, 0).double() for _ in models])
    own = [dict(model.named_parameters()) for model in models]
    for name, stacked in named_stacked_parameters(stack):
        for part, parameters in zip(split_members(stacked, 3), own, strict=True):
            part.copy_(parameters[name].detach())

    # more than a chunk of the recurrences
    tokens_NBT = torch.randint(16, (3, 2, 70), generator=generator)
    weights = torch.rand(3, 2, 70, 16, generator=generator, dtype=torch.float64)
    wanted = torch.stack([model(tokens) for model, tokens in zip(models, tokens_NBT, strict=True)])
    (wanted.log_softmax(-1) * weights).sum().backward()
    got = stack(tokens_NBT.flatten(0, 1)).unflatten(0, (3, 2))
    (got.log_softmax(-1) * weights).sum().backward()
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert {name for name, _ in named_stacked_parameters(stack)} == own[0].keys()
    for name, stacked in named_stacked_parameters(stack):
        assert stacked.grad is not None
        for part, parameters in zip(split_members(stacked.grad, 3), own, strict=True):
            gradient = parameters[name].grad
            assert gradient is not None
            # affine-mesanet and lla stop their solvers at a tolerance
            error = (part - gradient).abs().max() / gradient.abs().max()
            assert error < 1e-5, name


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("softmax", ""),
        ("parallax", ""),
        ("parallax", "head_dim=32 r_gain_init=1.0 rope=false"),
        ("parallax", "gate=head head_dim=64"),
        ("mamba2", ""),
    ],
)
def test_50_steps_are_those_of_single_runs(
    kind: str, changes: str, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "BATCH", ROWS)
    recipe = Recipe(attention=kind, changes=changes, optimizer=optimizer, schedule="cosine", max_epochs=10)
    runs = [grid(recipe, RECALL)[2], grid(replace(recipe, seed=7), RECALL)[5]]
    stack = Stack(runs, DataSets(runs, CPU))
    losses = [stack.train_epoch(epoch, [True] * len(runs)).tolist() for epoch in range(10)]
    for member, run in enumerate(runs):
        model, wanted = train_literally(run, _in_fp32(run), ROWS, 10)
        assert [each[member] for each in losses] == pytest.approx(wanted, abs=1e-5)
        parameters = dict(model.named_parameters())
        for name, stacked in named_stacked_parameters(stack.model):
            part = split_members(stacked, len(runs))[member]
            # AdamW moves by its rate even where a gradient is rounding error alone
            torch.testing.assert_close(part, parameters[name].detach(), rtol=0.0, atol=0.3 * run.lr)


def _train(runs: list[Run]) -> dict[Run, Outcome]:
    outcomes: dict[Run, Outcome] = {}
    train(runs, CPU, lambda run, outcome: outcomes.update({run: outcome}))
    return {run: replace(outcome, seconds=0.0) for run, outcome in outcomes.items()}


def test_solved_members_end_and_the_others_go_on_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    smaller = Stack.smaller

    def spy(self: Stack, runs: list[Run], *, is_compiled: bool) -> Stack:
        assert not is_compiled
        sizes.append(len(runs))
        return smaller(self, runs)

    monkeypatch.setattr(Stack, "smaller", spy)
    runs = grid(Recipe(attention="softmax", max_epochs=25), SMALL)
    together = _train(runs)
    assert together.keys() == set(runs)
    assert len({outcome.num_epochs for outcome in together.values()}) > 2
    assert sizes, "no stack got smaller"
    assert all(size <= 3 for size in sizes)
    for run in runs[::5]:
        alone = _train([run])[run]
        assert (alone.num_epochs, alone.accuracy) == (together[run].num_epochs, together[run].accuracy)
        assert alone.loss == pytest.approx(together[run].loss, abs=1e-5)


@pytest.mark.parametrize("optimizer", RATES)
def test_members_that_end_one_by_one_end_as_if_alone(
    optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = grid(Recipe(attention="softmax", optimizer=optimizer, max_epochs=10), SMALL)
    num_epochs = 0

    def test(self: Stack) -> torch.Tensor:
        nonlocal num_epochs
        num_epochs += 1
        return torch.tensor([float(runs.index(run) < num_epochs) for run in self.runs], dtype=torch.float64)

    monkeypatch.setattr(Stack, "test", test)
    together = _train(runs)
    assert [together[run].num_epochs for run in runs] == [1, 2, 3, 4, 5, 6]
    for run in (runs[3], runs[5]):
        num_epochs = 0
        assert _train([run])[run].loss == pytest.approx(together[run].loss, abs=1e-5)


def test_a_grid_can_end_with_its_first_solved_run(monkeypatch: pytest.MonkeyPatch) -> None:
    num_epochs = 0

    def test(self: Stack) -> torch.Tensor:
        nonlocal num_epochs
        num_epochs += 1
        is_solved = [run.lr == 5e-4 and num_epochs >= run.recipe.seed for run in self.runs]
        return torch.tensor([1.0 if each else 0.5 for each in is_solved], dtype=torch.float64)

    monkeypatch.setattr(Stack, "test", test)
    recipe = Recipe(attention="softmax", max_epochs=5, seed=2, ends_when_solved=True)
    # of the same shape, and in the same stack
    runs = [
        *grid(recipe, SMALL),
        *grid(replace(recipe, seed=4), SMALL),
        *grid(replace(recipe, seed=9), SMALL),
    ]
    outcomes = _train(runs)
    assert [outcomes[run].num_epochs for run in runs] == [2] * 6 + [4] * 6 + [5] * 6
    assert [outcomes[run].accuracy for run in runs[:6]] == [0.5, 0.5, 1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("optimizer", RATES)
def test_a_smaller_stack_goes_on_as_the_larger_would(optimizer: Optimizer) -> None:
    runs = grid(Recipe(attention="softmax", optimizer=optimizer), SMALL)[:3]
    losses = []
    for is_smaller in (False, True):
        stack = Stack(runs, DataSets(runs, CPU))
        stack.train_epoch(0, [True] * 3)
        if is_smaller:
            stack = stack.smaller(runs[1:])
        losses.append([stack.train_epoch(epoch, [True] * len(stack.runs)).tolist()[-2:] for epoch in (1, 2)])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.0, atol=1e-5)


def test_a_member_that_is_not_active_keeps_its_weights() -> None:
    for optimizer in RATES:
        runs = grid(Recipe(attention="softmax", optimizer=optimizer), SMALL)[:2]
        stack = Stack(runs, DataSets(runs, CPU))
        stack.train_epoch(0, [True, True])
        before = {name: p.detach().clone() for name, p in named_stacked_parameters(stack.model)}
        stack.train_epoch(1, [False, True])
        for name, parameter in named_stacked_parameters(stack.model):
            first, second = split_members(parameter, 2)
            old_first, old_second = split_members(before[name], 2)
            assert torch.equal(first, old_first), name
            assert not torch.equal(second, old_second), name


@pytest.mark.parametrize("kind", ["parallax", "mamba2"])
def test_compiled_blocks_compute_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # traced and differentiated by torch.compile, without the compiler for CPUs
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(training, "BATCH", ROWS)
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_module(self, backend="aot_eager", **options),
    )
    runs = grid(Recipe(attention=kind), RECALL)[:2]
    results = []
    for is_compiled in (False, True):
        stack = Stack(runs, DataSets(runs, CPU), is_compiled=is_compiled)
        results.append([*stack.train_epoch(0, [True, True]).tolist(), *stack.test().tolist()])
    torch.compiler.reset()
    assert results[1] == pytest.approx(results[0], abs=1e-5)


def test_packs_have_one_shape_whole_grids_and_fit() -> None:
    recipes = [Recipe(attention="softmax", seed=seed) for seed in (1, 2)]
    tasks = ("compression", "in-context-recall", "noisy-in-context-recall")
    runs = [
        run for task in tasks for recipe in recipes for run in grid(recipe, settings(task, "baseline")[0])
    ]
    packs = pack(runs)
    assert [len(each) for each in packs] == [6, 6, 12, 6, 6]
    # seed by seed
    assert [each[0].recipe.seed for each in packs] == [1, 1, 1, 2, 2]
    noises = settings("noisy-in-context-recall", "full")[-3:]
    assert [each.frac_noise for each in noises] == [0.4, 0.6, 0.8]
    # half of them were trained before
    short = [replace(each, seq_len=64) for each in noises]
    assert [len(each) for each in pack([run for each in short for run in grid(recipes[0], each)[::2]])] == [9]
    long = grid(recipes[0], settings("compression", "hard")[-1])
    packs = pack(long)
    assert [run for each in packs for run in each] == long
    assert all(len(each) * BATCH * 2048 <= 2**20 for each in packs)


def test_a_run_that_diverged_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid(Recipe(attention="softmax", max_epochs=4), SMALL)[:2]
    train_epoch = Stack.train_epoch

    def with_nan(self: Stack, epoch: int, is_active: list[bool]) -> torch.Tensor:
        losses = train_epoch(self, epoch, is_active)
        return torch.where(losses == losses[0], float("nan"), losses) if epoch == 1 else losses

    monkeypatch.setattr(Stack, "train_epoch", with_nan)
    outcomes = _train(runs)
    assert math.isnan(outcomes[runs[0]].loss)
    assert [outcomes[run].num_epochs for run in runs] == [2, 4]
