"""Softmax attention by our implementations and by torch's own."""

from typing import Literal

import pytest
import torch

from models.attention import parallax, softmax
from models.config import ModelConfig, ParallaxConfig, SoftmaxConfig
from models.init import init_weights
from models.qwen3 import Qwen3

_LENGTHS = [1, 5, 64, 100, 86]


def _loss_and_gradients(
    impl: Literal["eager", "torch"] | None,
    window_size: int | None,
    packed: bool,
    device: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config = ModelConfig(
        size="debug", vocab_size=128, attention=SoftmaxConfig(window_size=window_size, impl=impl)
    )
    model = Qwen3(config)
    init_weights(model, 0)
    model.to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (1, 256) if packed else (2, 128), generator=generator).to(device)
    bounds = torch.tensor([0, *_LENGTHS]).cumsum(0).to(device, torch.int32) if packed else None
    loss = model(ids, cu_seqlens=bounds, max_seqlen=128, labels_BT=ids)
    loss.backward()
    return loss.detach(), {
        name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("window_size", [None, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_our_softmax_equals_torchs(window_size: int | None, packed: bool) -> None:
    loss, gradients = _loss_and_gradients(None, window_size, packed, "cpu", torch.float64)
    torch_loss, torch_gradients = _loss_and_gradients("torch", window_size, packed, "cpu", torch.float64)
    torch.testing.assert_close(loss, torch_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, torch_gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("impl", "expected"), [("eager", "eager"), ("reference", "eager"), ("triton", None), (None, None)]
)
@pytest.mark.parametrize("kind", [SoftmaxConfig, ParallaxConfig])
def test_the_chosen_implementation_also_decodes(
    kind: type[SoftmaxConfig | ParallaxConfig],
    impl: Literal["eager", "reference", "triton"] | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[str | None] = []

    def decode(q: torch.Tensor, *others: object, impl: str | None = None, **options: object) -> torch.Tensor:
        chosen.append(impl)
        return q

    for module in (softmax, parallax):
        monkeypatch.setattr(module, "parallax_decode", decode)
    model = Qwen3(ModelConfig(size="debug", vocab_size=128, attention=kind(impl=impl)))
    x, num_keys = torch.zeros(1, 1, 4, 16), torch.ones(1, dtype=torch.int32)
    (attention, *_) = model.attention_modules()
    assert isinstance(attention, softmax.SoftmaxAttention | parallax.ParallaxAttention)
    attention.attend_cached(x, x, {"k": x, "v": x}, num_keys)
    assert chosen == [expected]


@pytest.mark.gpu
@pytest.mark.parametrize("window_size", [None, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_our_kernels_are_at_least_as_exact_as_torchs(window_size: int | None, packed: bool) -> None:
    _, truth = _loss_and_gradients("torch", window_size, packed, "cuda", torch.float64)
    _, ours = _loss_and_gradients(None, window_size, packed, "cuda", torch.bfloat16)
    _, theirs = _loss_and_gradients("torch", window_size, packed, "cuda", torch.bfloat16)
    for name, exact in truth.items():
        assert (ours[name] - exact).norm() <= 1.5 * (theirs[name] - exact).norm() + 1e-3 * exact.norm(), name
