"""Mutants of parallax/."""

from tests.mutate.mutant import Mutant

MUTANTS = [
    Mutant(
        "parallax/ops.py",
        "lse = q.new_empty(q.shape[:3], dtype=eager.accumulation_dtype(q.dtype))",
        "lse = q.new_empty(q.shape[:3])",
        "tests/parallax/test_api.py::test_operators_pass_opcheck",
    ),
    Mutant(
        "parallax/local_linear.py",
        "centred_ZSK = k_ZSK - p_ZMS[:, :1] @ k_ZSK",
        "centred_ZSK = k_ZSK",
        "tests/parallax/test_local_linear.py",
    ),
]
