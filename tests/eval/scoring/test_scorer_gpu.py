"""On a GPU, scores of packed groups and shared contexts equal those of one forward per request."""

import copy

import pytest
import torch

from eval.scoring.groups import Group, rows_of
from eval.scoring.language_model import Qwen3Model
from eval.scoring.shared_prefix import shared_length
from models.config import AttentionConfig, ParallaxConfig, SoftmaxConfig
from models.qwen3 import Qwen3
from parallax.testing import error_budget
from tests.eval.conftest import build, ids

pytestmark = pytest.mark.gpu

PACKED = [
    Group(ids(1, 9), (ids(2, 1), ids(3, 1), ids(4, 1))),
    Group(ids(5, 3), (ids(6, 4), ids(6, 4)[:2], ids(7, 5), ids(8, 1))),
    Group(ids(9, 1), (ids(10, 1),)),
    Group(ids(11, 170), (ids(12, 90),)),
]
SHARED = [
    Group(ids(20, 130), (ids(21, 3), ids(22, 5), ids(23, 1), ids(22, 5)[:3])),
    Group(ids(24, 64), (ids(25, 2), ids(26, 2))),
    Group(ids(27, 97), tuple(ids(28 + each, 1 + each) for each in range(12))),
]


def one_by_one(model: Qwen3, groups: list[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """Score each request in a forward of its own.

    Returns:
        All tokens' log-probabilities, and their lead over the best other token, both fp64 `[N]`.
    """
    device = model.tok_embeddings.weight.device
    found: list[torch.Tensor] = []
    leads: list[torch.Tensor] = []
    for group in groups:
        for continuation in group.continuations:
            tokens = torch.tensor([group.context + continuation], device=device)
            logits = model(tokens[:, :-1])[0, len(group.context) - 1 :].double().cpu()
            log_probs, targets = logits.log_softmax(-1), torch.tensor(continuation)[:, None]
            found.append(log_probs.gather(1, targets)[:, 0])
            leads.append(found[-1] - log_probs.scatter(1, targets, -torch.inf).max(-1).values)
    return torch.cat(found), torch.cat(leads)


def with_best_token(model: Qwen3, group: Group) -> Group:
    """Add the model's greedy next token as one more continuation."""
    best = int(model(torch.tensor([group.context]))[0, -1].argmax())
    return Group(group.context, tuple(dict.fromkeys((*group.continuations, (best,)))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("attention", [SoftmaxConfig(), ParallaxConfig()], ids=["softmax", "parallax"])
def test_packed_and_shared_scores_equal_those_of_single_requests(
    attention: AttentionConfig, dtype: torch.dtype
) -> None:
    assert all(shared_length(group, rows_of(group)) for group in SHARED)
    model = build(attention).to("cuda", dtype)
    # truth: the same weights in fp64, eager; yardstick: single forwards in the low precision
    exact = copy.deepcopy(model).to("cpu", torch.float64)
    groups = [with_best_token(exact, group) for group in (*PACKED[:2], *SHARED, *PACKED[2:])]
    scores = [each for group in Qwen3Model(model, max_length=512).score(groups) for each in group]
    found = torch.tensor([log_prob for each in scores for log_prob in each.log_probs], dtype=torch.float64)
    greedy = torch.tensor([flag for each in scores for flag in each.greedy])
    truth, lead = one_by_one(exact, groups)
    yardstick, _ = one_by_one(model, groups)
    assert found.isfinite().all()
    assert (found - truth).norm().item() <= error_budget(truth, yardstick, dtype)
    is_clear = lead.abs() > 4 * (yardstick - truth).abs().max()
    assert (lead[is_clear] > 0).sum() >= 3
    assert torch.equal(greedy[is_clear], lead[is_clear] > 0)
