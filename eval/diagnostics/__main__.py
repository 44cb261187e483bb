"""Measure the attention of a checkpoint: the correction, the attention sink, spectra of the weights.

    python -m eval.diagnostics --checkpoint RUN [--set full] [--queries N] [--out DIR] [SOURCE]
    python -m eval.diagnostics --checkpoint RUN --prompt TEXT [--layer L] [--head H] --out DIR

Without SOURCE it measures the rows that a training run measures, of the run's own held-out documents; SOURCE
names another text as in `python -m data.shards prepare --help` (`--files`, `--folder`, `--parts` ..). It
prints a table by layer, means over heads; DIR gets diagnostics.json, with values of every head, and figures.
`--prompt` draws the weights of one head over the tokens of a text instead. Attention without weights over
keys has spectra alone. docs/diagnostics.md has the definitions.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from config import from_table
from data.config import DataConfig, Source
from data.sources.base import DocumentSource
from data.sources.held_out import open_held_out
from disk import write_text
from errors import UserError, check_out, run_command
from eval.diagnostics.attention_map import plot_map, prompt_map, token_labels
from eval.diagnostics.collect import collect, make_record
from eval.diagnostics.config import DiagnosticsConfig, DiagnosticsSet
from eval.diagnostics.families import FAMILIES, format_layers
from eval.diagnostics.record import Record, compact
from eval.diagnostics.sample import MAX_TOKENS, NUM_QUERIES, QuerySample, draw_queries, num_rows, read_batch
from eval.open_model import OpenedModel, add_model_arguments, open_model, ranks
from eval.source_options import open_documents, parse_source, source_parser
from models.run_folder import RunFolder, step_of

_PROGRAM = "python -m eval.diagnostics"
_RESULTS_FILE = "diagnostics.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description=__doc__,
        epilog=f"SOURCE:\n\n{source_parser(_PROGRAM).format_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("--set", choices=get_args(DiagnosticsSet), default="cheap")
    parser.add_argument("--layers", type=int, nargs="+", metavar="L", help="from 0 (default: all)")
    parser.add_argument(
        "--queries",
        default=str(NUM_QUERIES),
        metavar="N",
        help='rows to sample, or "all" (default %(default)s)',
    )
    parser.add_argument("--prompt", metavar="TEXT", help="draw the attention map of a text")
    parser.add_argument("--layer", type=int, metavar="L", help="of the map (default: the last)")
    parser.add_argument("--head", type=int, default=0, metavar="H", help="of the map (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"for {_RESULTS_FILE} and figures")
    return parser


def _num_queries(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f'--queries is {text!r}, must be a number of at least 1, or "all"')
    return int(text)


def _open_source(opened: OpenedModel, named: Source | None) -> DocumentSource:
    """Open the documents that training measures, or the named ones."""
    table = opened.table.get("data", {})
    if named is not None or table.get("validation", "none") == "none":
        return open_documents(opened, named)
    run = RunFolder.of_checkpoint(opened.checkpoint)
    max_tokens = opened.table.get("eval", {}).get("max_tokens", "none")
    return open_held_out(
        from_table(DataConfig, table, str(run.config_file), "data"),
        opened.tokenizer,
        max_tokens=None if max_tokens == "none" else max_tokens,
        kept_in=run.held_out,
        is_main_rank=True,
    )


def _read_sample(opened: OpenedModel, named: Source | None, num_queries: int | None) -> QuerySample:
    seq_len = opened.model.max_length
    training = opened.table.get("training", {})
    batch_size = training.get("global_batch_size")
    tokens_per_step = MAX_TOKENS if batch_size is None else batch_size * training["seq_len"]
    batch = read_batch(
        _open_source(opened, named),
        opened.tokenizer,
        seq_len=seq_len,
        num_rows=num_rows(seq_len, tokens_per_step),
        mask_documents=opened.table.get("data", {}).get("mask_documents", True),
    )
    return draw_queries(batch, seq_len, num_queries=num_queries)


def _name(opened: OpenedModel) -> str:
    run = RunFolder.of_checkpoint(opened.checkpoint).path.resolve()
    return f"{run.name}, step {step_of(opened.checkpoint)}"


def _draw_map(opened: OpenedModel, options: argparse.Namespace) -> None:
    model = opened.model.qwen3
    layer = model.config.dimensions.num_layers - 1 if options.layer is None else options.layer
    (tokens,) = opened.tokenizer.encode_prompts([options.prompt])
    found = prompt_map(model, tokens, layer=layer, head=options.head)
    path = options.out / f"attention_map_layer_{layer}_head_{options.head}.png"
    title = f"{_name(opened)}, layer {layer}, head {options.head}"
    plot_map(found, token_labels(tokens, opened.tokenizer), title, path)
    print(f"wrote {path}")


def _draw_figures(record: Record, opened: OpenedModel, out: Path) -> None:
    from eval.diagnostics.plots import Arm, plot_by_context, plot_family
    from eval.report.diagnostics_arms import by_context, by_layer, curves_of
    from eval.report.styles import COLORS, MARKERS, Style

    shown = compact(record)
    arm = Arm(
        label=_name(opened),
        style=Style(color=COLORS[0], dash="solid", marker=MARKERS[0], is_main=True),
        by_layer=curves_of(by_layer(shown)),
        by_context=curves_of(by_context(shown)),
    )
    for family in FAMILIES:
        plot_family([arm], family, out / f"{family.file}.png")
    plot_by_context([arm], out / "diagnostics_by_context.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m eval.diagnostics --checkpoint RUN`.

    Args:
        arguments: Words of the command line; None for this process's.

    Raises:
        UserError: An option, the checkpoint or the text cannot be used.
    """
    options, words = _parser().parse_known_args(arguments)
    named = parse_source(_PROGRAM, words)
    num_queries = _num_queries(options.queries)
    settings = DiagnosticsConfig(layers=options.layers, set=options.set)
    if options.prompt is not None and options.out is None:
        raise UserError("--prompt draws a picture: give --out DIR for it")
    check_out(options.out)
    if options.max_length is not None and options.max_length > MAX_TOKENS:
        raise UserError(f"--max-length is {options.max_length}, must be at most {MAX_TOKENS}")
    if options.out is not None:
        _check_plots()
        options.out.mkdir(parents=True, exist_ok=True)
    with ranks() as device:
        opened = open_model(options, device)
        if options.prompt is not None:
            _draw_map(opened, options)
            return
        model = opened.model.qwen3
        settings.check_layers(model.config.dimensions.num_layers)
        sample = _read_sample(opened, named, num_queries)
        record = make_record(
            collect(model, sample, set=settings.set, layers=settings.layers), sample, settings.set
        )
    facts: dict[str, Any] = {"checkpoint": str(opened.checkpoint), "source": words, **opened.facts}
    record = {"step": step_of(opened.checkpoint), **facts, **record}
    print(f"{sample.num_queries} of {sample.num_candidates} rows")
    print(format_layers(compact(record)["values"]))
    if options.out is not None:
        write_text(options.out / _RESULTS_FILE, json.dumps(record) + "\n")
        _draw_figures(record, opened, options.out)
        print(f"wrote {options.out / _RESULTS_FILE} and figures")


def _check_plots() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--out includes figures ({error}): pip install -e '.[eval]', or leave --out away"
        ) from error


if __name__ == "__main__":
    sys.exit(run_command(main))
