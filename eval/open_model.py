"""The checkpoint that a command line of evaluation names, opened with its tokenizer."""

import argparse
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.tokenizer import Tokenizer, check_vocabulary
from data.tokenizer_content import describe_other_tokenizer, is_older_fingerprint, same_tokenizer
from errors import UserError, check_at_least_1
from eval.distributed import is_main_rank
from eval.report.run_records import tokenizer_fingerprint
from eval.scoring.language_model import Qwen3Model
from models.checkpoint.load import load_model
from models.run_folder import RunFolder, find_checkpoint, metadata_file, read_run_table
from models.run_tokenizer import find_tokenizer
from tokens import END_OF_DOCUMENT

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A checkpoint that is ready to evaluate.

    Attributes:
        model: The model.
        tokenizer: The run's tokenizer, or that of --tokenizer.
        checkpoint: The folder step-N.
        table: The run's resolved config as tables.
        device: Device of the model.
        dtype: Dtype of its weights.
        is_average: Whether they are the average that training keeps.
    """

    model: Qwen3Model
    tokenizer: Tokenizer
    checkpoint: Path
    table: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    is_average: bool

    @property
    def facts(self) -> dict[str, Any]:
        """What results depend on besides the checkpoint, for results files."""
        return {
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "max_length": self.model.max_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            "average": self.is_average,
        }


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model to a parser."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN",
        help="a run folder, for its newest checkpoint, or one checkpoint/step-N",
    )
    parser.add_argument(
        "--average", action="store_true", help="the average of the weights that training keeps ([average])"
    )
    parser.add_argument("--tokenizer", help="instead of the run's: a folder, a file, or a name on the hub")
    parser.add_argument(
        "--max-length", type=int, help="most tokens of an input (default: the run's training.seq_len)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights (default: bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--token-budget", type=int, default=65536, help="most tokens per batch (default %(default)s)"
    )


@contextmanager
def ranks() -> Iterator[torch.device]:
    """Join the process group of torchrun's ranks, if there are several, and leave it at the end.

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


def _identity(checkpoint: Path, dtype: torch.dtype, *, average: bool) -> str:
    """Hash a checkpoint's path, metadata, file sizes and times, and which weights are read in which dtype."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.iterdir())
    metadata = hashlib.sha256(metadata_file(checkpoint).read_bytes()).hexdigest()
    facts = (str(checkpoint.resolve()), metadata, files, str(dtype), *(("average",) if average else ()))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _open_tokenizer(chosen: str | None, data: dict[str, Any], run: RunFolder) -> Tokenizer:
    """Load the chosen tokenizer, else the run's own, which must be the one that it was trained with."""
    place = chosen or find_tokenizer(run, data)
    if place is None:
        raise UserError(f"the config of {run.path} names no tokenizer; give --tokenizer")
    tokenizer = Tokenizer.load(place, end_of_document=data.get("end_of_document", END_OF_DOCUMENT))
    recorded = tokenizer_fingerprint(run)
    if chosen is not None or recorded is None:
        return tokenizer
    if not same_tokenizer(recorded, tokenizer.fingerprint):
        reason = describe_other_tokenizer(recorded, tokenizer.fingerprint)
        raise UserError(
            f"{tokenizer.name} has fingerprint {tokenizer.fingerprint}, but {run.path} was trained with "
            f"another ({reason}) of fingerprint {recorded}: restore that one, or choose one with --tokenizer"
        )
    if is_older_fingerprint(recorded) and is_main_rank():
        logger.warning(
            "%s was trained by an earlier version: only its tokenizer's vocabulary was compared",
            run.path,
        )
    return tokenizer


def open_model(options: argparse.Namespace, device: torch.device) -> OpenedModel:
    """Load the model and the tokenizer that a command line names.

    Args:
        options: From a parser with the options of add_model_arguments.
        device: Device of the model.

    Raises:
        UserError: There is no such checkpoint or tokenizer, they do not fit each other, the run's tokenizer
            has changed since the training, or a number is below 1.
    """
    for name in ("max_length", "token_budget"):
        check_at_least_1(options, name)
    checkpoint = find_checkpoint(options.checkpoint)
    table = read_run_table(checkpoint)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    data, training = table.get("data", {}), table.get("training", {})
    max_length = options.max_length or training.get("seq_len")
    if max_length is None:
        raise UserError(f"the config of {checkpoint} has no training.seq_len; give --max-length")
    tokenizer = _open_tokenizer(options.tokenizer, data, RunFolder.of_checkpoint(checkpoint))
    model = load_model(checkpoint, device=device, dtype=dtype, average=options.average)
    check_vocabulary(tokenizer, model.config.vocab_size)
    identity = _identity(checkpoint, dtype, average=options.average)
    return OpenedModel(
        model=Qwen3Model(model, max_length=max_length, identity=identity),
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        table=table,
        device=device,
        dtype=dtype,
        is_average=options.average,
    )
