"""`python -m models.generation --checkpoint RUN --prompt TEXT`: see models/generation/generate.py."""

import sys

from errors import run_command
from models.generation.generate import main

if __name__ == "__main__":
    sys.exit(run_command(main))
