"""Mutants of optimizers/."""

from tests.mutate.mutant import Mutant

MUTANTS = [
    Mutant(
        "optimizers/orthogonalize.py",
        "(3.285753657755655, -2.3681294933425376, 0.46449024233003106)",
        "(3.285753657755655, -2.3681294933425376, 0.56449024233003106)",
        "tests/optimizers/test_orthogonalize.py",
    ),
    Mutant(
        "optimizers/exchange.py",
        "layout.row_chunks[senders].argsort())",
        "layout.row_chunks[senders])",
        "tests/optimizers/test_exchange.py",
    ),
]
