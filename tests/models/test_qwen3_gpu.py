"""On a GPU: torch's varlen kernel, compiled blocks over batches of different documents, fp32 logits."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models import sizes
from models.attention.torch_softmax import torch_softmax_attention
from models.config import AttentionConfig, ModelConfig, ParallaxConfig, SoftmaxConfig
from models.init import init_weights
from models.qwen3 import Qwen3

pytestmark = pytest.mark.gpu


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("window_size", [None, 1, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_kernel_equals_masked_attention(window_size: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 847, h, 64, device="cuda", generator=generator).to(dtype) for h in (8, 4, 4))
    documents = bounds([1, 5, 64, 777])
    out = torch_softmax_attention(q, k, v, documents, 800, window_size)
    truth = torch_softmax_attention(q.double(), k.double(), v.double(), documents, 800, window_size)
    assert (out - truth).norm() <= 4e-3 * truth.norm()
    q, k, v = (x.unflatten(1, (7, 121)).squeeze(0) for x in (q, k, v))
    out = torch_softmax_attention(q, k, v, None, 121, window_size)
    truth = torch_softmax_attention(q.double(), k.double(), v.double(), None, 121, window_size)
    assert (out - truth).norm() <= 4e-3 * truth.norm()


@pytest.mark.parametrize("attention", [SoftmaxConfig(), ParallaxConfig()], ids=["softmax", "parallax"])
def test_compiled_blocks_do_not_recompile_for_another_number_of_documents(attention: AttentionConfig) -> None:
    config = ModelConfig(size="debug", vocab_size=128, attention=attention)
    assert sizes.SIZES["debug"].num_layers == 4
    models = [Qwen3(config), Qwen3(config)]
    counter = CompileCounterWithBackend("inductor")
    for model in models:
        init_weights(model, 0)
        model.to("cuda", torch.bfloat16)
    for block in models[1].layers:
        block.compile(fullgraph=True, backend=counter)
    ids = torch.randint(0, 128, (1, 512), device="cuda")
    for lengths in ([512], [100, 412], [1, 2, 3, 506], [64] * 8):
        documents = bounds(lengths)
        torch._dynamo.maybe_mark_dynamic(documents, 0)
        gradients = []
        for model in models:
            model.zero_grad()
            model(ids, cu_seqlens=documents, max_seqlen=512, labels_BT=ids).backward()
            named = model.named_parameters()
            gradients.append({name: p.grad.float() for name, p in named if p.grad is not None})
        for name, plain in gradients[0].items():
            compiled = gradients[1][name]
            assert compiled.isfinite().all(), name
            assert (compiled - plain).norm() <= 0.05 * plain.norm() + 1e-3, name
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_not_rounded_to_16_bits_unless_they_need_a_gradient(dtype: torch.dtype) -> None:
    model = Qwen3(ModelConfig(size="debug", vocab_size=128))
    init_weights(model, 0)
    head = model.to("cuda", dtype).output
    x = torch.randn(2, 5, 128, device="cuda").to(dtype)
    truth = x.double() @ head.weight.detach().double().T
    with torch.no_grad():
        exact = head.logits(x)
    rounded = head.logits(x)
    assert exact.dtype == rounded.dtype == torch.float32
    assert exact.shape == rounded.shape == (2, 5, 128)
    assert (exact - truth).norm() < 1e-5 * truth.norm()
    assert torch.equal(rounded.detach(), exact.to(dtype).float())
    rounded.sum().backward()
    assert head.weight.grad is not None
