"""The wandb run of a run folder."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disk import write_text
from errors import UserError
from models.run_folder import RunFolder
from training.log import logger


def start(folder: Path, name: str, resolved_config: Mapping[str, Any]) -> Any:
    """Start the wandb run of a run folder, or continue it after a resume.

    Args:
        folder: The run folder.
        name: Name of the run.
        resolved_config: The whole config of the run.

    Raises:
        UserError: wandb cannot be started.
    """
    import wandb

    # kept in the run folder: a resumed run continues its wandb run, one that starts over gets a new one
    id_file = RunFolder(folder).wandb_id_file
    if id_file.exists() and not id_file.read_text(encoding="utf-8", errors="replace").strip():
        logger.warning(
            f"{id_file} is empty: starting a new wandb run; to continue the former, write its id there"
        )
        id_file.unlink()
    if not id_file.exists() or RunFolder(folder).newest_checkpoint() is None:
        write_text(id_file, secrets.token_hex(4))
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "parallax"),
            name=name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dict(resolved_config),
        )
    except (wandb.Error, ValueError) as error:  # a ValueError: of its variables, such as WANDB_MODE
        raise UserError(
            f"metrics.wandb is true, but wandb does not start ({' '.join(str(error).split())}); log in with "
            "`wandb login`, set WANDB_MODE=offline in the environment, or metrics.wandb to false"
        ) from error
    # wandb's own steps only increase: it would drop the steps that a resumed run repeats
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def log_samples(run: Any, step: int, samples: list[dict[str, str]]) -> None:
    """Log sampled texts.

    Args:
        run: From start.
        step: Completed optimizer steps.
        samples: The "prompt" and the "text" that continues it, for each sample.
    """
    import wandb

    table = wandb.Table(["step", "prompt", "text"])
    for sample in samples:
        table.add_data(step, sample["prompt"], sample["text"])
    run.log({"step": step, "samples": table})
