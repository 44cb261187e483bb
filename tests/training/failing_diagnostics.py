"""train.py whose first measurement of the second layer fails on the last rank."""

import os
import sys
from typing import Any

import train
from eval.diagnostics import collect
from training import device


def break_measurement() -> None:
    """Make the first measurement of layer 1 fail on the last rank, in the middle of the forward."""
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    measure, failed = collect.measure_layer, [False]

    def failing(module: Any, layer: int, *others: Any, **options: Any) -> Any:
        if is_last and layer == 1 and not failed[0]:
            failed[0] = True
            raise RuntimeError("out of memory")
        return measure(module, layer, *others, **options)

    collect.measure_layer = failing


if __name__ == "__main__":
    device.prepare()
    break_measurement()
    os._exit(train.main(sys.argv[1:]))
