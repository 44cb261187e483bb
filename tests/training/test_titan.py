"""torchtitan's API as used here, private names included: an upgrade that changes one of them fails here."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch._utils
import torch.distributed as dist
import torchtitan.train
from torch.distributed import distributed_c10d
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.profiling import maybe_enable_profiling
from torchtitan.tools.utils import GarbageCollection, get_device_info
from torchtitan.train import Trainer

# what is called or overridden, where, and its parameters; "..." allows more of them, with defaults
SIGNATURES: list[tuple[Callable[..., Any], str, str]] = [
    (register_train_spec, "training/titan.py", "name train_spec"),
    (CheckpointManager._states_to_load, "training/titan.py", "self model_only"),
    (CheckpointManager.dcp_load, "training/titan.py", "self state_dict checkpoint_id from_hf from_quantized"),
    (GarbageCollection.run, "training/titan.py", "self step_count"),
    (GarbageCollection.collect, "training/titan.py", "reason ..."),
    (CheckpointManager.save, "training/checkpoints.py", "self curr_step last_step"),
    (CheckpointManager.close, "training/checkpoints.py", "self"),
    (CheckpointManager._purge_stale_checkpoints, "training/checkpoints.py", "self"),
    (CheckpointManager.maybe_wait_for_staging, "training/trainer.py", "self"),
    (Trainer.__init__, "training/trainer.py", "self job_config"),
    (Trainer.batch_generator, "training/trainer.py", "self data_iterable"),
    (Trainer.close, "training/trainer.py", "self"),
    (maybe_enable_profiling, "training/trainer.py", "profiling_config global_step base_folder ..."),
    (MetricsProcessor.__init__, "training/metrics.py", "self job_config parallel_dims ..."),
    (MetricsProcessor.close, "training/metrics.py", "self"),
    (apply_ac, "models/titan.py", "model ac_config model_compile_enabled ..."),
    (BaseModelArgs.update_from_config, "models/titan.py", "self job_config ..."),
    (BaseModelArgs.get_nparams_and_flops, "models/titan.py", "self model seq_len"),
    (OptimizersContainer.zero_grad, "optimizers/titan.py", "self ..."),
    (BaseDataLoader.__iter__, "data/titan.py", "self"),
]
# attributes, and who reads or replaces them; the function uses or sets all of them
NAMES: list[tuple[Callable[..., Any], str, str]] = [
    (Trainer.__init__, "training/titan.py", "CheckpointManager gc_handler get_train_spec"),
    (
        Trainer.__init__,
        "training/trainer.py",
        "model_parts metrics_processor lr_schedulers optimizers dataloader checkpointer device step",
    ),
    (CheckpointManager.__init__, "training/titan.py", "purge_queue purge_thread"),
    (CheckpointManager.__init__, "training/checkpoints.py", "save_future folder keep_latest_k pg"),
    (CheckpointManager.save, "training/checkpoints.py", "_purge_stale_checkpoints _should_save"),
    (CheckpointManager._should_save, "training/titan.py", "interval load_only"),
    (
        MetricsProcessor.__init__,
        "training/metrics.py",
        "data_loading_times time_last_log device_memory_monitor gpu_peak_flops num_flops_per_token",
    ),
    (Trainer.batch_generator, "training/metrics.py", "data_loading_times"),
    (get_device_info, "training/device.py", "_get_available_device_type _get_device_module"),
    (OptimizersContainer.zero_grad, "optimizers/titan.py", "optimizers"),
]


def label(value: object) -> str | None:
    return value.__qualname__ if inspect.isfunction(value) else None


@pytest.mark.parametrize(("function", "used_in", "parameters"), SIGNATURES, ids=label)
def test_signatures(function: Callable[..., Any], used_in: str, parameters: str) -> None:
    expected = parameters.split()
    found = list(inspect.signature(function).parameters)
    if expected[-1] == "...":
        expected.pop()
        found = found[: len(expected)]
    assert found == expected, (
        f"{used_in} uses {function.__qualname__}({', '.join(expected)}), which has changed"
    )


@pytest.mark.parametrize(("function", "used_in", "names"), NAMES, ids=label)
def test_attributes(function: Callable[..., Any], used_in: str, names: str) -> None:
    missing = {*names.split()} - {*inspect.unwrap(function).__code__.co_names}
    assert not missing, f"{used_in} needs {sorted(missing)}, which {function.__qualname__} no longer has"


def test_train_spec_has_the_builders_that_are_registered() -> None:
    fields = {field.name for field in dataclasses.fields(TrainSpec)}
    parts = ("optimizers", "lr_schedulers", "dataloader", "tokenizer", "loss", "metrics_processor")
    builders = {f"build_{part}_fn" for part in parts}
    assert {"model_cls", "model_args", "parallelize_fn", "pipelining_fn", *builders} <= fields
    assert "build_metrics_processor_fn" in fields


def test_the_checkpoint_manager_is_replaced_where_the_trainer_reads_it() -> None:
    assert inspect.unwrap(Trainer.__init__).__globals__ is vars(torchtitan.train)
    assert inspect.isclass(torchtitan.train.CheckpointManager)


def test_selective_activation_checkpointing_takes_a_list_of_operators() -> None:
    assert "op_sac_save_list" in inspect.signature(apply_ac).parameters
    fields = {field.name for field in dataclasses.fields(ActivationCheckpoint)}
    assert {"mode", "selective_ac_option"} <= fields


def test_torch_has_the_device_look_up_that_is_replaced() -> None:
    for name in ("_get_available_device_type", "_get_device_module"):
        assert callable(getattr(torch._utils, name)), f"training/device.py replaces torch._utils.{name}"


def test_torch_has_the_names_of_process_groups_that_the_rank_monitor_needs() -> None:
    assert callable(getattr(dist.PrefixStore, "clone", None)), "training/device.py clones the store"
    for name in ("_get_default_store", "_set_pg_timeout"):
        assert callable(getattr(distributed_c10d, name)), f"training/device.py calls {name}"
    assert isinstance(distributed_c10d._world.pg_map, dict)
