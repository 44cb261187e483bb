"""Conversion of a Hugging Face folder of a dense Qwen3 model to a run folder, tensor by tensor."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from errors import MAX_SEED, UserError
from models.checkpoint.write import write_weights
from models.config import ModelConfig, ParallaxConfig
from models.convert.format import from_config_json, to_hugging_face
from models.convert.hf_folder import (
    SavedTensor,
    check_finite,
    file_in,
    read_headers,
    read_json,
    read_tensor,
)
from models.convert.tokenizer import check_tokenizer_files, import_tokenizer
from models.init import InitialWeights
from models.qwen3 import Qwen3
from models.run_folder import RunFolder

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def convert_from_hf(
    source: Path,
    out: Path,
    *,
    attention: Literal["softmax", "parallax"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    seed: int = 0,
) -> str:
    """Convert a Hugging Face folder to a run folder with config.toml, weights in step-0, and the tokenizer.

    With attention "parallax", a softmax model gets a probe whose r_norm gain is 0 and computes the same
    function. Its W_R is drawn as in a new run: at W_R = 0 the norm has no usable gradient (notes of the
    paper, section 1).

    Args:
        source: Folder with config.json (Qwen3ForCausalLM, or written by convert_to_hf) and safetensors.
        out: The run folder to write; it must have neither a config.toml nor checkpoints.
        attention: "parallax" to add a probe to a softmax model; None for the folder's own attention.
        dtype: Dtype of the written weights; training converts any to fp32.
        seed: Seed of W_R.

    Returns:
        A summary of a few lines.

    Raises:
        UserError: config.json is not supported; tensors are missing, unexpected, of other shapes or dtypes,
            NaN or Inf (lists them all); a file leads out of the folder; out already has a run; or the seed is
            out of range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"--seed must be at least 0 and at most {MAX_SEED}, got {seed}")
    run = RunFolder(out)
    if run.config_file.exists() or run.step_folders():
        raise UserError(f"{out} already has a run; give --out another folder")
    if not source.is_dir():
        raise UserError(f"{source} is no folder; first download a model: hf download NAME --local-dir DIR")
    config_path = file_in(source, "config.json")
    if not config_path.is_file():
        raise UserError(
            f"{source} has no config.json; wanted a folder written by transformers' save_pretrained"
        )
    theirs = from_config_json(read_json(config_path), config_path)
    config = _with_attention(theirs.model, attention)
    check_tokenizer_files(source)
    saved, wanted = read_headers(source), getattr(torch, dtype)
    names = _check_tensors(saved, theirs.model, source, wanted)

    def read(name: str) -> torch.Tensor:
        if name in names:
            return read_tensor(saved[names[name]].file, names[name]).to(wanted, copy=True)
        return initial.draw(name).to(wanted)

    with torch.device("meta"):
        initial = InitialWeights(Qwen3(config), seed)
    shapes = {name: p.shape for name, p in initial.parameters.items()}
    data = import_tokenizer(source, run.tokenizer, theirs.eos_token_id)
    write_weights(run.checkpoint(0), shapes, wanted, read)
    tables: dict[str, Any] = {"run": {"name": out.name, "folder": str(out), "seed": seed}}
    tables["model"] = config
    tables |= {} if data is None else {"data": data}
    tables |= {} if theirs.num_positions is None else {"training": {"seq_len": theirs.num_positions}}
    # written last: a folder with a config is complete
    run.write_config(tables)
    return _report(run, config, shapes, dtype, new=shapes.keys() - names.keys(), saved=saved, data=data)


def _with_attention(config: ModelConfig, attention: str | None) -> ModelConfig:
    softmax = config.attention
    if attention is None or attention == softmax.kind:
        return config
    if attention == "softmax":
        raise UserError("--attention softmax would drop W_R: the folder has a Parallax model")
    assert softmax.kind == "softmax"
    return replace(config, attention=ParallaxConfig(r_gain_init=0.0, window_size=softmax.window_size))


def _check_tensors(
    saved: Mapping[str, SavedTensor], config: ModelConfig, source: Path, dtype: torch.dtype
) -> dict[str, str]:
    """Check a folder's tensors, and return Hugging Face's name of every weight by this project's.

    Raises:
        UserError: The tensors do not match the folder's config.json, or are not finite in the dtype; lists
            all of them.
    """
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in Qwen3(config).named_parameters()}
    names = {ours: theirs for ours in shapes for theirs in to_hugging_face({ours: None})}
    wanted = {names[ours]: shape for ours, shape in shapes.items()}
    tied = {_HEAD} if config.tie_embeddings else set()
    wrong = [
        *(f"{name} is missing" for name in wanted if name not in saved),
        *(f"{name} is unexpected" for name in saved if name not in {*wanted, *tied}),
        *(
            f"{name} is {saved[name].shape}, wanted {shape}"
            for name, shape in wanted.items()
            if name in saved and saved[name].shape != shape
        ),
        *(
            f"{name} has dtype {entry.dtype}, wanted one of {', '.join(_DTYPES)}"
            for name, entry in saved.items()
            if entry.dtype not in _DTYPES
        ),
    ]
    if wrong:
        raise UserError(f"{source} does not contain the model of its config.json: {'; '.join(wrong)}")
    check_finite(saved, sorted({*wanted} | (tied & saved.keys())), dtype)
    if tied & saved.keys() and not torch.equal(
        *(read_tensor(saved[name].file, name) for name in (_HEAD, _EMBEDDING))
    ):
        raise UserError(
            f"{source}: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}; set it to false "
            "to keep both, or remove the wrong one"
        )
    return names


def _report(
    run: RunFolder,
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    dtype: str,
    *,
    new: set[str],
    saved: Mapping[str, SavedTensor],
    data: dict[str, str] | None,
) -> str:
    dtypes = Counter(_DTYPES[entry.dtype] for entry in saved.values())
    count = sum(shape.numel() for shape in shapes.values())
    drawn = sum(shapes[name].numel() for name in new)
    lines = [
        f"{run.checkpoint(0)}: {config.attention.kind}, size {config.size}, {count / 1e6:.2f}M "
        f"parameters in {dtype} (from {', '.join(f'{n} {kind} tensors' for kind, n in dtypes.items())})"
    ]
    if drawn:
        lines.append(f"{drawn / 1e6:.2f}M of them are those of the new probe, whose gain is 0")
    if data is None:
        lines.append("no tokenizer.json in the folder: give --tokenizer to commands that read or write text")
    return "\n".join(lines)
