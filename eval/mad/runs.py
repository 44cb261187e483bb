"""The runs of MAD: what is trained, with which rates, and what a run ends with."""

from dataclasses import dataclass
from typing import Literal

from errors import MAX_SEED, check_range
from eval.mad.settings import Setting
from optimizers.config import ScheduleConfig
from optimizers.schedule import lr_factor

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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is scored, on any setting: a column of the table of scores.

    Attributes:
        attention: The attention, as attention.kind of a config.
        changes: Settings that differ from MAD's, from canonical_changes, such as "head_dim=32 rope=false".
        optimizer: "adamw", or "muon" for the matrices of attention and MLP with AdamW for the rest.
        schedule: "constant", which mad-lab's code runs, or "cosine" by epoch down to 1e-6, which it asks for.
        seed: Seed of data, weights and order.
        max_epochs: Epochs, unless the test accuracy reaches 0.999 before.
        ends_when_solved: Whether a grid ends with the first of its runs that reaches 0.999, unlike in MAD:
            the best of them is then within 0.001 of what it would be. Runs that are trained at once end in
            the same epoch, those that have not begun are not trained.

    Raises:
        UserError: The seed is out of range.
    """

    attention: str
    changes: str = ""
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "constant"
    seed: int = 12345
    max_epochs: int = MAX_EPOCHS
    ends_when_solved: bool = False

    def __post_init__(self) -> None:
        check_range(self, 0, MAX_SEED, "seed")

    def epoch_rate(self, rate: float, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0, of what begins with `rate`."""
        min_lr_ratio = _MIN_RATE / rate if self.schedule == "cosine" else 0.0
        schedule = ScheduleConfig(kind=self.schedule, min_lr_ratio=min_lr_ratio)
        return rate * lr_factor(epoch, schedule, self.max_epochs)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the grid of a setting.

    Attributes:
        recipe: Attention, changes, optimizer, schedule, seed and epochs.
        setting: The sizes.
        lr: Learning rate; with Muon its own, beside AdamW at 1e-3.
        weight_decay: Decoupled weight decay of all parameters.
    """

    recipe: Recipe
    setting: Setting
    lr: float
    weight_decay: float

    @property
    def grid_name(self) -> str:
        """What the runs of its grid share, as "softmax adamw on memorization V256 L32 N256"."""
        recipe, setting = self.recipe, self.setting
        model = " ".join(filter(None, (recipe.attention, recipe.changes)))
        return f"{model} {recipe.optimizer} on {setting.task} {setting.name}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run ended with.

    Attributes:
        accuracy: Test accuracy of the last weights: the macro average over classes, its mean over batches.
        loss: Mean training loss of the last epoch in nats per target; NaN or Inf where training diverged.
        num_epochs: Epochs that were trained.
        seconds: Wall time to the end of the run, beside all that were trained at once.
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
