"""Training of one model on one setting, by the protocol of MAD."""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from eval.mad.accuracy import batch_accuracy
from eval.mad.examples import Examples, draw_sets
from eval.mad.model import build_model, compute_logits
from eval.mad.settings import Setting
from optimizers.base import GroupOptimizer
from optimizers.build import build_group_optimizers
from optimizers.config import AdamWGroup, MuonGroup, ParameterGroup, ScheduleConfig
from optimizers.param_groups import assign_parameters
from optimizers.schedule import lr_factor
from tokens import IGNORE_INDEX

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["constant", "cosine"]

BATCH = 128
MAX_EPOCHS = 200
# training ends at this test accuracy
SOLVED = 0.999

RATES: dict[Optimizer, tuple[float, ...]] = {
    "adamw": (1e-4, 5e-4, 1e-3),
    # our choice, since MAD has no Muon: around the best rate of docs/optimizers.md
    "muon": (3e-3, 1e-2, 3e-2),
}
WEIGHT_DECAYS = (0.0, 0.1)

_MIN_RATE = 1e-6
_BETA2 = 0.999
# of what Muon does not update: the largest of AdamW's
_RATE_BESIDE_MUON = 1e-3
_HIDDEN = r"encoder\.layers\.\d+\.(attention\.w[qkvorz]|mlp\.(gate|up|down))\.weight"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is scored, on any setting: a column of the table of scores.

    Attributes:
        attention: The attention, as attention.kind of a config.
        optimizer: "adamw", or "muon" for the matrices of attention and MLP with AdamW for the rest.
        schedule: "constant", which mad-lab's code runs, or "cosine" by epoch down to 1e-6, which it asks for.
        seed: Seed of data, weights and order.
        max_epochs: Epochs, unless the test accuracy reaches 0.999 before.
    """

    attention: str
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "constant"
    seed: int = 12345
    max_epochs: int = MAX_EPOCHS


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the grid of a setting.

    Attributes:
        recipe: Attention, optimizer, schedule, seed and epochs.
        setting: The sizes.
        lr: Learning rate; with Muon its own, beside AdamW at 1e-3.
        weight_decay: Decoupled weight decay of all parameters.
    """

    recipe: Recipe
    setting: Setting
    lr: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run ended with.

    Attributes:
        accuracy: Test accuracy of the last weights: the macro average over classes, its mean over batches.
        loss: Mean training loss of the last epoch in nats per target; NaN or Inf where training diverged.
        num_epochs: Epochs that were trained.
        seconds: Wall time.
    """

    accuracy: float
    loss: float
    num_epochs: int
    seconds: float


def grid(recipe: Recipe, setting: Setting) -> list[Run]:
    """Return the runs of a setting, of which the best counts: three rates by two weight decays."""
    return [
        Run(recipe=recipe, setting=setting, lr=lr, weight_decay=weight_decay)
        for lr in RATES[recipe.optimizer]
        for weight_decay in WEIGHT_DECAYS
    ]


def _groups(run: Run) -> dict[str, ParameterGroup]:
    if run.recipe.optimizer == "adamw":
        return {"all": AdamWGroup(parameters=[".*"], lr=run.lr, weight_decay=run.weight_decay, beta2=_BETA2)}
    return {
        "hidden": MuonGroup(parameters=[_HIDDEN], lr=run.lr, weight_decay=run.weight_decay, scale="spectral"),
        "others": AdamWGroup(
            parameters=[f"(?!{_HIDDEN}$).*"],
            lr=_RATE_BESIDE_MUON,
            weight_decay=run.weight_decay,
            beta2=_BETA2,
        ),
    }


def build_optimizers(model: torch.nn.Module, run: Run) -> list[GroupOptimizer]:
    """Build the optimizers of a run; MAD's weight decay holds for gains, biases and embeddings too."""
    groups = _groups(run)
    return build_group_optimizers(assign_parameters(model.named_parameters(), groups), groups)


def set_rates(optimizers: list[GroupOptimizer], run: Run, epoch: int) -> None:
    """Set the learning rates of an epoch, counted from 0."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        base = group["base_lr"]
        schedule = ScheduleConfig(
            kind=run.recipe.schedule,
            min_lr_ratio=_MIN_RATE / base if run.recipe.schedule == "cosine" else 0.0,
        )
        group["lr"] = base * lr_factor(epoch, schedule, run.recipe.max_epochs)


def _train_epoch(
    model: torch.nn.Module,
    optimizers: list[GroupOptimizer],
    examples: Examples,
    order_N: torch.Tensor,
) -> float:
    """Train on all rows in an order; return the mean loss of its batches."""
    losses = []
    for rows_B in order_N.split(BATCH):
        logits_BTV = compute_logits(model, examples.inputs_NT[rows_B])
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1), examples.targets_NT[rows_B].flatten(), ignore_index=IGNORE_INDEX
        )
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def train(run: Run, device: torch.device) -> Outcome:
    """Train a run to its end.

    Args:
        run: The run.
        device: Device of the model and its data.

    Raises:
        UserError: There is no such attention.
    """
    start = time.perf_counter()
    model = build_model(run.recipe.attention, run.setting, run.recipe.seed).to(device)
    train_set, test_set = (
        Examples(*(x.to(device) for x in examples)) for examples in draw_sets(run.setting, run.recipe.seed)
    )
    optimizers = build_optimizers(model, run)
    shuffle = torch.Generator().manual_seed(run.recipe.seed)
    accuracy, loss, epoch = 0.0, float("nan"), 0
    for epoch in range(run.recipe.max_epochs):
        set_rates(optimizers, run, epoch)
        order_N = torch.randperm(run.setting.num_train_rows, generator=shuffle).to(device)
        loss = _train_epoch(model, optimizers, train_set, order_N)
        accuracy = batch_accuracy(model, test_set, BATCH)
        if accuracy >= SOLVED:
            break
    seconds = time.perf_counter() - start
    return Outcome(accuracy=accuracy, loss=loss, num_epochs=epoch + 1, seconds=round(seconds, 2))
