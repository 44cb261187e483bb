"""Conversion of Hugging Face folders to runs and back: same logits, bit-identical weights, errors."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import from_table
from errors import UnsupportedError, UserError, run_command
from models.checkpoint.load import load_model
from models.config import ModelConfig, ParallaxConfig, SoftmaxConfig
from models.convert.__main__ import main
from models.convert.format import to_config_json, to_hugging_face
from models.convert.from_hf import convert_from_hf
from models.convert.to_hf import convert_to_hf
from models.qwen3 import Qwen3
from models.sizes import ModelSize
from tests.models.test_checkpoint import save_run

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[3]
VOCAB = 131
ODD = ModelSize(width=36, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10, mlp_width=52)


def make_theirs(
    folder: Path, *, tied: bool = True, dtype: str = "float32", shards: str = "5GB", **options: Any
) -> Any:
    """A saved random Qwen3 of transformers, whose gains are not one and whose matrices are large."""
    settings = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=ODD.width,
        num_hidden_layers=ODD.num_layers,
        num_attention_heads=ODD.num_heads,
        num_key_value_heads=ODD.num_kv_heads,
        head_dim=ODD.head_dim,
        intermediate_size=ODD.mlp_width,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **options,
    )
    torch.manual_seed(3)
    model = transformers.Qwen3ForCausalLM(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shards)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=settings._attn_implementation
    )


def tokens(batch: int = 2, length: int = 23, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    ("tied", "dtype", "shards"),
    [
        (True, "float32", "5GB"),
        (False, "float32", "20KB"),
        (True, "bfloat16", "20KB"),
        (False, "float16", "5GB"),
    ],
)
def test_hugging_face_to_run_and_back(tied: bool, dtype: Any, shards: str, tmp_path: Path) -> None:
    theirs = make_theirs(tmp_path / "hf", tied=tied, dtype=dtype, shards=shards)
    assert (len([*(tmp_path / "hf").glob("*.safetensors")]) > 3) == (shards == "20KB")
    convert_from_hf(tmp_path / "hf", tmp_path / "run", dtype=dtype)
    ours = load_model(tmp_path / "run")
    assert ours.config.dimensions == ODD
    assert ours.config.size == "custom"
    assert (ours.output.weight is ours.tok_embeddings.weight) == tied
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)
    convert_to_hf(tmp_path / "run", tmp_path / "back", dtype=dtype, shard_bytes=20_000)
    assert len([*(tmp_path / "back").glob("*.safetensors")]) > 3
    assert_same_bits(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "back"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert type(again) is type(theirs)
    assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)


def test_a_sliding_window_in_all_layers_converts_both_ways(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
    theirs = make_theirs(tmp_path / "hf", attn_implementation="eager", **window)
    convert_from_hf(tmp_path / "hf", tmp_path / "run")
    ours = load_model(tmp_path / "run")
    assert ours.config.attention == SoftmaxConfig(window_size=5)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)
    convert_to_hf(tmp_path / "run", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    torch.testing.assert_close(again(tokens()).logits, theirs(tokens()).logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    "attention", [SoftmaxConfig(), ParallaxConfig(r_rank=8, gate="head", r_scale=0.5, num_plain_layers=1)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_run_to_hugging_face_and_back(
    attention: SoftmaxConfig | ParallaxConfig, tied: bool, tmp_path: Path
) -> None:
    config = ModelConfig(
        size="debug", vocab_size=50, attention=attention, tie_embeddings=tied, rope_theta=1e4
    )
    model = save_run(tmp_path / "run", config, step=7)
    convert_to_hf(tmp_path / "run" / "checkpoint" / "step-7", tmp_path / "hf", shard_bytes=400_000)
    # all files have the same permissions
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1
    convert_from_hf(tmp_path / "hf", tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == config
    assert_same_bits(dict(model.state_dict()), dict(again.state_dict()))


def test_a_softmax_model_converts_to_a_trainable_parallax_model_with_the_same_logits(tmp_path: Path) -> None:
    make_theirs(tmp_path / "hf", tied=False)
    convert_from_hf(tmp_path / "hf", tmp_path / "softmax")
    convert_from_hf(tmp_path / "hf", tmp_path / "parallax", attention="parallax", seed=1)
    softmax, parallax = load_model(tmp_path / "softmax"), load_model(tmp_path / "parallax")
    # the correction is zero; two kernels differ by rounding, 4e-6 at logits up to 4.7
    torch.testing.assert_close(parallax(tokens()), softmax(tokens()), atol=1e-5, rtol=1e-6)
    double = (m.double()(tokens()) for m in (parallax, softmax))
    torch.testing.assert_close(*double, atol=1e-12, rtol=0)
    parallax.float().train().requires_grad_(True)
    assert isinstance(parallax.config.attention, ParallaxConfig)
    assert parallax.config.attention.r_gain_init == 0.0
    gains = [p for n, p in parallax.named_parameters() if n.endswith("r_norm.weight")]
    probes = [p for n, p in parallax.named_parameters() if n.endswith("wr.weight")]
    assert all(float(p.detach().std()) == pytest.approx(0.2, rel=0.1) for p in probes)
    optimizer = torch.optim.AdamW(parallax.parameters(), lr=3e-3)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = parallax(tokens()[:, :-1], labels_BT=tokens()[:, 1:]) / 44
        loss.backward()
        losses.append(float(loss.detach()))
        for gain, probe in zip(gains, probes, strict=True):
            assert gain.grad is not None
            assert probe.grad is not None
            assert 0 < gain.grad.abs().max() < float("inf")
            assert bool(probe.grad.abs().max() > 0) == (step > 0)
            assert probe.grad.isfinite().all()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    # W_R depends on the seed
    for seed, same in ((1, True), (2, False)):
        convert_from_hf(tmp_path / "hf", tmp_path / f"seed{seed}", attention="parallax", seed=seed)
        weights = [dict(load_model(tmp_path / f).named_parameters()) for f in ("parallax", f"seed{seed}")]
        assert torch.equal(*(w["layers.0.attention.wr.weight"] for w in weights)) == same
    convert_to_hf(tmp_path / "parallax", tmp_path / "parallax_hf")
    with pytest.raises(UserError, match="--attention softmax would drop W_R"):
        convert_from_hf(tmp_path / "parallax_hf", tmp_path / "no", attention="softmax")


def test_all_wrong_tensors_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    make_theirs(folder)
    weights = load_file(folder / "model.safetensors")
    good = dict(weights)
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(60)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(52, 36, dtype=torch.int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"does not contain the model of its config.json") as error:
        convert_from_hf(folder, tmp_path / "run")
    for part in (
        "model.layers.0.mlp.up_proj.weight is missing",
        "model.norm.weight is missing",
        "q_proj.bias is unexpected",
        "model.layers.1.mlp.up_proj.weight is [3, 3], wanted [52, 36]",
        "model.layers.2.mlp.up_proj.weight has dtype I8, wanted one of F32, BF16, F16",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "run").exists()
    # a saved head of a tied model must equal the embedding
    for head, fits in (
        (good["model.embed_tokens.weight"].clone(), True),
        (torch.zeros(VOCAB, ODD.width), False),
    ):
        save_file({**good, "lm_head.weight": head}, folder / "model.safetensors")
        if fits:
            convert_from_hf(folder, tmp_path / "tied")
            continue
        with pytest.raises(UserError, match=r"tie_word_embeddings is true, but lm_head.weight differs"):
            convert_from_hf(folder, tmp_path / "run")
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        convert_from_hf(folder, tmp_path / "run")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        convert_from_hf(folder, tmp_path / "run")
    make_theirs(tmp_path / "sharded", shards="20KB")
    next((tmp_path / "sharded").glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match=r"lacks files .*: model-00002-of-"):
        convert_from_hf(tmp_path / "sharded", tmp_path / "run")
    with pytest.raises(UserError, match=r"has no config.json; wanted a folder"):
        convert_from_hf(tmp_path, tmp_path / "run")
    with pytest.raises(UserError, match=r"Qwen/Qwen3 is no folder; .*: hf download NAME --local-dir DIR"):
        convert_from_hf(Path("Qwen/Qwen3"), tmp_path / "run")


def test_command_line_and_existing_output_folders(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_theirs(tmp_path / "hf")

    def convert(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["convert", *words])
        return run_command(main)

    words = ["from-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "run"), "--attention", "parallax"]
    assert convert(*words, "--dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    assert "parallax, size custom" in printed
    assert "in bfloat16 (from 35 float32 tensors)" in printed
    assert "those of the new probe, whose gain is 0" in printed
    assert convert(*words) == 2
    assert "already has a run" in capsys.readouterr().err
    back = ["to-hf", str(tmp_path / "run"), "--out", str(tmp_path / "back")]
    assert convert(*back, "--dtype", "float16") == 0
    assert "load it with trust_remote_code=True" in capsys.readouterr().out
    assert {t.dtype for t in all_tensors(tmp_path / "back").values()} == {torch.float16}
    assert convert(*back) == 2
    assert "already has a model" in capsys.readouterr().err
    assert not [w for w in recwarn if "torch.distributed" in str(w.message)]
    with pytest.raises(UserError, match="--shard-gb must be positive"):
        convert_to_hf(tmp_path / "run", tmp_path / "no", shard_bytes=0)
    for size in (math.nan, math.inf):
        with pytest.raises(UserError, match=f"--shard-gb must be positive and finite, got {size}"):
            convert_to_hf(tmp_path / "run", tmp_path / "no", shard_bytes=size)


def test_only_softmax_and_parallax_models_convert(tmp_path: Path) -> None:
    for kind in ("lla", "linear", "value-average"):
        config = from_table(
            ModelConfig, {"size": "debug", "vocab_size": 50, "attention": {"kind": kind}}, "test"
        )
        save_run(tmp_path / kind, config)
        with pytest.raises(UnsupportedError, match=f'"{kind}" cannot be .*; "softmax" and "parallax" can'):
            convert_to_hf(tmp_path / kind, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()


MEASURE = """
import resource, sys
from models.convert.__main__ import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
main()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def peak_growth(*words: str) -> int:
    """Peak memory of a conversion in bytes, memory-mapped files included, above that after its imports."""
    command = [sys.executable, "-c", MEASURE, *words]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return int(printed.splitlines()[-1])


def test_conversion_never_has_the_whole_model_in_memory(tmp_path: Path) -> None:
    size = ModelSize(width=1024, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=128, mlp_width=3072)
    config = ModelConfig(size="custom", custom_size=size, vocab_size=8000)
    (tmp_path / "hf").mkdir()
    saved = to_config_json(config, dtype="float32", num_positions=None, eos_token_id=None)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(saved))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen3(config).named_parameters()}
    weights = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    total = 4 * sum(w.numel() for w in weights.values())
    largest = 4 * max(w.numel() for w in weights.values())
    save_file(to_hugging_face(weights), tmp_path / "hf" / "model.safetensors")
    del weights
    assert total > 400e6
    assert largest < 35e6
    hf, run, back = (str(tmp_path / name) for name in ("hf", "run", "back"))
    # measured with two more layers, 578 MB: 96 and 157 MB, for temporary tensors and libraries
    assert peak_growth("from-hf", hf, "--out", run, "--attention", "parallax") < 4 * largest
    assert peak_growth("to-hf", run, "--out", back, "--shard-gb", "0.1") < 100e6 + 3 * largest
