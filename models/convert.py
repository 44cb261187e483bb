"""Names of a softmax model's weights here and in Hugging Face's Qwen3."""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_TO_HUGGING_FACE = {
    r"tok_embeddings\.weight": "model.embed_tokens.weight",
    r"norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"layers\.(\d+)\.attention_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"layers\.(\d+)\.mlp_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"layers\.(\d+)\.attention\.w([qkvo])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"layers\.(\d+)\.attention\.([qk])_norm\.weight": r"model.layers.\1.self_attn.\2_norm.weight",
    r"layers\.(\d+)\.mlp\.(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
}


def to_hugging_face(weights: Mapping[str, T]) -> dict[str, T]:
    """Rename the weights of a softmax model to those of `Qwen3ForCausalLM`.

    Args:
        weights: Values (tensors of any kind) by our names.

    Returns:
        The same values by Hugging Face's names.

    Raises:
        ValueError: A weight has no place in Qwen3, as W_R of Parallax; names it.
    """
    renamed: dict[str, T] = {}
    for name, value in weights.items():
        for pattern, template in _TO_HUGGING_FACE.items():
            match = re.fullmatch(pattern, name)
            if match is not None:
                renamed[match.expand(template)] = value
                break
        else:
            raise ValueError(f"{name} has no place in Hugging Face's Qwen3; only softmax models have")
    return renamed
