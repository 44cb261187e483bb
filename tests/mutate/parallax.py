"""Mutants of parallax/; the kernels, which need a GPU, are left out."""

from tests.mutate.mutant import Mutant

AFFINE = "tests/parallax/test_affine.py"
API = "tests/parallax/test_api.py"
CACHE = "tests/models/generation/test_cache.py"
DECODE = "tests/parallax/test_decode.py"
EAGER = "tests/parallax/test_eager.py"
LOCAL_LINEAR = "tests/parallax/test_local_linear.py"
SOLVER = "tests/parallax/test_conjugate_gradients.py"

MUTANTS = [
    Mutant(
        "parallax/ops.py",
        "lse = q.new_empty(q.shape[:3], dtype=eager.accumulation_dtype(q.dtype))",
        "lse = q.new_empty(q.shape[:3])",
        API,
    ),
    Mutant("parallax/ops.py", "    ctx.set_materialize_grads(False)\n", "", API),
    Mutant("parallax/ops.py", "    ctx.mark_non_differentiable(*others)\n", "", API),
    Mutant(
        "parallax/ops.py",
        "    with torch.autocast(q.device.type, enabled=False):\n        return eager.backward(",
        "    with torch.autocast(q.device.type, enabled=True):\n        return eager.backward(",
        EAGER,
    ),
    Mutant(
        "parallax/eager.py",
        "addcmul_(row_sum_ZM1, k_ref_Z1K, value=-1)",
        "addcmul_(row_sum_ZM1, k_ref_Z1K, value=0)",
        EAGER,
    ),
    Mutant(
        "parallax/eager.py",
        "torch.sub(tbar_ZM1, t_ZMS, out=t_ZMS).add_(1).mul_(w_ZMS)",
        "torch.sub(tbar_ZM1 + 1, t_ZMS, out=t_ZMS).mul_(w_ZMS)",
        EAGER,
    ),
    Mutant(
        "parallax/eager.py",
        "t_ZMS = _hide(_matmul(_rows_of(r_ZTRK, tile), k_tile_ZSK.mT, dtype), tile, 0.0)",
        "t_ZMS = _matmul(_rows_of(r_ZTRK, tile), k_tile_ZSK.mT, dtype)",
        EAGER,
    ),
    Mutant(
        "parallax/eager.py",
        "t_ZMS = _hide(_matmul(r_ZMK, k_tile_ZSK.mT, dtype), tile, 0.0)",
        "t_ZMS = _matmul(r_ZMK, k_tile_ZSK.mT, dtype)",
        EAGER,
    ),
    Mutant("parallax/eager.py", "query - window_size + 1)", "query - window_size)", EAGER),
    Mutant(
        "parallax/eager.py",
        "lse_BTH = torch.empty(q_BTHK.shape[:3], dtype=dtype",
        "lse_BTH = torch.empty(q_BTHK.shape[:3], dtype=q_BTHK.dtype",
        EAGER,
    ),
    Mutant(
        "parallax/eager.py",
        "(torch.zeros(k_ZSK.shape, dtype=dtype, device=k_ZSK.device)",
        "(torch.zeros(k_ZSK.shape, dtype=k_ZSK.dtype, device=k_ZSK.device)",
        EAGER,
    ),
    Mutant(
        "parallax/eager_decode.py",
        "o_key > last_BT1 - window_size",
        "o_key >= last_BT1 - window_size",
        DECODE,
    ),
    Mutant("parallax/eager_decode.py", ".clamp(0, cache.shape[0] - 1)", "", DECODE),
    Mutant(
        "parallax/eager_decode.py",
        "torch.where(exists_BS[..., None, None], x, 0).to(dtype)",
        "x.to(dtype)",
        DECODE,
    ),
    Mutant(
        "parallax/conjugate_gradients.py",
        "dtype.itemsize == 2 else 4)",
        "dtype.itemsize == 2 else 400)",
        SOLVER,
    ),
    Mutant("parallax/conjugate_gradients.py", "return max(torch", "return min(torch", SOLVER),
    Mutant(
        "parallax/causal_product.py",
        "z.flip(3), ids.flip(0)",
        "z.flip(3), ids",
        AFFINE,
    ),
    Mutant(
        "parallax/causal_product.py",
        "(ids_NC != last_N1)[..., None], 0.0)",
        "(ids_NC != first_N1)[..., None], 0.0)",
        AFFINE,
    ),
    Mutant(
        "parallax/causal_product.py",
        "torch.autocast(x.device.type, enabled=False)",
        "torch.autocast(x.device.type, enabled=True)",
        AFFINE,
    ),
    Mutant(
        "parallax/affine.py",
        "residual_tolerance(q.dtype, k.dtype)",
        "residual_tolerance(q_BGRTK.dtype)",
        SOLVER,
    ),
    Mutant("parallax/affine_state.py", "vbar_BG1K * (1 + tbar_BGR1)", "vbar_BG1K * (1 - tbar_BGR1)", CACHE),
    Mutant(
        "parallax/local_linear.py",
        "centred_ZSK = k_ZSK - p_ZMS[:, :1] @ k_ZSK",
        "centred_ZSK = k_ZSK",
        LOCAL_LINEAR,
    ),
    Mutant(
        "parallax/local_linear.py",
        "block = max(1, min(64, _DIRECT_ELEMENTS // max(1, batch_size * num_heads * width**2)))",
        "block = 64",
        LOCAL_LINEAR,
    ),
    Mutant(
        "parallax/local_linear.py",
        "cache_seqlens=cache_seqlens, window_size=window_size, scale=scale",
        "cache_seqlens=cache_seqlens, scale=scale",
        LOCAL_LINEAR,
    ),
    Mutant("parallax/validation.py", "        if stop < start:", "        if stop <= start:", API),
    Mutant(
        "parallax/validation.py", "if not 0 <= page < num_pages:", "if not 0 <= page <= num_pages:", DECODE
    ),
    Mutant("parallax/validation.py", "if length > capacity:", "if length >= capacity:", DECODE),
]
