"""The sizes of the comparison: one row each.

0.6b and 1.7b are Qwen3's own dimensions (paper, section 3). debug and 60m are our choice: 60m has about 60M
parameters outside the embedding, a size for one GPU.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Dimensions of a Qwen3 decoder.

    Attributes:
        width: Model width D.
        num_layers: Number of blocks.
        num_heads: Query heads H.
        num_kv_heads: Key/value heads G; divides num_heads.
        head_dim: Head width K, independent of width.
        mlp_width: Width F of the SwiGLU.
    """

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int


SIZES: dict[str, ModelSize] = {
    "debug": ModelSize(width=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=384),
    "60m": ModelSize(width=512, num_layers=16, num_heads=8, num_kv_heads=4, head_dim=64, mlp_width=1920),
    "0.6b": ModelSize(width=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=3072),
    "1.7b": ModelSize(width=2048, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=6144),
}
