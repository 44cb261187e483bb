"""The model that a command line names, as the evaluation commands take it."""

import argparse
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.tokenizer import Tokenizer, check_vocabulary
from eval.report.run_records import tokenizer_fingerprint
from eval.scoring.language_model import Qwen3Model
from models.checkpoint import load_model
from models.run_folder import RunFolder, find_checkpoint, read_run_table
from models.run_tokenizer import find_tokenizer


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A checkpoint, ready to evaluate.

    Attributes:
        model: The model.
        tokenizer: The run's, or the one that was asked for.
        checkpoint: The checkpoint's folder.
        table: The run's resolved config.
        device: Where the model lies.
        dtype: Of its weights.
    """

    model: Qwen3Model
    tokenizer: Tokenizer
    checkpoint: Path
    table: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def facts(self) -> dict[str, Any]:
        """What results depend on besides the checkpoint, for the files that hold them."""
        return {
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "max_length": self.model.max_length,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model.

    Args:
        parser: Gets them.
    """
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN",
        help="a run folder for its newest checkpoint, or a step-N",
    )
    parser.add_argument("--tokenizer", help="in place of the run's: a folder, a file, or a name on the hub")
    parser.add_argument(
        "--max-length", type=int, help="most tokens to see at once (default: the run's training.seq_len)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights (default: bfloat16 on a GPU)"
    )
    parser.add_argument(
        "--token-budget", type=int, default=65536, help="tokens of a batch (default %(default)s)"
    )


@contextmanager
def ranks() -> Iterator[torch.device]:
    """Join the other ranks, if torchrun started several, for as long as the context lasts.

    Yields:
        This rank's device: a GPU where there is one.
    """
    if not torch.cuda.is_available():
        device, backend = torch.device("cpu"), "gloo"
    else:
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), "nccl"
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    dist.init_process_group(backend)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _identity(checkpoint: Path, dtype: torch.dtype) -> str:
    """A hash of where a checkpoint lies and when it was written."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.iterdir())
    metadata = hashlib.sha256((checkpoint / ".metadata").read_bytes()).hexdigest()
    facts = (str(checkpoint.resolve()), metadata, files, str(dtype))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _open_tokenizer(chosen: str | None, data: dict[str, Any], run: RunFolder) -> Tokenizer:
    """Load the tokenizer that was chosen, else the run's own if the run was trained with it."""
    place = chosen or find_tokenizer(run, data)
    assert place is not None
    tokenizer = Tokenizer.load(place, end_of_document=data["end_of_document"])
    recorded = tokenizer_fingerprint(run)
    if chosen is None and recorded is not None and recorded != tokenizer.fingerprint:
        raise ValueError(
            f"{tokenizer.name} has fingerprint {tokenizer.fingerprint}, but {run.path} was trained with a "
            f"tokenizer of fingerprint {recorded}: put that one back, or name one with --tokenizer on purpose"
        )
    return tokenizer


def open_model(options: argparse.Namespace, device: torch.device) -> OpenedModel:
    """Load what a command line names.

    Args:
        options: Parsed by a parser that `add_model_arguments` was given.
        device: Where the model goes.

    Raises:
        ValueError: There is no such checkpoint or tokenizer, they do not fit each other, the run's tokenizer
            is another one now, or a number is below 1.
    """
    for name in ("max_length", "token_budget"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, must be at least 1")
    checkpoint = find_checkpoint(options.checkpoint)
    table = read_run_table(checkpoint)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    tokenizer = _open_tokenizer(options.tokenizer, table["data"], RunFolder.of_checkpoint(checkpoint))
    model = load_model(checkpoint, device=device, dtype=dtype)
    check_vocabulary(tokenizer, model.config.vocab_size)
    max_length = options.max_length or table["training"]["seq_len"]
    identity = _identity(checkpoint, dtype)
    return OpenedModel(
        model=Qwen3Model(model, max_length=max_length, identity=identity),
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        table=table,
        device=device,
        dtype=dtype,
    )
