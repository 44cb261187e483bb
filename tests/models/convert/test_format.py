"""config.json to ModelConfig and back: published configs, unsupported keys, custom sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch

import config as loader
from config import from_table, to_table, to_toml
from errors import UserError
from models.config import ModelConfig, ParallaxConfig, SoftmaxConfig
from models.convert.format import from_config_json, to_config_json
from models.convert.from_hf import _with_attention
from models.qwen3 import Qwen3
from models.sizes import SIZES, ModelSize
from training.run_config import RunConfig

ROOT = Path(__file__).parents[3]
ODD = ModelSize(width=36, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10, mlp_width=52)
# as published
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_8B = QWEN3_06B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}


def test_published_configs_decode_to_named_or_custom_sizes() -> None:
    small, large = (from_config_json(table) for table in (QWEN3_06B, QWEN3_8B))
    assert small.model == ModelConfig(size="0.6b", vocab_size=151936, rope_theta=1e6)
    assert (small.num_positions, small.eos_token_id) == (40960, 151645)
    assert large.model.size == "custom"
    with torch.device("meta"):
        model = Qwen3(large.model)
    counts = model.num_parameters()
    assert counts["total"] == 8_190_735_360
    assert counts["embedding"] == 2 * 151936 * 4096
    # the embedding's look-up has no FLOPs
    tied = Qwen3(ModelConfig(size="debug", vocab_size=50))
    untied = Qwen3(ModelConfig(size="debug", vocab_size=50, tie_embeddings=False))
    assert tied.num_flops_per_token(64) == untied.num_flops_per_token(64)
    assert untied.num_parameters()["total"] - tied.num_parameters()["total"] == 50 * 128
    for table in (QWEN3_06B, QWEN3_8B):
        theirs = from_config_json(table)
        ids = {"eos_token_id": 151645, "bos_token_id": 151643}
        back = to_config_json(theirs.model, dtype="bfloat16", num_positions=40960, **ids)
        dropped = {"max_window_layers", "sliding_window", "transformers_version"}
        assert {k: v for k, v in table.items() if k not in dropped} == back


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            r"unsupported architecture LlamaForCausalLM",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, r"Qwen3MoeForCausalLM .* wanted Qwen3ForCausalLM"),
        ({"model_type": "qwen2"}, r"wanted Qwen3ForCausalLM \(model_type 'qwen3'\)"),
        ({"attention_bias": True}, "attention_bias is True, wanted False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', wanted 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_scaling is .*yarn"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            "rope_parameters has rope_theta 5.0",
        ),
        ({"rope_theta": None}, "rope_theta is missing"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 20},
            "max_window_layers .* mixes",
        ),
        ({"layer_types": ["sliding_attention"] * 28}, "sliding_window or use_sliding_window is unset"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"num_experts": 8}, "num_experts is not supported"),
        (
            {"num_key_value_heads": 5},
            r": num_attention_heads \(16\) must be a multiple of num_key_value_heads \(5\)",
        ),
        ({"head_dim": 15}, "config.json: head_dim must be even for RoPE, got 15"),
        (
            {"attention_bias": True, "num_experts": 8},
            "attention_bias is True.*; num_experts is not supported",
        ),
    ],
)
def test_unsupported_values_are_listed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_config_json(QWEN3_06B | change)


def test_the_window_is_that_of_all_layers() -> None:
    table = QWEN3_06B | {"use_sliding_window": True, "sliding_window": 128}
    for num_full, window_size in ((0, 128), (28, None)):
        attention = from_config_json(table | {"max_window_layers": num_full}).model.attention
        assert isinstance(attention, SoftmaxConfig)
        assert attention.window_size == window_size
    for num_full in (1, 27):
        with pytest.raises(
            UserError, match=rf"max_window_layers \({num_full}\) mixes {num_full} full_attention"
        ):
            from_config_json(table | {"max_window_layers": num_full})


def test_factors_of_rope_are_refused_whatever_its_type() -> None:
    for scaling in ({"rope_type": "default", "factor": 2.0}, {"type": "linear"}):
        with pytest.raises(UserError, match=r"rope_scaling is .*, wanted rope_type 'default' and no factors"):
            from_config_json(QWEN3_06B | {"rope_scaling": scaling})
    assert from_config_json(QWEN3_06B | {"rope_scaling": {"rope_type": "default", "factor": None}})


def test_keys_left_out_have_the_defaults_of_transformers() -> None:
    without = {k: v for k, v in QWEN3_06B.items() if k not in ("tie_word_embeddings", "initializer_range")}
    found = from_config_json(without)
    assert (found.model.tie_embeddings, found.model.init_std) == (False, 0.02)
    assert from_config_json(without | {"tie_word_embeddings": True}).model.tie_embeddings is True


def test_the_first_of_several_end_of_sequence_tokens_is_the_one() -> None:
    for eos, first in ((7, 7), ([8, 9], 8), (None, None)):
        assert from_config_json(QWEN3_06B | {"eos_token_id": eos}).eos_token_id == first


def test_missing_dimensions_are_listed() -> None:
    table = {k: v for k, v in QWEN3_06B.items() if k not in ("head_dim", "vocab_size")}
    with pytest.raises(UserError, match="head_dim is missing; vocab_size is missing"):
        from_config_json(table)


CUSTOM = [
    "width = 36",
    "num_layers = 3",
    "num_heads = 6",
    "num_kv_heads = 2",
    "head_dim = 10",
    "mlp_width = 52",
]


def test_a_custom_size_is_a_table_of_the_config(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"

    def write(*lines: str, size: str = "custom") -> Path:
        base = f'extends = "{ROOT}/configs/debug_softmax_muon.toml"'
        path.write_text("\n".join([base, "[model]", f'size = "{size}"', *lines]))
        return path

    run = loader.load(RunConfig, write("tie_embeddings = false", "[model.custom_size]", *CUSTOM))
    assert run.model.dimensions == ODD
    assert not run.model.tie_embeddings
    path.write_text(to_toml(run))
    assert loader.load(RunConfig, path) == run
    assert from_table(ModelConfig, to_table(run.model), "test") == run.model
    for lines, size, message in (
        ([], "custom", 'model.size is "custom", so custom_size must be a table'),
        (
            ["[model.custom_size]", *CUSTOM],
            "debug",
            "custom_size requires size = \"custom\", got size 'debug'",
        ),
        (["[model.custom_size]", *CUSTOM[1:]], "custom", "model.custom_size.width: missing; want an integer"),
        (["[model.custom_size]", *CUSTOM, "depth = 3"], "custom", "model.custom_size.depth: unknown key"),
        (
            ["[model.custom_size]", *CUSTOM[:-1], "mlp_width = 0"],
            "custom",
            "mlp_width must be at least 1 and at most 1000000; got 0",
        ),
        (["custom_size = 3"], "custom", "model.custom_size: got 3, want a table"),
    ):
        with pytest.raises(loader.ConfigError) as error:
            loader.load(RunConfig, write(*lines, size=size))
        assert message in str(error.value)
    assert (
        loader.load(RunConfig, write('custom_size = "none"', size="debug")).model.dimensions == SIZES["debug"]
    )


def test_a_probe_keeps_the_window_of_the_softmax_model() -> None:
    model = ModelConfig(size="debug", vocab_size=8, attention=SoftmaxConfig(window_size=7))
    attention = _with_attention(model, "parallax").attention
    assert attention == ParallaxConfig(r_gain_init=0.0, window_size=7)
