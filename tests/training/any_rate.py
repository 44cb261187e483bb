"""train.py without the range of learning rates, for runs that are to diverge."""

import sys

import optimizers.config
import train

if __name__ == "__main__":
    optimizers.config._check_rates = lambda group: None
    sys.exit(train.main(sys.argv[1:]))
