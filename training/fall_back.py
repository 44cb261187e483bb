"""Resume from the newest good checkpoint where the newest is damaged (checkpoint.fall_back)."""

from pathlib import Path

from eval.distributed import run_on_main_rank
from models.checkpoint.metadata import DamagedCheckpointError
from models.run_folder import RunFolder, step_of
from training import titan
from training.checkpoints import RunCheckpoints
from training.log import logger
from training.resume import StartPoint, find_start
from training.run_config import RunConfig


def load_or_fall_back(checkpointer: RunCheckpoints, config: RunConfig, start: StartPoint) -> StartPoint:
    """Load a checkpoint, or the good one before it.

    Args:
        checkpointer: Loads on all ranks.
        config: The run.
        start: A resume or a branch.

    Returns:
        What was loaded.

    Raises:
        DamagedCheckpointError: The checkpoint is damaged; see fall_back.
    """
    assert start.checkpoint is not None
    try:
        titan.load_checkpoint(checkpointer, start.checkpoint, with_data=not start.restarts_data)
        return start
    except DamagedCheckpointError as error:
        if start.kind != "resume":
            raise
        damage = error
    start = run_on_main_rank(lambda: fall_back(config, damage))
    assert start.checkpoint is not None
    titan.load_checkpoint(checkpointer, start.checkpoint, with_data=True)
    return start


def fall_back(config: RunConfig, damage: DamagedCheckpointError) -> StartPoint:
    """Set aside the damaged checkpoints of a run, so that its newest is a good one.

    Args:
        config: The run; its newest checkpoint is damaged.
        damage: What is damaged there, and the good checkpoint.

    Returns:
        The resume from the good checkpoint.

    Raises:
        DamagedCheckpointError: checkpoint.fall_back is false, or no checkpoint is good.
    """
    if damage.good is None:
        raise DamagedCheckpointError(
            f"{damage}; copy one back, or give this run another run.folder to start over"
        )
    if not config.checkpoint.fall_back:
        raise DamagedCheckpointError(f"{damage}; set checkpoint.fall_back to true to resume from there")
    logger.warning(f"{damage}; resuming from there (checkpoint.fall_back)")
    run = RunFolder(Path(config.run.folder))
    good = step_of(damage.good)
    assert good is not None
    for step, path in run.whole_checkpoints().items():
        if step > good:
            logger.warning(f"renamed {path} to {run.set_aside(path, 'damaged').name}")
    start = find_start(config)
    assert start.checkpoint == damage.good
    return start
