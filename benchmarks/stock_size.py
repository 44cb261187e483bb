"""The softmax model of stock torchtitan that a config is compared with: size, vocabulary, row length."""

from typing import NamedTuple, Self

from models.sizes import SIZES, split_size
from training.run_config import RunConfig


class StockSize(NamedTuple):
    """What decides the speed of stock torchtitan's Qwen3; configs of equal sizes share one yardstick.

    A control of the comparison, such as "0.6b_parameter_matched", has the plain size's.
    """

    name: str
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    seq_len: int

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Return the yardstick of a run."""
        model = config.model
        plain = split_size(model.size)[0]
        size = SIZES.get(plain, model.dimensions)
        return cls(
            name=plain,
            width=size.width,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            num_kv_heads=size.num_kv_heads,
            head_dim=size.head_dim,
            mlp_width=size.mlp_width,
            vocab_size=model.vocab_size,
            seq_len=config.training.seq_len,
        )
