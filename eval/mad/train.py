"""Training of runs on settings of one shape, all at once, by the protocol of MAD.

Letters: N members, B rows of a batch, T tokens, V vocabulary; D data sets of R rows.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.mad.accuracy import macro_accuracy
from eval.mad.examples import Examples, draw_sets
from eval.mad.model import build_model, compute_logits
from eval.mad.optimizers import MemberOptimizers
from eval.mad.packs import shape_of
from eval.mad.replay import Replayed
from eval.mad.runs import BATCH, SOLVED, Outcome, Run
from eval.mad.stack import stack_modules
from models.attention.base import Attention
from models.attention.recurrent.base import RecurrentAttention
from models.attention.recurrent.fla import skip_tuning
from tokens import IGNORE_INDEX

# below so many steps the time of a compilation is not won back
_MIN_COMPILED_STEPS = 2000

Report = Callable[[Run, Outcome], None]
"""Called with a run and its outcome as soon as it ends."""


class DataSets:
    """The examples of all members, each set once, and the orders of their epochs.

    Args:
        runs: The members.
        device: Where to keep them.
    """

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        keys = list(dict.fromkeys((run.setting, run.recipe.seed) for run in runs))
        self.of_run = {run: keys.index((run.setting, run.recipe.seed)) for run in runs}
        drawn = [draw_sets(*key) for key in keys]
        self.train, self.test = (
            Examples(*(torch.stack(parts).to(device) for parts in zip(*sets, strict=True)))
            for sets in zip(*drawn, strict=True)
        )
        self._generators = [torch.Generator().manual_seed(seed) for _, seed in keys]

    def draw_order(self) -> Tensor:
        """Draw the order of the training rows in the next epoch, `[D, R]`."""
        num_rows = self.train.inputs_NT.shape[1]
        orders = [torch.randperm(num_rows, generator=generator) for generator in self._generators]
        return torch.stack(orders).to(self.train.inputs_NT.device)


class Stack:
    """Members that are trained at once, with work that can be replayed.

    Args:
        runs: The members, of one shape.
        data: Their examples.
        pool: Memory pool for CUDA graphs, or None.
        is_compiled: Whether to compile the blocks.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        data: DataSets,
        pool: Any = None,
        *,
        is_compiled: bool = False,
    ) -> None:
        self.runs, self._data, self._pool, self._is_compiled = list(runs), data, pool, is_compiled
        device = data.train.inputs_NT.device
        if device.type == "cuda" and _is_recurrent(runs[0]):
            skip_tuning()
        models = [_build(run, run.recipe.seed) for run in runs]
        self.model = stack_modules(models).to(device)
        if is_compiled:
            _compile_blocks(self.model)
        self.optimizers = MemberOptimizers(self.model, runs)
        self._set_N1 = torch.tensor([data.of_run[run] for run in runs], device=device).unsqueeze(1)
        self._loss_N = torch.zeros(len(runs), device=device)
        self._accuracy_N = torch.zeros(len(runs), dtype=torch.float64, device=device)
        self._rows: dict[tuple[bool, int], Tensor] = {}
        self._works: dict[tuple[bool, int], Replayed] = {}

    def train_epoch(self, epoch: int, is_active: Sequence[bool]) -> Tensor:
        """Train the active members on all rows in their next order.

        Args:
            epoch: The epoch, from 0.
            is_active: Whether a member is trained; the weights of others stay.

        Returns:
            The mean loss of the batches, `[N]`, on the device.
        """
        self.optimizers.set_rates(epoch, is_active)
        order_DR = self._data.draw_order()
        return self._pass_over(order_DR, is_training=True) / -(-order_DR.shape[1] // BATCH)

    def test(self) -> Tensor:
        """Return the mean over batches of the macro accuracy of each, `[N]`, as MAD logs and scores it."""
        num_sets, num_rows = self._data.test.inputs_NT.shape[:2]
        order_DR = torch.arange(num_rows, device=self._set_N1.device).expand(num_sets, -1)
        return self._pass_over(order_DR, is_training=False) / -(-num_rows // BATCH)

    def smaller(self, runs: Sequence[Run], *, is_compiled: bool = False) -> "Stack":
        """Return a stack of some of the members, as they are now."""
        stack = Stack(runs, self._data, self._pool, is_compiled=is_compiled)
        stack.optimizers.take_over(self.optimizers, [self.runs.index(run) for run in runs])
        return stack

    def _pass_over(self, order_DR: Tensor, *, is_training: bool) -> Tensor:
        total_N = (self._loss_N if is_training else self._accuracy_N).zero_()
        for rows_DB in order_DR.split(BATCH, dim=1):
            key = (is_training, rows_DB.shape[1])
            if key not in self._works:
                self._rows[key] = torch.empty_like(rows_DB, memory_format=torch.contiguous_format)
                self._works[key] = Replayed(self._work(key), self._pool)
            self._rows[key].copy_(rows_DB)
            self._works[key]()
        return total_N

    def _work(self, key: tuple[bool, int]) -> Callable[[], None]:
        is_training, _ = key

        def work() -> None:
            examples = self._data.train if is_training else self._data.test
            rows_NB = self._rows[key][self._set_N1.squeeze(1)]
            batch = Examples(*(x[self._set_N1, rows_NB] for x in examples))
            if is_training:
                self._train(batch)
            else:
                self._score(batch)

        return work

    def _train(self, batch: Examples) -> None:
        """Train one step on rows `[N, B, T]`."""
        self.optimizers.zero_gradients()
        loss_N = member_losses(self.model, batch)
        loss_N.sum().backward()
        self.optimizers.step()
        self._loss_N.add_(loss_N.detach())

    @torch.no_grad()
    def _score(self, batch: Examples) -> None:
        """Add the accuracies on rows `[N, B, T]`."""
        # a second compilation, without gradients, would take longer than it saves
        with torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext():
            logits = compute_logits(self.model, batch.inputs_NT.flatten(0, 1))
        predictions_NM = logits.argmax(-1).view(len(self.runs), -1)
        self._accuracy_N.add_(macro_accuracy(predictions_NM, batch.targets_NT.flatten(1), logits.shape[-1]))


def member_losses(model: nn.Module, batch: Examples) -> Tensor:
    """Compute the mean loss of each member over its targets, `[N]`, in nats.

    Args:
        model: A stack of N members.
        batch: Inputs and targets `[N, B, T]`.
    """
    logits = compute_logits(model, batch.inputs_NT.flatten(0, 1))
    targets_NM = batch.targets_NT.flatten(1)
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets_NM.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view(targets_NM.shape).sum(1) / (targets_NM != IGNORE_INDEX).sum(1)


def _compile_blocks(model: nn.Module) -> None:
    """Compile what is between the kernels; all blocks share one compilation for each shape."""
    # the code of earlier stacks counts towards the limit of versions of a block, above which none is made
    torch.compiler.reset()
    for layer in model.get_submodule("encoder.layers").children():
        layer.compile(dynamic=False)


def _build(run: Run, seed: int) -> nn.Module:
    return build_model(run.recipe.attention, run.setting, seed, run.recipe.changes)


def _attentions(run: Run) -> list[Attention]:
    return [module for module in _build(run, 0).modules() if isinstance(module, Attention)]


def _can_capture(run: Run) -> bool:
    """Return whether a step never waits for the device."""
    return all(attention.supports_cuda_graph for attention in _attentions(run))


def _is_recurrent(run: Run) -> bool:
    """Return whether an attention is computed by fla."""
    return any(isinstance(attention, RecurrentAttention) for attention in _attentions(run))


def free_memory() -> None:
    """Free the memory of stacks that have ended: their graphs hold it, in circles of references."""
    gc.collect()
    torch.cuda.empty_cache()


def train(
    runs: Sequence[Run],
    device: torch.device,
    report: Report,
    *,
    is_compiled: bool = False,
) -> None:
    """Train runs of one shape to their ends.

    A run that is solved is not trained further: its learning rate is 0 until at most half of the members are
    left, which then go on as a smaller stack. On a GPU the step of all members is replayed as a CUDA graph,
    but for attentions that wait for the device (lla and affine-mesanet, whose solvers test for convergence).

    Args:
        runs: The runs, of one shape_of.
        device: Device of the models and their data.
        report: Called with a run and its outcome as soon as it ends.
        is_compiled: Whether torch.compile fuses what is between the kernels, in stacks of enough steps.

    Raises:
        UserError: There is no such attention.
    """
    assert len({shape_of(run) for run in runs}) == 1, "runs of different shapes"
    with ExitStack() as contexts:
        pool = None
        if device.type == "cuda":
            contexts.callback(free_memory)
            contexts.enter_context(torch.cuda.device(device))
            contexts.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
            pool = torch.cuda.graph_pool_handle() if _can_capture(runs[0]) else None
        _train(runs, DataSets(runs, device), pool, report, is_compiled=is_compiled)


def _train(runs: Sequence[Run], data: DataSets, pool: Any, report: Report, *, is_compiled: bool) -> None:
    start = time.perf_counter()
    max_epochs = runs[0].recipe.max_epochs

    def is_worth_compiling(epoch: int) -> bool:
        num_steps = (max_epochs - epoch) * -(-runs[0].setting.num_train_rows // BATCH)
        return is_compiled and num_steps >= _MIN_COMPILED_STEPS

    stack, open_runs = Stack(runs, data, pool, is_compiled=is_worth_compiling(0)), list(runs)
    for epoch in range(max_epochs):
        losses_N = stack.train_epoch(epoch, [run in open_runs for run in stack.runs])
        # one transfer for both: the device waits while the host reads
        loss_and_accuracy_N2 = torch.stack((losses_N.double(), stack.test()), dim=1).tolist()
        seconds = round(time.perf_counter() - start, 2)
        found = {
            run: pair for run, pair in zip(stack.runs, loss_and_accuracy_N2, strict=True) if run in open_runs
        }
        solved = {(run.recipe, run.setting) for run, (_, accuracy) in found.items() if accuracy >= SOLVED}
        for run, (loss, accuracy) in found.items():
            ends_with_grid = run.recipe.ends_when_solved and (run.recipe, run.setting) in solved
            # after a loss of NaN all weights are NaN, and stay so
            is_over = accuracy >= SOLVED or ends_with_grid or math.isnan(loss) or epoch + 1 == max_epochs
            if is_over:
                open_runs.remove(run)
                report(run, Outcome(accuracy=accuracy, loss=loss, num_epochs=epoch + 1, seconds=seconds))
        if not open_runs:
            return
        if 2 * len(open_runs) <= len(stack.runs):
            stack = stack.smaller(open_runs, is_compiled=is_worth_compiling(epoch + 1))
