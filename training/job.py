"""torchtitan's JobConfig for a run: the part of it that torchtitan's Trainer reads."""

import torch
from torchtitan.config import JobConfig

from training.run_config import RunConfig

MODEL_NAME = "qwen3_parallax"


def to_job_config(run: RunConfig, world_size: int) -> JobConfig:
    """Fill torchtitan's config; all that it does not name is given to the parts directly.

    Args:
        run: The run.
        world_size: Number of ranks.

    Returns:
        The job; -1 stands for "off" only here, where torchtitan wants it.

    Raises:
        ValueError: metrics.profile_every without a GPU.
    """
    job = JobConfig()
    job.job.dump_folder = run.run.folder
    job.job.description = run.run.name
    job.model.name = MODEL_NAME
    job.model.flavor = run.model.size
    job.training.seq_len = run.training.seq_len
    job.training.steps = run.training.steps
    job.training.local_batch_size = run.training.local_batch_size
    job.training.global_batch_size = run.training.global_batch_size
    job.training.max_norm = run.training.max_grad_norm
    replicate, shard = run.parallelism.degrees(world_size)
    job.parallelism.data_parallel_replicate_degree = replicate
    job.parallelism.data_parallel_shard_degree = shard
    job.compile.enable = False  # models.titan compiles
    job.activation_checkpoint.mode = "none"  # models.titan checkpoints
    job.debug.seed = run.run.seed
    job.debug.deterministic = run.run.deterministic
    job.metrics.log_freq = 1
    job.checkpoint.enable = True
    job.checkpoint.interval = run.checkpoint.every or run.training.steps
    job.checkpoint.keep_latest_k = run.checkpoint.keep or 0
    job.checkpoint.async_mode = "async" if run.checkpoint.async_save else "disabled"
    job.checkpoint.last_save_model_only = False  # a finished run can be continued
    if not torch.cuda.is_available():
        job.comm.trace_buf_size = 0  # the flight recorder is NCCL's
    if run.metrics.profile_every is not None:
        if not torch.cuda.is_available():
            raise ValueError(
                f"metrics.profile_every is {run.metrics.profile_every}, but torchtitan's profiler needs a "
                "GPU; set it to none here"
            )
        job.profiling.enable_profiling = True
        job.profiling.profile_freq = run.metrics.profile_every
        job.profiling.save_traces_folder = "profile"
    return job
