"""The recurrent baselines on CUDA: fla's kernels against the chunked code, packed, compiled, in CUDA graphs.

Error budget: inputs are made once in the low dtype, the chunked code on their `.double()` is the truth, and
the error may be twice that of the chunked code in bf16 (of a recurrence: under autocast, which rounds the
inputs of its products), plus one rounding of the result.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention.base import Attention, Rope
from models.attention.recurrent.base import (
    GATED_DELTA_RULE,
    MESA,
    STATE_SPACE,
    Recurrence,
    RecurrentAttention,
    RowScan,
    ShortConvolution,
)
from models.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    Mamba2Config,
    MesaNetConfig,
    ModelConfig,
)
from models.init import init_weights
from models.qwen3 import Qwen3

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Gated DeltaNet runs slower here")]

BAND = 2**-8  # a rounding of each result to bf16
RECURRENCES: dict[str, Recurrence] = {
    "gated-delta": GATED_DELTA_RULE,
    "kimi-delta": GATED_DELTA_RULE,
    "mesa": MESA,
    "state-space": STATE_SPACE,
}
CONFIGS: list[AttentionConfig] = [GatedDeltaNetConfig(), KimiDeltaConfig(), MesaNetConfig(), Mamba2Config()]
LAYOUTS: dict[str, list[int] | None] = {
    "rows": None,
    "packed": [1, 63, 64, 65, 207],
    "packed_with_empty_documents": [0, 130, 0, 0, 270],
}
configs = pytest.mark.parametrize("attention", CONFIGS, ids=lambda a: a.kind)


@pytest.fixture(autouse=True)
def _needs_fla(fast_autotuning: None) -> None:
    pytest.importorskip("fla")


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def inputs(kind: str, width: int, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    """Inputs by name, with decays from weak to strong and keys of nonzero mean."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, 400, 3, *shape, generator=generator, device="cuda")

    width_v = width * 2 if kind == "gated-delta" else width
    values: dict[str, Any] = {
        "q": normal(width).to(dtype),
        "k": (normal(width) + 0.5).to(dtype),
        "v": normal(width_v).to(dtype),
    }
    if kind == "state-space":
        values["q"], values["k"] = (values[name] * width**-0.5 for name in "qk")
    channels = {"gated-delta": (1,), "kimi-delta": (width,)}.get(kind, ())
    strength = torch.tensor([0.01, 0.2, 1.0], device="cuda").reshape(3, *(1,) * len(channels))
    values["g"] = -normal(*channels).exp() * strength
    if kind != "state-space":
        values["beta"] = normal().sigmoid()
    if kind == "mesa":
        values["ridge"] = torch.rand(3, width, generator=generator, device="cuda") + 0.5
        values["num_iterations"] = 30
    return values


def results(run: Any, values: dict[str, Any], double: bool = False, scale: float = 1.0) -> dict[str, Tensor]:
    """Output, states and the gradients of a weighted sum of the output."""
    leaves = {
        name: (x.double() if double else x).detach().clone().requires_grad_() if isinstance(x, Tensor) else x
        for name, x in values.items()
    }
    o, states = run(*leaves.values())
    weight = scale * torch.randn(o.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    tensors = {name: x for name, x in leaves.items() if isinstance(x, Tensor)}
    gradients = torch.autograd.grad((o * weight.to(o.dtype)).sum(), list(tensors.values()))
    named = {f"d{name}": gradient for name, gradient in zip(tensors, gradients, strict=True)}
    return {"o": o, **{f"state {n}": s for n, s in enumerate(states)}, **named}


def assert_within_budget(
    ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], band: float = BAND
) -> None:
    for name, x in ours.items():
        assert x.isfinite().all(), name
        scale = truth[name].norm()
        error, allowed = ((y.double() - truth[name]).norm() / scale for y in (x, plain[name]))
        assert error <= 2 * allowed + band, f"{name}: {float(error):.5f}, plain {float(allowed):.5f}"


@pytest.mark.parametrize(
    ("layout", "width", "dtype"),
    [
        *((layout, 64, torch.bfloat16) for layout in LAYOUTS),
        # each width, dtype and kind of layout compiles some 15 kernels
        ("packed", 128, torch.bfloat16),
        ("rows", 64, torch.float32),
        # that of MAD's models
        ("rows", 32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", RECURRENCES)
def test_kernels_equal_the_chunked_code(kind: str, layout: str, width: int, dtype: torch.dtype) -> None:
    lengths, recurrence = LAYOUTS[layout], RECURRENCES[kind]
    documents = None if lengths is None else bounds(lengths)
    values = inputs(kind, width, dtype, 2 if documents is None else 1)

    def fused(*arguments: Any) -> Any:
        o, states = recurrence.fused(*arguments, cu_seqlens=documents, output_final_state=documents is None)
        return o, states if documents is None else ()

    def plain(*arguments: Any) -> Any:
        o, states = recurrence.chunked(*arguments, cu_seqlens=documents)
        return o, states if documents is None else ()

    def plain_in_bf16(*arguments: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return plain(*arguments)

    truth = results(plain, values, double=True)
    assert_within_budget(results(fused, values), results(plain_in_bf16, values), truth)


@pytest.mark.parametrize("kind", RECURRENCES)
def test_gradients_of_a_mean_over_millions_of_tokens_are_within_the_error_budget(kind: str) -> None:
    recurrence, documents = RECURRENCES[kind], bounds([63, 65, 272])
    values, scale = inputs(kind, 64, torch.bfloat16, 1), 2.0**-22

    def fused(*arguments: Any) -> Any:
        return recurrence.fused(*arguments, cu_seqlens=documents, output_final_state=False)[0], ()

    def plain(*arguments: Any) -> Any:
        return recurrence.chunked(*arguments, cu_seqlens=documents)[0], ()

    def plain_in_bf16(*arguments: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return plain(*arguments)

    truth = results(plain, values, double=True, scale=scale)
    ours = results(fused, values, scale=scale)
    assert_within_budget(ours, results(plain_in_bf16, values, scale=scale), truth)


def test_gated_delta_rule_with_keys_of_width_256_equals_the_chunked_code() -> None:
    values = inputs("gated-delta", 256, torch.bfloat16, 1)
    documents = bounds([100, 300])

    def run(function: Any, **options: Any) -> Any:
        return lambda *arguments: (function(*arguments, cu_seqlens=documents, **options)[0], ())

    truth = results(run(GATED_DELTA_RULE.chunked), values, double=True)
    with torch.autocast("cuda", torch.bfloat16):
        plain = results(run(GATED_DELTA_RULE.chunked), values)
    assert_within_budget(results(run(GATED_DELTA_RULE.fused, output_final_state=False), values), plain, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_kernel_equals_the_cpu_code(layout: str, bias: bool) -> None:
    lengths = LAYOUTS[layout]
    documents = None if lengths is None else bounds(lengths)
    x = torch.randn(2 if documents is None else 1, 400, 96, device="cuda").bfloat16()
    conv = ShortConvolution(96, bias=bias)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)

    def run(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        conv.bfloat16().to(device, dtype)
        leaf = x.to(device, dtype).requires_grad_()
        rows = RowScan(None if documents is None else documents.to(device))
        y = rows.convolve("", conv, leaf)
        gradients = torch.autograd.grad(y.square().sum(), [leaf, *conv.parameters()])
        return {"y": y.cuda(), **{f"gradient {n}": g.cuda() for n, g in enumerate(gradients)}}

    truth, plain = run("cpu", torch.float64), run("cpu", torch.bfloat16)
    assert_within_budget(run("cuda", torch.bfloat16), plain, truth)


def build(attention: AttentionConfig) -> Qwen3:
    model = Qwen3(ModelConfig(size="debug", vocab_size=128, attention=attention, init_std=0.05))
    init_weights(model, 0)
    return model.bfloat16()


def first_attention(model: Qwen3) -> RecurrentAttention:
    module = model.layers[0].get_submodule("attention")
    assert isinstance(module, RecurrentAttention)
    return module


def decode(module: Attention, x: Tensor) -> Tensor:
    """Prefill three ragged prompts of the rows of x, then extend them by one, one, three and one token."""
    prompts = (1, 130, 64)
    rope = Rope(torch.arange(1, device=x.device)[None], 64, 1e4)
    documents = torch.tensor([0, 1, 131, 195], dtype=torch.int32, device=x.device)
    state = module.new_state(3, 140, device=x.device, dtype=x.dtype)
    packed = torch.cat([row[:n] for row, n in zip(x, prompts, strict=True)])[None]
    outputs = [module.prefill(packed, rope, documents, 130, state)[0]]
    lengths = torch.tensor(prompts, dtype=torch.int32, device=x.device)
    for num_new in (1, 1, 3, 1):
        new = torch.stack([row[int(n) : int(n) + num_new] for row, n in zip(x, lengths, strict=True)])
        outputs.append(module.extend(new, rope, state, lengths).flatten(0, 1))
        lengths += num_new
    return torch.cat(outputs)


@configs
@torch.no_grad()
def test_prefill_and_extend_equal_the_cpu_code(attention: AttentionConfig) -> None:
    module = first_attention(build(attention))
    x = torch.randn(3, 140, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = decode(module, x).cuda()
    ours = decode(module.cuda(), x.cuda())
    truth = decode(module.cpu().double(), x.double()).cuda()
    assert_within_budget({"y": ours}, {"y": plain}, {"y": truth})


@configs
@torch.no_grad()
def test_extend_runs_in_a_cuda_graph(attention: AttentionConfig) -> None:
    module = first_attention(build(attention)).cuda()
    x = torch.randn(6, 2, 1, 128, device="cuda").bfloat16()
    rope = Rope(torch.zeros(1, 1, dtype=torch.int32, device="cuda"), 64, 1e4)
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")

    def fresh() -> dict[str, Tensor]:
        return module.new_state(2, 8, device=x.device, dtype=x.dtype)

    state = fresh()
    expected = [module.extend(token, rope, state, lengths).clone() for token in x]
    state, token = fresh(), x[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module.extend(token, rope, state, lengths)
    for tensor in state.values():
        tensor.zero_()
    for n, new in enumerate(x):
        token.copy_(new)
        graph.replay()
        torch.testing.assert_close(y, expected[n], atol=1e-2, rtol=1e-2)


def gradients_by_role(model: Qwen3, documents: Tensor) -> dict[str, Tensor]:
    """Gradients over 512 tokens in fp64, concatenated over layers, by the parameter's name in its layer."""
    device = model.output.weight.device
    ids = torch.randint(0, 128, (1, 512), generator=torch.Generator().manual_seed(0)).to(device)
    model.zero_grad()
    model(ids, cu_seqlens=documents.to(device), max_seqlen=512, labels_BT=ids).backward()
    roles: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad.double().flatten().cuda()
        roles.setdefault(re.sub(r"layers\.\d+\.", "", name), []).append(gradient)
    return {role: torch.cat(gradients) for role, gradients in roles.items()}


@configs
def test_model_gradients_equal_those_on_cpu_compiled_or_not(
    attention: AttentionConfig,
) -> None:
    truth_model, plain_model, model, compiled = (build(attention) for _ in range(4))
    truth_model.double()
    model.cuda()
    compiled.cuda()
    assert first_attention(compiled).has_graph_breaks
    for block in compiled.layers:
        block.compile(fullgraph=False)
    for lengths in ([512], [1, 2, 3, 506], [64] * 8):
        documents = bounds(lengths)
        torch._dynamo.maybe_mark_dynamic(documents, 0)
        truth = gradients_by_role(truth_model, documents)

        def joined(of: Qwen3, documents: Tensor = documents, truth: dict[str, Tensor] = truth) -> Tensor:
            # all roles weigh the same; the few gradients of a gate are cancelling sums, mostly rounding
            gradients = gradients_by_role(of, documents)
            return torch.cat([gradients[role] / x.norm() for role, x in truth.items()])

        plain, exact = {"all": joined(plain_model)}, {"all": joined(truth_model)}
        assert_within_budget({"all": joined(model)}, plain, exact, band=4 * BAND)
        assert_within_budget({"all": joined(compiled)}, plain, exact, band=4 * BAND)
