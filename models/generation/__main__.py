"""`python -m models.generation --checkpoint RUN --prompt TEXT`: see models/generation/generate.py."""

import sys

from models.generation.generate import main

if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
