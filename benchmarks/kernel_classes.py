"""The class of a kernel of a training step, by its name, its operators and the sizes of its operands.

Kernels that Inductor compiles are named after the operators that it has fused; those of this project, of
torch and of cuBLAS by what they do. A kernel that does several things, such as a residual and a norm, is of
the first class that its name tells.
"""

import re
from typing import NamedTuple, Self

from benchmarks.trace_kernels import Kernel
from models.config import ModelConfig

OTHER = "other"
COMMUNICATION = "communication"
_PRODUCTS = "matrix products"
_ATTENTION = "attention"
_FSDP = "copies and casts of FSDP"
_RESIDUALS = "residuals and casts"
_COPIES = "copies and casts"

_Classes = dict[str, tuple[str, ...]]
"""Parts of names in lower case; the first class decides one of whose parts occurs."""

_PRODUCT_KERNELS = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "triton_tem", "gemv")
_OWN_KERNELS: _Classes = {
    "norms and RoPE": ("norm_rope",),
    "loss": ("cross_entropy_kernel", "scale_kernel"),
    "sums": ("accumulate_kernel",),
    "orthogonalization": ("symmetric_product",),
    "gradient norm": ("lpnorm", "normtwo"),
    _COPIES: ("copyfunctor",),  # of many tensors at once: casts of weights
    "optimizer": ("multi_tensor", "adam", "update_momentum", "apply_update"),
    _FSDP: ("chunk_cat", "split_with_sizes"),
    _ATTENTION: (
        *("parallax_", "_softmax_fwd", "_softmax_bwd", "key_norms", "document_bounds"),
        *("flash", "fmha", "sdpa", "chunk_", "causal_conv1d", "l2norm"),
    ),
}
_ATTENTION_OPERATORS: _Classes = {
    _ATTENTION: ("scaled_dot_product", "scaleddotproduct", "varlen_attn", "flash_attention"),
}
_OPERATORS: _Classes = {
    "loss": ("crossentropy", "cross_entropy", "nll_loss", "log_softmax"),
    "embedding": ("embedding",),
    "norms and RoPE": ("rms_norm", "rmsnorm"),
    "gradient norm": ("clip_grad", "vector_norm", "foreach_norm"),
    _FSDP: ("fsdp::",),
}
_FUSED_KERNELS: _Classes = {
    "loss": ("logsumexp", "log_softmax", "nll_loss", "cross_entropy"),
    "SwiGLU": ("silu", "swiglu"),
    # the backward of a norm is named after its powers and sums
    "norms and RoPE": ("norm", "rsqrt", "rope", "pow", "neg_slice", "split_sub", "mul_sum"),
    "embedding": ("embedding",),
}
# torch's own, by what they do: in a CUDA graph there are no operators to tell what for
_TORCH_KERNELS: _Classes = {
    _COPIES: ("memcpy", "memset", "copy", "fillfunctor", "catarray"),
    "sums": ("functor_add", "functoronself_add", "reduce_kernel"),
}
# parts of Inductor's names that do not say what a kernel is for
_PLAIN_PARTS = {
    *("triton", "poi", "per", "red", "fused", "to", "copy", "view", "unsafe", "clone", "t", "transpose"),
    *("permute", "expand", "unsqueeze", "squeeze", "slice", "add", "sum", "zeros", "empty", "full"),
}


class ModelSizes(NamedTuple):
    """The sizes by which matrix products are told apart.

    Attributes:
        vocab_size: V.
        mlp_width: F.
    """

    vocab_size: int
    mlp_width: int

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Return the sizes of a model."""
        return cls(config.vocab_size, config.dimensions.mlp_width)


def class_of(kernel: Kernel, sizes: ModelSizes | None = None) -> str:
    """Return the class of a kernel.

    Args:
        kernel: The kernel.
        sizes: The model's sizes, by which matrix products have roles; None where they are not known.

    Returns:
        The class; OTHER if nothing tells it.
    """
    name, operators = kernel.name.lower(), " ".join(kernel.operators).lower()
    is_product = any(part in name for part in _PRODUCT_KERNELS)
    if "nccl" in name:
        return COMMUNICATION
    if "optimizer.step" in operators:
        # of Muon; AdamW has no products
        return "orthogonalization" if is_product or "symmetric_product" in name else "optimizer"
    found = _first(name, _OWN_KERNELS) or _first(operators, _ATTENTION_OPERATORS)
    if found == _ATTENTION:
        is_backward = any(part in name for part in ("bwd", "bprop", "backward")) or "backward" in operators
        return f"{_ATTENTION}, {'backward' if is_backward else 'forward'}"
    if found is None and is_product:
        return _role(kernel, sizes)
    found = found or _first(operators, _OPERATORS) or _first(name, _FUSED_KERNELS)
    if found is None and name.startswith("triton_"):
        return OTHER if _parts(name) - _PLAIN_PARTS else _RESIDUALS
    return found or _first(name, _TORCH_KERNELS) or OTHER


def _first(text: str, classes: _Classes) -> str | None:
    return next((each for each, parts in classes.items() if any(part in text for part in parts)), None)


def _parts(name: str) -> set[str]:
    return {part for part in re.split(r"_+", name) if part and not part.isdigit()}


def _role(kernel: Kernel, sizes: ModelSizes | None) -> str:
    """Return the class of a matrix product of forward or backward."""
    if sizes is None or not kernel.sizes:
        return _PRODUCTS
    if sizes.vocab_size in kernel.sizes:
        return f"{_PRODUCTS}, head"
    # gate and up may be one product
    if kernel.sizes & {sizes.mlp_width, 2 * sizes.mlp_width}:
        return f"{_PRODUCTS}, MLP"
    return f"{_PRODUCTS}, attention projections"
