"""The model sizes of the comparison.

0.6b and 1.7b have Qwen3's dimensions (paper, section 3). debug and 60m are our choice: 60m has about 60M
parameters without the embedding, a size for one GPU.

At three sizes there are the controls of the comparison (paper, section 3). MLP widths are multiples of 8, so
that parameters match approximately; `python -m models.size_table` prints all rows with the mismatch.
  _parameter_matched          softmax with more query heads, to match Parallax's parameters
  _compute_matched            Parallax with half the head width (at 60m half the heads), to match softmax's
                              FLOPs forward, and a wider MLP, to match Parallax's parameters
  _half_width                 at 60m alone: _compute_matched with half the head width, as at the other sizes
  _compute_parameter_matched  the same with an MLP that matches softmax's parameters
  _parameter_neutral          Parallax with its whole head width, and an MLP narrower by W_R's parameters, to
                              match softmax's (our choice: the paper has no such control)
The paper does not state which of the two compute-matched ones it trained.

The recurrent baselines have sizes named by their kind: heads as in their authors' models of that width (our
choice, since the paper does not state them), and an MLP that matches softmax's parameters.
  _gated-deltanet  keys of 3/4 of the width in heads of 256 (at 60m of 128), values twice as wide
  _kda, _mesanet   keys and values of the width, in heads of 128
  _mamba2          an inner width of twice the width, in heads of 64, a state size of 128
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Dimensions of a Qwen3 decoder.

    Attributes:
        width: Model width D.
        num_layers: Number of blocks.
        num_heads: Query heads H.
        num_kv_heads: Key/value heads G; num_heads must be a multiple.
        head_dim: Head width K; independent of width.
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
    "60m_parameter_matched": ModelSize(
        width=512, num_layers=16, num_heads=12, num_kv_heads=4, head_dim=64, mlp_width=1920
    ),
    "60m_compute_matched": ModelSize(
        width=512, num_layers=16, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=2264
    ),
    "60m_half_width": ModelSize(
        width=512, num_layers=16, num_heads=8, num_kv_heads=4, head_dim=32, mlp_width=2264
    ),
    "60m_compute_parameter_matched": ModelSize(
        width=512, num_layers=16, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=2088
    ),
    "60m_parameter_neutral": ModelSize(
        width=512, num_layers=16, num_heads=8, num_kv_heads=4, head_dim=64, mlp_width=1752
    ),
    "0.6b_parameter_matched": ModelSize(
        width=1024, num_layers=28, num_heads=24, num_kv_heads=8, head_dim=128, mlp_width=3072
    ),
    "0.6b_compute_matched": ModelSize(
        width=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=64, mlp_width=4440
    ),
    "0.6b_compute_parameter_matched": ModelSize(
        width=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=64, mlp_width=3752
    ),
    "0.6b_parameter_neutral": ModelSize(
        width=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=2392
    ),
    "1.7b_parameter_matched": ModelSize(
        width=2048, num_layers=28, num_heads=24, num_kv_heads=8, head_dim=128, mlp_width=6144
    ),
    "1.7b_compute_matched": ModelSize(
        width=2048, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=64, mlp_width=7512
    ),
    "1.7b_compute_parameter_matched": ModelSize(
        width=2048, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=64, mlp_width=6824
    ),
    "1.7b_parameter_neutral": ModelSize(
        width=2048, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=5464
    ),
    "60m_gated-deltanet": ModelSize(
        width=512, num_layers=16, num_heads=3, num_kv_heads=3, head_dim=128, mlp_width=1400
    ),
    "60m_kda": ModelSize(width=512, num_layers=16, num_heads=4, num_kv_heads=4, head_dim=128, mlp_width=1576),
    "60m_mesanet": ModelSize(
        width=512, num_layers=16, num_heads=4, num_kv_heads=4, head_dim=128, mlp_width=1744
    ),
    "60m_mamba2": ModelSize(
        width=512, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=64, mlp_width=1312
    ),
    "0.6b_gated-deltanet": ModelSize(
        width=1024, num_layers=28, num_heads=3, num_kv_heads=3, head_dim=256, mlp_width=3064
    ),
    "0.6b_kda": ModelSize(
        width=1024, num_layers=28, num_heads=8, num_kv_heads=8, head_dim=128, mlp_width=3576
    ),
    "0.6b_mesanet": ModelSize(
        width=1024, num_layers=28, num_heads=8, num_kv_heads=8, head_dim=128, mlp_width=3744
    ),
    "0.6b_mamba2": ModelSize(
        width=1024, num_layers=28, num_heads=32, num_kv_heads=32, head_dim=64, mlp_width=2968
    ),
    "1.7b_gated-deltanet": ModelSize(
        width=2048, num_layers=28, num_heads=6, num_kv_heads=6, head_dim=256, mlp_width=4088
    ),
    "1.7b_kda": ModelSize(
        width=2048, num_layers=28, num_heads=16, num_kv_heads=16, head_dim=128, mlp_width=5280
    ),
    "1.7b_mesanet": ModelSize(
        width=2048, num_layers=28, num_heads=16, num_kv_heads=16, head_dim=128, mlp_width=5448
    ),
    "1.7b_mamba2": ModelSize(
        width=2048, num_layers=28, num_heads=64, num_kv_heads=64, head_dim=64, mlp_width=3984
    ),
}


@dataclass(frozen=True, kw_only=True)
class Control:
    """The purpose of a matched size.

    Attributes:
        attention: The attention.kind that has this size.
        reference: The attention.kind whose parameters at the plain size are matched.
    """

    attention: str
    reference: str


CONTROLS: dict[str, Control] = {
    "parameter_matched": Control(attention="softmax", reference="parallax"),
    "compute_matched": Control(attention="parallax", reference="parallax"),
    "half_width": Control(attention="parallax", reference="parallax"),
    "compute_parameter_matched": Control(attention="parallax", reference="softmax"),
    "parameter_neutral": Control(attention="parallax", reference="softmax"),
    "gated-deltanet": Control(attention="gated-deltanet", reference="softmax"),
    "kda": Control(attention="kda", reference="softmax"),
    "mesanet": Control(attention="mesanet", reference="softmax"),
    "mamba2": Control(attention="mamba2", reference="softmax"),
}


def split_size(size: str) -> tuple[str, str | None]:
    """Split a row's name into plain size and control (None without), as ("0.6b", "compute_matched")."""
    plain, _, control = size.partition("_")
    return plain, control or None
