"""Parallax attention: softmax attention plus a learned, local linear correction.

Usable on its own with torch alone (triton is imported only when its kernels run). The mathematics is in
`parallax.reference`.
"""

from parallax.api import parallax_attention

__all__ = ["parallax_attention"]
