"""The tables of `benchmarks.attention`: accuracy, and times in turns and alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.attention_timing import Cell, Pair, Provider

_ERRORS = {"o": "o", "dq": "dQ", "dr": "dR", "dk": "dK", "dv": "dV"}
_COLUMNS = (
    *("T", "attention", "in turns, ms (TFLOP/s)", "times ours", "alone, ms (TFLOP/s)", "times ours"),
    "MiB",
)


def accuracy_header() -> str:
    """Return the first two lines of the table of errors."""
    columns = ["attention", "T", "head width", "key offset", *_ERRORS.values()]
    return "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)


def accuracy_row(row: Mapping[str, Any]) -> str:
    """Format relative norm errors against fp64.

    Args:
        row: "attention", "num_tokens", "head_dim", "key_offset", and the errors by name, some of "o", "dq",
            "dr", "dk" and "dv".
    """
    errors = [f"{row[name]:.4f}" if name in row else "" for name in _ERRORS]
    cells = [row["attention"], row["num_tokens"], row["head_dim"], f"{row['key_offset']:g}", *errors]
    return "| " + " | ".join(map(str, cells)) + " |"


def _times(cell: Cell, times: Pair, products: tuple[int, int]) -> str:
    rates = "/".join(f"{cell.shape.tflops(*pair):.0f}" for pair in zip(products, times, strict=True))
    return f"{times[0]:.2f} + {times[1]:.2f} = {sum(times):.2f} ({rates})"


def _ratio(times: Pair | None, ours: Pair | None) -> str:
    return "" if times is None or ours is None else f"{sum(times) / sum(ours):.2f}"


def _rows(cells: Mapping[str, Cell], providers: Mapping[str, Provider]) -> Iterator[list[str]]:
    """Yield the cells of each provider's row at one shape."""
    for name, cell in cells.items():
        provider = providers[name]
        start = [str(cell.shape.num_tokens), provider.label]
        if cell.error is not None:
            yield [*start, "does not run", "", "", "", ""]
            continue
        # of the same mathematics where both were measured
        ours = cells.get("ours" if provider.is_parallax else "ours_softmax")
        if ours is None or ours.error is not None:
            ours = Cell("ours", cell.shape)
        in_turns = (cell.forward_ms, cell.backward_ms)
        ours_in_turns = (ours.forward_ms, ours.backward_ms) if ours.sum_ms else None
        alone = "" if cell.alone_ms is None else _times(cell, cell.alone_ms, provider.products)
        yield [
            *start,
            *(_times(cell, in_turns, provider.products), _ratio(in_turns, ours_in_turns)),
            *(alone, _ratio(cell.alone_ms, ours.alone_ms)),
            f"{cell.peak_mib:.0f}",
        ]


def format_tables(found: Sequence[Cell], providers: Mapping[str, Provider]) -> str:
    """Format Markdown tables, one per head width and number of heads, with a row per length and provider.

    "times ours" is relative to our Parallax kernels for Parallax, and to our softmax kernels for softmax.

    Args:
        found: The cells.
        providers: The providers by name.
    """
    lines = []
    shapes = list(dict.fromkeys(c.shape for c in found))
    for kind in dict.fromkeys((s.head_dim, s.num_heads, s.num_kv_heads) for s in shapes):
        lines.append(f"\nHead width {kind[0]}, {kind[1]} query and {kind[2]} kv heads:\n")
        lines.append("| " + " | ".join(_COLUMNS) + " |\n|" + "---|" * len(_COLUMNS))
        for shape in (s for s in shapes if (s.head_dim, s.num_heads, s.num_kv_heads) == kind):
            cells = {c.provider: c for c in found if c.shape == shape}
            lines += ["| " + " | ".join(row) + " |" for row in _rows(cells, providers)]
    return "\n".join(lines)
