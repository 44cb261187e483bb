"""The table of `benchmarks.training`, with tokens/s relative to stock torchtitan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COLUMNS = (
    *("config", "rows of a micro-batch", "tokens/s", "times stock (same rows / its fastest)"),
    *("MFU % (whole rows)", "step s", "data wait %", "peak GiB (dry run)", "first loss", "final loss"),
)


def relative_to_stock(
    row: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> tuple[float | None, float | None]:
    """Return a config's tokens/s relative to stock torchtitan's of its model size.

    Args:
        row: The row of the config.
        rows: All rows.

    Returns:
        The ratio to stock torchtitan in micro-batches of as many rows, and to its fastest; None where that
        was not measured.
    """
    stock = {
        other["rows"]: other["tokens_per_second"]
        for other in rows
        if other["stock_rows"] is not None and other["size"] == row["size"]
    }
    same, best = stock.get(row["rows"]), max(stock.values(), default=None)
    speed = row["tokens_per_second"]
    return same and speed / same, best and speed / best


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows as a Markdown table, configs first, then stock torchtitan.

    Args:
        rows: What `benchmarks.training` writes.
    """
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in rows:
        is_stock = row["stock_rows"] is not None
        ratios = relative_to_stock(row, rows)
        dry_run = row["dry_run_peak_gib"]
        cells = [
            f"stock torchtitan, {row['size']['name']}, softmax, AdamW"
            if is_stock
            else Path(row["config"]).stem,
            str(row["rows"]),
            f"{row['tokens_per_second']:,.0f}",
            "" if is_stock else " / ".join("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
            f"{row.get('mfu_percent', 0):.1f} ({row.get('mfu_whole_rows_percent', 0):.1f})",
            f"{row['step_seconds']:.3f}",
            f"{row['data_wait_percent']:.2f}",
            f"{row['peak_memory_gib']:.1f}" + ("" if dry_run is None else f" ({dry_run:.1f})"),
            f"{row['first_loss']:.3f}",
            f"{row['final_loss']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
