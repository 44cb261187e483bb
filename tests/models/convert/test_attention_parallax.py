"""Which attention an exported model uses: the project's kernels where they are installed, else its own."""

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from models.sizes import ModelSize
from parallax import parallax_attention, parallax_decode
from tests.models.convert.test_modeling_parallax import (
    FOLDER,
    PAD,
    VARIANTS,
    close,
    export,
    greedy,
    left_padded,
    tokens,
)

transformers = pytest.importorskip("transformers")


def attention_module(theirs: Any) -> ModuleType:
    """The export's own copy of attention_parallax.py."""
    return sys.modules[type(theirs).__module__.replace("modeling_parallax", "attention_parallax")]


def fresh_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fresh", FOLDER / "attention_parallax.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_are_used_on_cuda_if_this_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, expected in (
        (sys.modules["parallax"], True),
        (None, False),
        # the authors' package has this name too
        (ModuleType("parallax"), False),
    ):
        monkeypatch.setitem(sys.modules, "parallax", installed)
        module = fresh_module()
        assert module.has_kernels(torch.device("cuda", 1)) == expected
        assert not module.has_kernels(torch.device("cpu"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], tuple[Mock, Mock]]:
    """Let an export call the package on CPU, where it is eager, and count the calls."""

    def count(theirs: Any) -> tuple[Mock, Mock]:
        module = attention_module(theirs)
        attend, decode = Mock(wraps=parallax_attention), Mock(wraps=parallax_decode)
        monkeypatch.setattr(module, "_KERNEL_DEVICES", ("cuda", "cpu"))
        monkeypatch.setattr(module, "parallax_attention", attend)
        monkeypatch.setattr(module, "parallax_decode", decode)
        return attend, decode

    return count


@pytest.mark.parametrize("name", ["default", "window", "all"])
@torch.no_grad()
def test_the_package_gives_the_logits_of_our_model(
    name: str, tmp_path: Path, counted: Callable[[Any], tuple[Mock, Mock]]
) -> None:
    ours, theirs = export(tmp_path, VARIANTS[name])
    attend, decode = counted(theirs)
    ids = torch.tensor(tokens(21, 21))
    close(theirs(ids).logits, ours(ids))
    close(theirs(ids, attention_mask=torch.ones_like(ids)).logits, ours(ids))
    assert attend.call_count == 2 * 3
    positions = torch.tensor([[*range(8), 0, *range(12)], [*range(20), 0]])
    logits = theirs(ids, position_ids=positions).logits
    for row, bounds in enumerate(([0, 8, 9, 21], [0, 20, 21])):
        expected = ours(ids[row : row + 1], cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        close(logits[row], expected[0])
    assert attend.call_count == 3 * 3
    # prompt and new tokens
    expected = [greedy(ours, row, 8) for row in ids.tolist()]
    for cache in ("dynamic", "static"):
        attend.reset_mock()
        written = theirs.generate(
            ids, max_new_tokens=8, do_sample=False, pad_token_id=PAD, cache_implementation=cache
        )
        assert written[:, 21:].tolist() == expected
    # with a window there is a mask over the few keys
    assert (decode.call_count > 0) == (VARIANTS[name].window_size is None)
    # padding has a mask
    attend.reset_mock()
    decode.reset_mock()
    prompts = tokens(11, 3, 7)
    written = theirs.generate(**left_padded(prompts), max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    assert written[:, 11:].tolist() == [greedy(ours, prompt, 8) for prompt in prompts]
    assert (attend.call_count, decode.call_count) == (0, 0)
    # so has what follows a past, and a single token is its own
    past = transformers.DynamicCache()
    parts = [
        theirs(part, past_key_values=past, use_cache=True).logits for part in ids.split([1, 12, 8], dim=1)
    ]
    close(torch.cat(parts, dim=1), ours(ids))


def test_the_package_gives_the_gradients_of_the_exports_own_attention(
    tmp_path: Path, counted: Callable[[Any], tuple[Mock, Mock]]
) -> None:
    _, theirs = export(tmp_path, VARIANTS["all"])
    ids = torch.tensor(tokens(21))
    positions = torch.tensor([[*range(8), *range(13)]])

    def gradients() -> dict[str, torch.Tensor]:
        theirs.zero_grad()
        # a row of one token has a gradient too, which the kernel of decoding lacks
        (theirs(ids, position_ids=positions, labels=ids).loss + theirs(ids[:, :1]).logits[0, 0, 5]).backward()
        return {name: p.grad.clone() for name, p in theirs.named_parameters()}

    own = gradients()
    attend, decode = counted(theirs)
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, own[name], atol=1e-5, rtol=1e-4, msg=name)
    assert attend.call_count > 0
    assert decode.call_count == 0


def results(model: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of whole rows, of packed documents and of a prompt and its next tokens, and gradients."""
    ids = rows.to(model.device)
    found = {}
    with torch.no_grad():
        found["rows"] = model(ids).logits
        past = transformers.DynamicCache(config=model.config)
        parts = [model(part, past_key_values=past).logits for part in ids.split([280, *[1] * 20], dim=1)]
        found["decoding"] = torch.cat(parts, dim=1)
    positions = torch.cat([torch.arange(n, device=ids.device) for n in (200, 1, 99)]).expand(2, -1)
    out = model(ids, position_ids=positions, labels=ids, use_cache=False)
    found["packed"] = out.logits.detach()
    out.loss.backward()
    return found | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["default", "window", "all"])
def test_kernels_are_as_exact_as_the_exports_own_attention(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ModelSize(width=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=512)
    monkeypatch.setattr("tests.models.convert.test_modeling_parallax.SIZE", size)
    _, theirs = export(tmp_path, VARIANTS[name], dtype=dtype)
    rows = torch.tensor(tokens(300, 300))
    exact = copy.deepcopy(theirs).double()
    truth = results(exact, rows)
    module = attention_module(theirs)
    assert module.has_kernels(torch.device("cuda"))
    attend = Mock(wraps=parallax_attention)
    monkeypatch.setattr(module, "parallax_attention", attend)
    kernels = results(copy.deepcopy(theirs).cuda(), rows)
    assert attend.call_count > 0
    if dtype == "float32":
        # a static cache is compiled by transformers
        options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": PAD}
        expected = exact.generate(rows, **options).tolist()
        for cache in ("dynamic", "static"):
            written = theirs.cuda().generate(rows.cuda(), cache_implementation=cache, **options)
            assert written.tolist() == expected
    monkeypatch.setattr(module, "_KERNEL_DEVICES", ())
    own = results(theirs.cuda(), rows)
    band = 1e-5 if dtype == "float32" else 1e-3
    for each, expected in truth.items():
        norm = expected.norm() + 1e-12
        error, own_error = ((x[each].cpu().double() - expected).norm() / norm for x in (kernels, own))
        assert error < 1.5 * own_error + band, each
