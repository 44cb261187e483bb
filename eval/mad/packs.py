"""Which runs are trained at once."""

from collections.abc import Hashable, Sequence

from eval.mad.model import is_autoencoder
from eval.mad.runs import BATCH, Run

# tokens of a step above which more members at once are not faster
_NUM_TOKENS = 2**17
# tokens of a step that fit in the memory of a GPU of 80 GB
_MAX_TOKENS = 2**20


def shape_of(run: Run) -> Hashable:
    """Return what runs have to have in common to be trained at once."""
    recipe, setting = run.recipe, run.setting
    shape = (setting.vocab_size, setting.num_tokens, setting.num_train_rows, is_autoencoder(setting))
    return recipe.attention, recipe.changes, recipe.optimizer, recipe.schedule, recipe.max_epochs, shape


def pack(runs: Sequence[Run]) -> list[list[Run]]:
    """Divide runs into those that are trained at once: seed by seed, and the longest first.

    Grids are put together as long as that is faster, and divided where they do not fit in memory.
    """
    seeds = list(dict.fromkeys(run.recipe.seed for run in runs))
    by_shape: dict[Hashable, list[Run]] = {}
    for run in runs:
        by_shape.setdefault(shape_of(run), []).append(run)
    packs: list[list[Run]] = []
    for same in by_shape.values():
        by_grid: dict[Hashable, list[Run]] = {}
        for run in same:
            by_grid.setdefault((run.recipe, run.setting), []).append(run)
        num_tokens = BATCH * same[0].setting.num_tokens
        open_packs: list[list[Run]] = []
        for members in by_grid.values():
            if not open_packs or (len(open_packs[-1]) + len(members)) * num_tokens > _NUM_TOKENS:
                open_packs.append([])
            open_packs[-1] += members
        size = max(1, _MAX_TOKENS // num_tokens)
        packs += [each[start : start + size] for each in open_packs for start in range(0, len(each), size)]
    return sorted(packs, key=lambda each: (seeds.index(each[0].recipe.seed), -_cost(each)))


def _cost(runs: Sequence[Run]) -> int:
    setting, recipe = runs[0].setting, runs[0].recipe
    return len(runs) * setting.num_tokens * setting.num_train_rows * recipe.max_epochs
