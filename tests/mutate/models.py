"""Mutants of models/."""

from tests.mutate.mutant import Mutant

LOSS = "tests/models/test_loss.py"

MUTANTS = [
    Mutant(
        "models/loss.py",
        "dx = (dx.to(dloss.dtype) * dloss).to(dx.dtype)",
        "dx = dx * dloss.to(dx.dtype)",
        LOSS,
    ),
    Mutant(
        "models/loss.py",
        "dweight = torch.zeros_like(weight_VD, dtype=accumulator) if needs_grad else None",
        "dweight = torch.zeros_like(weight_VD) if needs_grad else None",
        LOSS,
    ),
    Mutant(
        "models/init.py",
        "config.init_std / (2 * config",
        "config.init_std / (1 * config",
        "tests/models/test_qwen3.py",
    ),
    Mutant(
        "models/convert/format.py",
        'table.get("tie_word_embeddings", False)',
        'table.get("tie_word_embeddings", True)',
        "tests/models/convert/test_format.py",
    ),
    Mutant("models/convert/format.py", "eos[0] if", "eos[-1] if", "tests/models/convert/test_format.py"),
]
