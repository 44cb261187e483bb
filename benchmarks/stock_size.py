"""The softmax model of stock torchtitan that a config is compared with: size, vocabulary, row length."""

from dataclasses import dataclass
from typing import Self

from models.sizes import SIZES, ModelSize, split_size
from training.run_config import RunConfig


@dataclass(frozen=True)
class StockSize:
    """What decides the speed of stock torchtitan's Qwen3; configs of equal sizes share one yardstick.

    A control of the comparison, such as "0.6b_parameter_matched", has the plain size's.
    """

    name: str
    size: ModelSize
    vocab_size: int
    seq_len: int

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Return the yardstick of a run."""
        plain = split_size(config.model.size)[0]
        size = SIZES.get(plain, config.model.dimensions)
        return cls(plain, size, config.model.vocab_size, config.training.seq_len)
