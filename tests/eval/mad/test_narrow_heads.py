"""Attention of heads of width 8 on a GPU."""

import pytest
import torch
from torch import Tensor

from eval.mad.model import build_model
from eval.mad.settings import settings
from models.attention.key_values import KeyValueAttention
from parallax.testing import assert_attention_within_budget, make_inputs


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [32, 127, 256])
@pytest.mark.parametrize("kind", ["softmax", "parallax"])
def test_bf16_is_as_accurate_as_the_plain_computation(kind: str, num_tokens: int) -> None:
    model = build_model(kind, settings("in-context-recall", "baseline")[0], 0).cuda()
    module = next(each for each in model.modules() if isinstance(each, KeyValueAttention))
    inputs = make_inputs(4, num_tokens, 16, 16, 8, dtype=torch.bfloat16, device="cuda")

    def attend(q: Tensor, r: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        return module.attend(q, r, k, v, None, num_tokens)

    assert_attention_within_budget(attend, inputs if kind == "parallax" else inputs.without_probes())
