"""Attention of MAD's heads, of width 8 or another one, on a GPU."""

import pytest
import torch
from torch import Tensor

from eval.mad.model import build_model
from eval.mad.settings import settings
from models.attention.key_values import KeyValueAttention
from parallax.testing import assert_attention_within_budget, make_inputs


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [32, 127, 256])
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", ["softmax", "parallax"])
def test_bf16_is_as_accurate_as_the_plain_computation(kind: str, head_dim: int, num_tokens: int) -> None:
    setting = settings("in-context-recall", "baseline")[0]
    model = build_model(kind, setting, 0, f"head_dim={head_dim}").cuda()
    module = next(each for each in model.modules() if isinstance(each, KeyValueAttention))
    assert module.forward_supports_cuda_graph
    num_heads = 128 // head_dim
    inputs = make_inputs(4, num_tokens, num_heads, num_heads, head_dim, dtype=torch.bfloat16, device="cuda")

    def attend(q: Tensor, r: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        return module.attend(q, r, k, v, None, num_tokens)

    assert_attention_within_budget(attend, inputs if kind == "parallax" else inputs.without_probes())
