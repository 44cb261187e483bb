"""Evaluate the loss and the perplexity of a checkpoint on text, by document and by context length.

    python -m eval.perplexity --checkpoint RUN [--stride N] [--as MODE] [--out DIR] [SOURCE]

SOURCE names a text as in `python -m data.shards prepare --help` (`--files`, `--folder`, `--parts` ..);
without it the run's own held-out documents are read. A token's context is its own document. MODE chooses the
predicted tokens:

    documents   all but the first, and the end-of-document token, as in training (the default)
    wikitext    all tokens of the text, after an end-of-document token, as in the harness's WikiText
    last-word   those after the last white space, as in LAMBADA: earlier tokens are context; white space
                behind the word is dropped, documents of one word are skipped and counted
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from data.progress import Progress
from disk import write_text
from errors import UserError, check_at_least_1, check_out, run_command
from eval.distributed import is_main_rank
from eval.open_model import add_model_arguments, open_model, ranks
from eval.scored_text import Mode
from eval.source_options import open_documents, parse_source, source_parser
from eval.text_loss import TextLoss, format_result, text_loss

_PROGRAM = "python -m eval.perplexity"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description=__doc__,
        epilog=f"SOURCE:\n\n{source_parser(_PROGRAM).format_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("--as", dest="mode", choices=get_args(Mode), default="documents", metavar="MODE")
    parser.add_argument("--stride", type=int, help="tokens that a window predicts (default: all that fit)")
    parser.add_argument("--limit", type=int, metavar="N", help="read the first N documents (default: all)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="read the first documents that have N predicted tokens together, the last one whole",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for perplexity.json and perplexity.png")
    return parser


def _import_plot() -> Callable[[TextLoss, Path, str], None]:
    try:
        from eval.text_loss_plot import plot_per_position  # matplotlib is an extra, needed for --out alone
    except ModuleNotFoundError as error:
        raise UserError(
            f"--out includes a plot ({error}): pip install -e '.[eval]', or leave --out away"
        ) from error
    return plot_per_position


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m eval.perplexity --checkpoint RUN`.

    Args:
        arguments: Words of the command line; None for this process's.

    Raises:
        UserError: An option, the checkpoint or the text cannot be used.
    """
    options, words = _parser().parse_known_args(arguments)
    out: Path | None = options.out
    check_out(out)
    for name in ("limit", "max_tokens"):
        check_at_least_1(options, name)
    plot = None if out is None else _import_plot()
    named = parse_source(_PROGRAM, words)
    with ranks() as device:
        opened = open_model(options, device)
        progress = Progress(is_on=is_main_rank())
        progress.start("loss")
        result = text_loss(
            opened.model,
            opened.tokenizer,
            open_documents(opened, named),
            mode=options.mode,
            stride=options.stride,
            limit=options.limit,
            max_tokens=options.max_tokens,
            token_budget=options.token_budget,
            progress=progress,
        )
        progress.close()
        is_writer = is_main_rank()
    if not is_writer:
        return
    print(format_result(result))
    if out is not None and plot is not None:
        out.mkdir(parents=True, exist_ok=True)
        facts = {"checkpoint": str(opened.checkpoint), "source": words, "mode": options.mode, **opened.facts}
        facts |= {"stride": options.stride or opened.model.max_length}
        facts |= {"limit": options.limit, "max_tokens": options.max_tokens}
        text = json.dumps({**facts, **asdict(result)}, indent=1)
        write_text(out / "perplexity.json", text + "\n")
        plot(result, out / "perplexity.png", str(opened.checkpoint))


if __name__ == "__main__":
    sys.exit(run_command(main))
