"""One run of MAD as it is told: one model, one optimizer step after another. What a stack is held against."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.mad.examples import draw_sets
from eval.mad.model import build_model, compute_logits
from eval.mad.runs import Run
from optimizers.build import build_group_optimizers
from optimizers.config import ParameterGroup
from optimizers.param_groups import assign_parameters
from tokens import IGNORE_INDEX


def train_literally(
    run: Run, groups: Mapping[str, ParameterGroup], batch: int, num_epochs: int
) -> tuple[nn.Module, list[float]]:
    """Train a run; return the model and the mean loss of each epoch."""
    model = build_model(run.recipe.attention, run.setting, run.recipe.seed, run.recipe.changes)
    optimizers = build_group_optimizers(assign_parameters(model.named_parameters(), groups), groups)
    examples, _ = draw_sets(run.setting, run.recipe.seed)
    shuffle = torch.Generator().manual_seed(run.recipe.seed)
    means: list[float] = []
    for epoch in range(num_epochs):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = run.recipe.epoch_rate(group["base_lr"], epoch)
        losses: list[Tensor] = []
        for rows in torch.randperm(run.setting.num_train_rows, generator=shuffle).split(batch):
            logits = compute_logits(model, examples.inputs_NT[rows])
            targets = examples.targets_NT[rows].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE_INDEX)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            losses.append(loss.detach())
        means.append(float(torch.stack(losses).mean()))
    return model, means
