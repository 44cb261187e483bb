"""train.py on a CPU that reads each step one step late, as on a GPU."""

import sys

import train
from training import device

if __name__ == "__main__":
    device.prepare()
    from training import trainer

    trainer.reads_late = lambda device, step_seconds: True
    sys.exit(train.main(sys.argv[1:]))
