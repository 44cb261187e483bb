"""Average the weights of checkpoints, of one run or of several.

`python -m models.average runs/X --last 5 --out runs/X_average` writes the mean of a run's five newest
checkpoints as a run folder that evaluates, generates and converts, and whose weights a training run can start
from (`checkpoint.initial_weights`). Several runs, or several checkpoint/step-N of them, are averaged in the
same way; they should share most of their training, as the branches of one stable run do.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from config import Table, to_table
from errors import UserError, check_at_least_1, check_out, run_command
from models.checkpoint.load import SavedWeights, model_config
from models.checkpoint.write import write_weights
from models.config import FREE_KEYS, ModelConfig
from models.qwen3 import Qwen3
from models.run_folder import RunFolder, find_checkpoint, is_whole, read_run_table, step_of
from models.run_tokenizer import copy_tokenizer, find_tokenizer
from tokens import TOKENIZER_FILE


def average_checkpoints(checkpoints: Sequence[Path], out: Path) -> str:
    """Write the mean of checkpoints' weights, summed in fp64, as a run folder of fp32 weights.

    Its config has the first run's model, data and sequence length, and names the checkpoints.

    Args:
        checkpoints: Two or more folders step-N.
        out: The run folder to write; it must have neither a config.toml nor checkpoints.

    Returns:
        A summary of a few lines.

    Raises:
        UserError: There are fewer than two checkpoints, they are of different architectures or tokenizers, or
            out already has a run.
    """
    run = RunFolder(out)
    if run.config_file.exists() or run.step_folders():
        raise UserError(f"{out} already has a run; give --out another folder")
    if len({path.resolve() for path in checkpoints}) < max(2, len(checkpoints)):
        names = ", ".join(map(str, checkpoints))
        raise UserError(f"got {names}: want two or more different checkpoints; give --last, or several runs")
    table = read_run_table(checkpoints[0])
    config = _common_config(checkpoints)
    tokenizer = _common_tokenizer(checkpoints)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen3(config).named_parameters()}
    saved = [SavedWeights(path) for path in checkpoints]
    for each in saved:
        each.check(shapes)

    def mean(name: str) -> torch.Tensor:
        total = torch.zeros(shapes[name], dtype=torch.float64)
        weight = torch.empty(shapes[name], dtype=torch.float32)
        for each in saved:
            each.load({name: weight})
            total += weight
        return (total / len(saved)).float()

    step = max(step_of(path) or 0 for path in checkpoints)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, run.tokenizer)
    write_weights(run.checkpoint(step), shapes, torch.float32, mean)
    # written last: a folder with a config is complete
    run.write_config(_tables(table, config, checkpoints, out))
    lines = [f"{run.checkpoint(step)}: the mean of {len(checkpoints)} checkpoints"]
    return "\n".join([*lines, *(f"  {path}" for path in checkpoints)])


def newest_checkpoints(path: Path, number: int) -> list[Path]:
    """Return the newest checkpoints of a run, or the one checkpoint that a path is.

    Args:
        path: A run folder, or a checkpoint/step-N.
        number: How many of a run.

    Raises:
        UserError: There are fewer.
    """
    if is_whole(path):
        return [path]
    find_checkpoint(path)  # raises with what is near
    whole = RunFolder(path).whole_checkpoints()
    if len(whole) < number:
        raise UserError(
            f"--last is {number}, but {path} has {len(whole)} checkpoints: give a smaller number; training "
            "keeps checkpoint.keep of them"
        )
    return [whole[step] for step in sorted(whole)[-number:]]


def _common_config(checkpoints: Sequence[Path]) -> ModelConfig:
    """Return the architecture of all checkpoints."""
    configs = [model_config(read_run_table(path), path) for path in checkpoints]
    for path, config in zip(checkpoints, configs, strict=True):
        here, first = _architecture(config), _architecture(configs[0])
        differing = [key for key in here.keys() | first.keys() if here.get(key) != first.get(key)]
        if differing:
            # the kind before what follows from it
            key = min(differing, key=lambda each: (each != "attention.kind", each))
            raise UserError(
                f"{path} has another architecture than {checkpoints[0]}: model.{key} = {here.get(key)}, "
                f"there {first.get(key)}; average checkpoints of one architecture"
            )
    return configs[0]


def _architecture(config: ModelConfig) -> dict[str, str]:
    table = to_table(config)
    attention = table.pop("attention")
    flat = table | {f"attention.{key}": value for key, value in attention.items()}
    return {key: repr(value) for key, value in flat.items() if key.rpartition(".")[2] not in FREE_KEYS}


def _common_tokenizer(checkpoints: Sequence[Path]) -> Path | None:
    """Return the tokenizer of all checkpoints: a file, or a folder with one; None if their runs name none."""
    found: list[tuple[Path | None, bytes]] = []
    for path in checkpoints:
        place = find_tokenizer(RunFolder.of_checkpoint(path), read_run_table(path).get("data", {}))
        file = place / TOKENIZER_FILE if place is not None and place.is_dir() else place
        found.append((place, b"" if file is None else file.read_bytes()))
    for path, (_, content) in zip(checkpoints, found, strict=True):
        if content != found[0][1]:
            raise UserError(
                f"{path} was trained with another tokenizer than {checkpoints[0]}: each row of the embedding "
                "stands for another token; average checkpoints of one tokenizer"
            )
    return found[0][0]


def _tables(table: Table, config: ModelConfig, checkpoints: Sequence[Path], out: Path) -> dict[str, Any]:
    tables: dict[str, Any] = {"run": {"name": out.name, "folder": str(out)}, "model": config}
    tables |= {"data": table["data"]} if "data" in table else {}
    seq_len = table.get("training", {}).get("seq_len")
    tables |= {} if seq_len is None else {"training": {"seq_len": seq_len}}
    return tables | {"averaged": {"checkpoints": [str(path) for path in checkpoints]}}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run folder, or one of its checkpoint/step-N"
    )
    parser.add_argument("--last", type=int, default=1, metavar="N", help="newest checkpoints of each run (1)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder to write")
    return parser.parse_args()


def main() -> None:
    """Run the command line.

    Raises:
        UserError: As newest_checkpoints and average_checkpoints.
    """
    options = _parse()
    check_at_least_1(options, "last")
    check_out(options.out)
    checkpoints = [each for run in options.runs for each in newest_checkpoints(run, options.last)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        print(average_checkpoints(checkpoints, options.out))


if __name__ == "__main__":
    sys.exit(run_command(main))
