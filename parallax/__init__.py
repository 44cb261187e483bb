"""Parallax attention, softmax attention plus a learned local linear correction, and its family.

Needs torch alone; triton is imported only when its kernels run. The mathematics is in `parallax.reference`.
"""

from parallax.affine import affine_linear_attention, affine_mesanet, linear_attention, value_average
from parallax.api import parallax_attention
from parallax.decode import parallax_decode
from parallax.local_linear import local_linear_attention, local_linear_decode

__all__ = [
    "affine_linear_attention",
    "affine_mesanet",
    "linear_attention",
    "local_linear_attention",
    "local_linear_decode",
    "parallax_attention",
    "parallax_decode",
    "value_average",
]
