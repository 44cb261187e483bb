"""Hugging Face's weight names and config.json, of stock Qwen3 and of modeling_parallax.py."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from errors import UnsupportedError, UserError, check_range
from models.attention.softmax import SoftmaxAttention
from models.config import ModelConfig, ParallaxConfig, SoftmaxConfig
from models.convert.config_types import is_of_type, wrong_types
from models.sizes import SIZES, ModelSize

T = TypeVar("T")
Table = dict[str, Any]

SOFTMAX_ARCHITECTURE, SOFTMAX_TYPE = "Qwen3ForCausalLM", "qwen3"
PARALLAX_ARCHITECTURE, PARALLAX_TYPE = "ParallaxQwen3ForCausalLM", "parallax_qwen3"
PARALLAX_FILES = ("modeling_parallax.py", "attention_parallax.py")

_NAMES = {
    r"tok_embeddings\.weight": "model.embed_tokens.weight",
    r"norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"layers\.(\d+)\.attention_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"layers\.(\d+)\.mlp_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"layers\.(\d+)\.attention\.w([qkvorg])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"layers\.(\d+)\.attention\.wr_(in|out)\.weight": r"model.layers.\1.self_attn.r_\2_proj.weight",
    r"layers\.(\d+)\.attention\.([qkr])_norm\.weight": r"model.layers.\1.self_attn.\2_norm.weight",
    r"layers\.(\d+)\.mlp\.(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
}
_DIMENSIONS = {
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_width",
}
# keys of ModelConfig and HuggingFaceConfig -> keys of config.json
_OTHER_NAMES = {
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "num_positions": "max_position_embeddings",
}
_PROBE_KEYS = [f.name for f in dataclasses.fields(ParallaxConfig) if f.name not in ("kind", "impl")]
# keys with a single supported value
_FIXED: Table = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "quantization_config": None,
}
# keys that change neither weights nor logits
_WITHOUT_EFFECT = {
    *("_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "model_type"),
    *("pad_token_id", "torch_dtype", "transformers_version", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type"),
}
_READ = {
    *(*_DIMENSIONS, "vocab_size", "rms_norm_eps", "initializer_range", "tie_word_embeddings"),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
}


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig:
    """The contents of a config.json.

    Attributes:
        model: The architecture.
        num_positions: max_position_embeddings; None if missing.
        eos_token_id: The end-of-sequence token's id, the first of several; None if missing.
    """

    model: ModelConfig
    num_positions: int | None
    eos_token_id: int | None

    def __post_init__(self) -> None:
        check_range(self, 1, 2**31 - 1, "num_positions")
        check_range(self, 0, 2**31 - 1, "eos_token_id")


def to_hugging_face(weights: Mapping[str, T]) -> dict[str, T]:
    """Rename the weights of a softmax or Parallax model to Hugging Face's names.

    Args:
        weights: Tensors, or any other values, by this project's names.

    Returns:
        The same values by Hugging Face's names.

    Raises:
        UserError: A weight has no counterpart in Hugging Face's model.
    """
    renamed: dict[str, T] = {}
    for name, value in weights.items():
        for pattern, template in _NAMES.items():
            match = re.fullmatch(pattern, name)
            if match is not None:
                renamed[match.expand(template)] = value
                break
        else:
            raise UserError(
                f"{name} has no counterpart in Hugging Face's Qwen3; only softmax and Parallax models convert"
            )
    return renamed


def to_config_json(
    config: ModelConfig,
    *,
    dtype: str,
    num_positions: int | None,
    eos_token_id: int | None,
    bos_token_id: int | None = None,
) -> Table:
    """Encode a model's config as config.json.

    Args:
        config: The [model] table.
        dtype: Dtype of the saved weights, by its name in torch.
        num_positions: Length of the rows in training, in tokens; None for transformers' default.
        eos_token_id: Id of the end-of-document token; None without a tokenizer.
        bos_token_id: Id of the token that starts a text without a prompt; None without a tokenizer.

    Returns:
        JSON values by key.

    Raises:
        UnsupportedError: The attention has no counterpart in transformers.
    """
    size = config.dimensions
    table: Table = {name: getattr(size, field) for name, field in _DIMENSIONS.items()}
    table |= {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,
        # of a window of one key transformers' cache keeps all keys
        "use_cache": getattr(config.attention, "window_size", None) != 1,
    }
    table |= {} if num_positions is None else {"max_position_embeddings": num_positions}
    # no pad_token_id: transformers would give that row of the embedding no gradient
    table |= {} if eos_token_id is None else {"eos_token_id": eos_token_id}
    table |= {} if bos_token_id is None else {"bos_token_id": bos_token_id}
    match config.attention:
        case SoftmaxConfig(window_size=window_size):
            table |= {"architectures": [SOFTMAX_ARCHITECTURE], "model_type": SOFTMAX_TYPE}
            table |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
            table |= {"rope_scaling": None, "use_sliding_window": window_size is not None}
            table |= {} if window_size is None else {"sliding_window": window_size, "max_window_layers": 0}
        case ParallaxConfig():
            module = PARALLAX_FILES[0].removesuffix(".py")
            table |= {"architectures": [PARALLAX_ARCHITECTURE], "model_type": PARALLAX_TYPE}
            table["auto_map"] = {
                "AutoConfig": f"{module}.ParallaxQwen3Config",
                "AutoModel": f"{module}.ParallaxQwen3Model",
                "AutoModelForCausalLM": f"{module}.{PARALLAX_ARCHITECTURE}",
            }
            table |= {name: getattr(config.attention, name) for name in _PROBE_KEYS}
        case _:
            raise UnsupportedError(
                f'models with attention.kind "{config.attention.kind}" cannot be converted to Hugging Face; '
                '"softmax" and "parallax" can'
            )
    return dict(sorted(table.items()))


def from_config_json(table: Table, source: Path | str = "config.json") -> HuggingFaceConfig:
    """Decode a config.json.

    Args:
        table: JSON values by key.
        source: The file, for error messages.

    Returns:
        The architecture; its size is the row of models/sizes.py with these dimensions, or else "custom".

    Raises:
        UserError: The architecture or some of its keys are not supported, or of another type (lists all of
            them), or a value is out of range.
    """
    is_parallax = table.get("model_type") == PARALLAX_TYPE
    problems = wrong_types(table, _PROBE_KEYS if is_parallax else ())
    if problems:
        raise UserError(f"{source} is not supported: {'; '.join(problems)}")
    kind = _architecture(table, source)
    problems = [
        f"{name} is {table[name]!r}, wanted {value!r}"
        for name, value in _FIXED.items()
        if name in table and table[name] != value
    ]
    needed = [name for name in (*_DIMENSIONS, "vocab_size", "rms_norm_eps") if name not in table]
    problems += [f"{name} is missing" for name in needed]
    theta, window_size = _rope_theta(table, problems), _window(table, problems)
    known = {*_FIXED, *_WITHOUT_EFFECT, *_READ, *(_PROBE_KEYS if is_parallax else ())}
    problems += [f"{name} is not supported; remove it if it has no effect" for name in {*table} - known]
    # what save_pretrained writes has both
    if kind == PARALLAX_TYPE and window_size not in (None, table.get("window_size")):
        problems.append(f"sliding_window is {window_size}, window_size {table.get('window_size')}")
    if problems:
        raise UserError(f"{source} is not supported: {'; '.join(sorted(problems))}")
    try:
        return _decode(table, kind, theta, window_size)
    except UserError as error:
        # ours and theirs are the names of the same dimensions
        theirs = {ours: theirs for theirs, ours in _DIMENSIONS.items()} | _OTHER_NAMES
        theirs |= {} if kind == PARALLAX_TYPE else {"window_size": "sliding_window"}
        pattern = rf"(?:(?:model\.)?custom_size\.|attention\.)?\b({'|'.join(theirs)})\b"
        message = re.sub(pattern, lambda match: theirs[match[1]], str(error))
        raise UserError(f"{source}: {message}") from None


def _decode(table: Table, kind: str, theta: float, window_size: int | None) -> HuggingFaceConfig:
    """Decode a config.json whose keys are all known, of the right types and supported."""
    size = ModelSize(**{field: table[name] for name, field in _DIMENSIONS.items()})
    row_name = next((name for name, row in SIZES.items() if row == size), None)
    attention = SoftmaxConfig(window_size=window_size)
    if kind == PARALLAX_TYPE:
        attention = ParallaxConfig(**{name: table[name] for name in _PROBE_KEYS if name in table})
    eos = table.get("eos_token_id")
    model = ModelConfig(
        size=row_name or "custom",
        custom_size=size if row_name is None else None,
        vocab_size=table["vocab_size"],
        tie_embeddings=table.get("tie_word_embeddings", False),
        attention=attention,
        rope_theta=float(theta),
        norm_eps=float(table["rms_norm_eps"]),
        init_std=float(table.get("initializer_range", 0.02)),
    )
    with torch.device("meta"):
        SoftmaxAttention(SoftmaxConfig(), size, model.norm_eps)  # checks the heads
    return HuggingFaceConfig(
        model=model,
        num_positions=table.get("max_position_embeddings"),
        eos_token_id=(eos or [None])[0] if isinstance(eos, list) else eos,
    )


def _architecture(table: Table, source: Path | str) -> str:
    """Return the model_type of a supported architecture."""
    kind = table.get("model_type")
    wanted = {SOFTMAX_TYPE: SOFTMAX_ARCHITECTURE, PARALLAX_TYPE: PARALLAX_ARCHITECTURE}
    architectures = table.get("architectures") or [wanted.get(kind or "", kind)]
    if kind not in wanted or architectures != [wanted[kind]]:
        raise UserError(
            f"{source}: unsupported architecture {', '.join(map(str, architectures))} "
            f"(model_type {kind!r}); wanted {SOFTMAX_ARCHITECTURE} (model_type {SOFTMAX_TYPE!r}), dense, or "
            f"{PARALLAX_ARCHITECTURE}"
        )
    return kind


def _rope_theta(table: Table, problems: list[str]) -> float:
    """Return the base of RoPE; appends to problems if its type or factors are not supported."""
    found = table.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        values = dict(table.get(name) or {})
        rope_type = values.pop("rope_type", values.pop("type", "default"))
        theta = values.pop("rope_theta", found)
        values = {key: value for key, value in values.items() if value is not None}
        if rope_type != "default" or values:
            problems.append(f"{name} is {table[name]!r}, wanted rope_type 'default' and no factors")
        if not is_of_type(theta, float | None):
            problems.append(f"{name} has rope_theta {theta!r}, wanted a number")
            return 0.0
        if found is not None and theta != found:
            problems.append(f"{name} has rope_theta {theta!r}, rope_theta is {found!r}")
        found = theta
    if found is None:
        problems.append("rope_theta is missing")
    return found or 0.0


def _window(table: Table, problems: list[str]) -> int | None:
    """Return the window size, None without one; appends to problems if layers differ."""
    num_layers = table.get("num_hidden_layers", 0)
    window_size = table.get("sliding_window") if table.get("use_sliding_window") else None
    listed = table.get("layer_types")
    if listed:
        field, counts = "layer_types", Counter(listed)
    else:
        limit = table.get("max_window_layers")
        num_full = num_layers if window_size is None or limit is None else min(max(limit, 0), num_layers)
        kinds = {"full_attention": num_full, "sliding_attention": num_layers - num_full}
        field, counts = "max_window_layers", Counter({kind: num for kind, num in kinds.items() if num})
    if len(counts) > 1 or {*counts} - {"full_attention", "sliding_attention"}:
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        problems.append(
            f"{field} ({table.get(field)!r}) mixes {kinds}; wanted one kind, full or sliding, in all layers"
        )
    if listed and len(listed) != num_layers:
        problems.append(f"layer_types has {len(listed)} entries for {num_layers} layers")
    if "sliding_attention" not in counts:
        return None
    if window_size is None:
        problems.append(
            "layer_types has sliding_attention, but sliding_window or use_sliding_window is unset"
        )
    return window_size
