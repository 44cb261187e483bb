"""train.py on a CPU that traces steps and reads each one step late, as on a GPU; it prints their order."""

import sys
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity

import train
from training import device


def main() -> int:
    """Run train.py with what stands in for a GPU."""
    from training import titan, trainer

    to_job_config, profile = titan.to_job_config, torch.profiler.profile
    optimizer_step, read = trainer.Trainer.optimizer_step, trainer.Trainer.read

    def convert(*arguments: Any) -> Any:
        with mock.patch("torch.cuda.is_available", return_value=True):
            return to_job_config(*arguments)

    def profile_cpu(*, activities: Any, **options: Any) -> Any:
        return profile(activities=[ProfilerActivity.CPU], **options)

    def print_launch(self: Any, data: Any) -> Any:
        print("order: launch", self.step)
        return optimizer_step(self, data)

    def print_read(self: Any, launched: Any) -> Any:
        print("order: read", launched.step)
        return read(self, launched)

    with (
        mock.patch.object(titan, "to_job_config", convert),
        mock.patch.object(torch.profiler, "profile", profile_cpu),
        mock.patch.object(trainer, "reads_late", return_value=True),
        mock.patch.object(trainer.Trainer, "optimizer_step", print_launch),
        mock.patch.object(trainer.Trainer, "read", print_read),
    ):
        return train.main(sys.argv[1:])


if __name__ == "__main__":
    device.prepare()
    sys.exit(main())
