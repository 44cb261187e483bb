"""The class of a kernel, by its name, its operators and the sizes of a matrix product."""

import pytest

from benchmarks.kernel_classes import ModelSizes, class_of
from benchmarks.trace_kernels import Kernel

FUSED = "triton_per_fused__to_copy"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_parallax_fwd_hopper_kernel", "attention, forward"),
        ("_parallax_bwd_dkdv_hopper_kernel", "attention, backward"),
        ("_softmax_fwd_hopper_kernel", "attention, forward"),
        ("_softmax_bwd_dq_hopper_kernel", "attention, backward"),
        ("_largest_key_norms_kernel", "attention, forward"),
        (
            "pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>",
            "attention, backward",
        ),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention, forward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention, backward"),
        ("chunk_kda_bwd_kernel_intra", "attention, backward"),
        ("_symmetric_product_kernel", "orthogonalization"),
        ("_update_momentum_kernel", "optimizer"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("multi_tensor_apply_kernel<LpNormFunctor>", "gradient norm"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("splitKreduce_kernel", "matrix products"),
        ("at::native::chunk_cat_cuda_kernel<float, c10::BFloat16>", "copies and casts of FSDP"),
        (f"{FUSED}__unsafe_view_mul_silu_silu_backward_view_0", "SwiGLU"),
        (f"{FUSED}_add_mean_mul_pow_rsqrt_0", "norms and RoPE"),
        (f"{FUSED}__unsafe_view_add_div_expand_mul_neg_pow_slice_sum_view_2", "norms and RoPE"),
        (f"{FUSED}__unsafe_view_mul_sum_view_6", "norms and RoPE"),
        (f"{FUSED}__fused_rms_norm_backward_add_3", "norms and RoPE"),
        ("_norm_rope_bwd_kernel", "norms and RoPE"),
        (f"{FUSED}_exp_logsumexp_where_1", "loss"),
        (f"{FUSED}__unsafe_view_add_7", "residuals and casts"),
        (f"{FUSED}_bernoulli_7", "other"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("multi_tensor_apply_kernel<CopyFunctor<c10::BFloat16, float, 2, 1, 1>>", "copies and casts"),
        ("at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "sums"),
        ("accumulate_kernel", "sums"),
        ("some_kernel", "other"),
    ],
)
def test_class_by_name(name: str, expected: str) -> None:
    assert class_of(Kernel(name, 0.0, 1.0)) == expected


@pytest.mark.parametrize(
    ("name", "operators", "expected"),
    [
        ("some_kernel", ("_LinearCrossEntropy",), "loss"),
        ("nvjet", ("_LinearCrossEntropy", "aten::mm"), "matrix products"),
        ("triton_poi_fused_add_3", ("Optimizer.step#AdamW.step",), "optimizer"),
        ("nvjet", ("Optimizer.step#Muon.step", "aten::bmm"), "orthogonalization"),
        ("ncclDevKernel", ("Optimizer.step#Muon.step",), "communication"),
        ("some_kernel", ("FSDP::pre_forward", "FSDP::all_gather_copy_out"), "copies and casts of FSDP"),
        ("nvjet", ("aten::_scaled_dot_product_cudnn_attention_backward",), "attention, backward"),
        ("reduce_kernel", ("aten::_flash_attention_forward",), "attention, forward"),
        ("indexSelectLargeIndex", ("aten::embedding",), "embedding"),
        ("vectorized_elementwise_kernel", ("aten::rms_norm", "aten::mul"), "norms and RoPE"),
    ],
)
def test_class_by_operators(name: str, operators: tuple[str, ...], expected: str) -> None:
    assert class_of(Kernel(name, 0.0, 1.0, operators)) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({4096, 1024, 151936}, "matrix products, head"),
        ({32768, 1024, 3072}, "matrix products, MLP"),
        ({32768, 1024, 6144}, "matrix products, MLP"),
        ({32768, 1024, 2048}, "matrix products, attention projections"),
        (set(), "matrix products"),
    ],
)
def test_role_of_a_matrix_product(sizes: set[int], expected: str) -> None:
    kernel = Kernel("nvjet", 0.0, 1.0, ("aten::mm",), frozenset(sizes))
    assert class_of(kernel, ModelSizes(vocab_size=151936, mlp_width=3072)) == expected
