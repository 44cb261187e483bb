"""Conversion of a run folder to a Hugging Face folder, one safetensors file in memory at a time."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from config import Table
from errors import UserError
from models.checkpoint.load import SavedWeights, model_config
from models.config import ParallaxConfig
from models.convert.format import PARALLAX_FILES, to_config_json, to_hugging_face
from models.convert.tokenizer import SpecialTokens, export_tokenizer
from models.qwen3 import Qwen3
from models.run_folder import RunFolder, find_checkpoint, read_run_table
from models.run_tokenizer import find_tokenizer
from tokens import END_OF_DOCUMENT


def convert_to_hf(
    source: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    tokenizer: Path | None = None,
    shard_bytes: float = 5e9,
    average: bool = False,
) -> str:
    """Convert a run folder to a folder that transformers loads: stock Qwen3, or modeling_parallax.py.

    Args:
        source: A run folder for its newest checkpoint, or one of its checkpoints.
        out: The folder to write; it must have neither a config.json nor safetensors.
        dtype: Dtype of the written weights; checkpoints of training hold fp32.
        tokenizer: A tokenizer.json or its folder, instead of the run's own.
        shard_bytes: Maximum size of a file; a larger tensor gets a file of its own.
        average: Convert the average of the weights that training keeps ([average]).

    Returns:
        A summary of a few lines.

    Raises:
        UserError: The run has no complete checkpoint, no tokenizer or no average, or out already has a model.
        UnsupportedError: The attention has no counterpart in transformers.
    """
    if (out / "config.json").exists() or any(out.glob("*.safetensors")):
        raise UserError(f"{out} already has a model, or a part of one; give --out another folder")
    if not 1 <= shard_bytes < math.inf:
        raise UserError(f"--shard-gb must be positive and finite, got {shard_bytes / 1e9:g}")
    checkpoint = find_checkpoint(source)
    run, table = RunFolder.of_checkpoint(checkpoint), read_run_table(checkpoint)
    config = model_config(table, checkpoint)
    num_positions = table.get("training", {}).get("seq_len")
    data: Table = table.get("data", {})
    # raises early
    uses_cache = to_config_json(config, dtype=dtype, num_positions=None, eos_token_id=None)["use_cache"]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen3(config).named_parameters()}
    weights = SavedWeights(checkpoint, average=average)
    weights.check(shapes)
    tokenizer_path = find_tokenizer(run, data, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    special: SpecialTokens | None = None
    if tokenizer_path is not None:
        special = export_tokenizer(
            tokenizer_path,
            out,
            end_of_document=data.get("end_of_document", END_OF_DOCUMENT),
            num_positions=num_positions,
            vocab_size=config.vocab_size,
        )
        # any token may pad the end of a shorter text in generated batches
        pad = special.eos if special.pad is None else special.pad
        ids = {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": pad}
        # generate reads it here alone
        _write_json(out / "generation_config.json", {**ids, "use_cache": uses_cache})
    files = _write_weights(weights, shapes, getattr(torch, dtype), out, shard_bytes)
    if isinstance(config.attention, ParallaxConfig):
        for name in PARALLAX_FILES:
            shutil.copyfile(Path(__file__).with_name(name), out / name)
    # written last: a folder with a config is complete
    bos, eos = (None, None) if special is None else (special.bos, special.eos)
    saved = to_config_json(
        config, dtype=dtype, num_positions=num_positions, eos_token_id=eos, bos_token_id=bos
    )
    _write_json(out / "config.json", saved)
    count = sum(shape.numel() for shape in shapes.values())
    source_name = f"the average in {checkpoint.name}" if average else checkpoint.name
    lines = [
        f"{out}: {saved['architectures'][0]}, {count / 1e6:.2f}M parameters of {source_name} in {dtype}, "
        f"{files} safetensors file{'s' if files > 1 else ''}"
    ]
    if special is None:
        lines.append("no tokenizer: the run names none; give --tokenizer to add one")
    elif special.pad is None:
        lines.append(
            f"no pad token: the tokenizer uses all {config.vocab_size} ids of the model; set "
            "tokenizer.pad_token before batches are padded"
        )
    lines += ["load it with trust_remote_code=True"] if "auto_map" in saved else []
    return "\n".join(lines)


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    weights: SavedWeights, shapes: dict[str, torch.Size], dtype: torch.dtype, out: Path, shard_bytes: float
) -> int:
    """Write all weights, and the index of several files; return the number of files."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}"
        written = _write_file(weights, {n: shapes[n] for n in names}, dtype, out / f"{file}.safetensors")
        weight_map |= dict.fromkeys(written, f"{file}.safetensors")
    if len(shards) > 1:
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(out / "model.safetensors.index.json", index)
    return len(shards)


def _write_file(
    weights: SavedWeights, shapes: dict[str, torch.Size], dtype: torch.dtype, path: Path
) -> list[str]:
    """Write a file of weights; return their names in Hugging Face's model."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    weights.load(tensors)
    renamed = to_hugging_face(tensors)
    save_file(renamed, path, metadata={"format": "pt"})
    # save_file makes files that only their owner can read
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    return list(renamed)
