"""How well samples of held-out tokens tell the losses of models, and their differences.

    python -m benchmarks.held_out_sample runs/A runs/B [...] --max-tokens 250000 [--name NAME]

Runs must have the same `data.validation`, tokenizer and length of rows. The loss of each token is measured
once, on the whole set, as `eval.max_tokens = "none"` does. Samples of evenly spaced rows are computed from
these losses: documents in a random order, cut into rows, of which each sample takes those that
`eval.max_tokens` would. For comparison, samples of whole documents: the first ones of random orders; and what
tokens drawn one by one would give: sqrt((1 - n / N) / n) standard deviations of a token's loss.
"""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from config import from_table
from data.config import DataConfig
from data.loading.held_out import HeldOutLoader, evenly_spaced
from data.loading.stream import tokenize
from data.sources.document_sample import DocumentSample
from data.sources.open import open_source
from data.tokenizer import Tokenizer
from errors import run_command
from eval.standard_error import ratio_standard_error
from models.checkpoint.load import load_model
from models.qwen3 import Qwen3
from models.run_folder import RunFolder, find_checkpoint, read_run_table
from models.run_tokenizer import find_tokenizer
from tokens import IGNORE_INDEX

_ROW_SAMPLES = 200
_DOCUMENT_SAMPLES = 2000
_TOKENS = 4096


class Losses(NamedTuple):
    """Of each predicted token in order: the loss in nats of each model `[M, n]`, and its document `[n]`."""

    nats: np.ndarray
    document: np.ndarray

    def means(self, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the models' mean losses over some tokens, `[M]`."""
        return self.nats[:, which].mean(1)

    def by_document(self, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return sums by document: each model's loss and, in the last row, the tokens, `[M + 1, N]`."""
        document = self.document[which]
        sums = [np.bincount(document, nats[which]) for nats in self.nats]
        return np.stack([*sums, np.bincount(document).astype(np.float64)])


@torch.no_grad()
def _measure(models: Sequence[Qwen3], loader: HeldOutLoader, seq_len: int) -> Losses:
    nats, documents = [], []
    for batch in loader:
        losses = [
            model(
                batch.inputs["input"],
                cu_seqlens=batch.inputs.get("cu_seqlens"),
                max_seqlen=seq_len,
                labels_BT=batch.labels,
                reduction="none",
            )
            for model in models
        ]
        is_label = batch.labels.flatten() != IGNORE_INDEX
        nats.append(torch.stack([each.flatten()[is_label] for each in losses]).double().numpy())
        documents.append(batch.documents.flatten()[is_label].numpy())
    return Losses(np.concatenate(nats, axis=1), np.concatenate(documents))


def _read_documents(config: DataConfig, tokenizer: Tokenizer) -> list[np.ndarray]:
    assert config.validation is not None
    source = open_source(
        config.validation, tokenizer_fingerprint=tokenizer.fingerprint, split=config.validation_documents
    )
    rows = tokenize(source.read(repeat=False), tokenizer)
    return [tokens[:].astype(np.int32) for _, tokens in rows if tokens is not None]


def _rows(losses: Losses, lengths: np.ndarray, seq_len: int, max_tokens: int) -> dict[str, Any]:
    """Draw samples of evenly spaced rows.

    Args:
        losses: Of the documents in file order.
        lengths: Their numbers of tokens, of which all but the first are predicted, `[N]`.
        seq_len: Tokens per row.
        max_tokens: Tokens of a sample.
    """
    firsts = np.cumsum(lengths - 1) - (lengths - 1)
    num_rows = math.ceil((lengths.sum() - 1) / seq_len)
    chosen = evenly_spaced(num_rows, math.ceil(max_tokens / seq_len))
    means, errors, counts = [], [], []
    for seed in range(_ROW_SAMPLES):
        order = np.random.default_rng(seed).permutation(len(lengths))
        # the label at place n of the stream is its token n + 1
        ends = np.cumsum(lengths[order])
        places = [np.arange(end - length, end - 1) for end, length in zip(ends, lengths[order], strict=True)]
        tokens = [np.arange(firsts[number], firsts[number] + lengths[number] - 1) for number in order]
        which = np.concatenate(tokens)[chosen[np.concatenate(places) // seq_len]]
        means.append(losses.means(which))
        *sums, per_document = torch.from_numpy(losses.by_document(which))
        errors.append([ratio_standard_error(each, per_document) for each in sums])
        counts.append([len(which), int((per_document > 0).sum())])
    return {"losses": np.array(means), "standard_errors": np.array(errors), "counts": np.array(counts)}


def _documents(sums: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return losses on the first documents of random orders, `[samples, M]`, from sums by document."""
    found = []
    for seed in range(_DOCUMENT_SAMPLES):
        order = np.random.default_rng(seed).permutation(sums.shape[1])
        count = int(np.searchsorted(np.cumsum(sums[-1, order]), max_tokens)) + 1
        drawn = sums[:, order[:count]].sum(1)
        found.append(drawn[:-1] / drawn[-1])
    return np.array(found)


def _errors(rows: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    """Summarize the errors of samples of rows, and of samples of documents."""
    return {
        "rms_of_rows": float(np.sqrt(np.mean(rows**2))),
        "p99_of_rows": float(np.quantile(np.abs(rows), 0.99)),
        "largest_of_rows": float(np.abs(rows).max()),
        "rms_of_documents": float(np.sqrt(np.mean(documents**2))),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Command-line arguments; None for sys.argv[1:].
    """
    parser = make_parser("held_out_sample", __doc__, name="held_out_sample_cpu_202611")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--max-tokens", type=int, nargs="+", required=True)
    options = parse(parser, arguments)
    table = read_run_table(find_checkpoint(options.runs[0]))
    data, seq_len = from_table(DataConfig, table["data"], "config", "data"), table["training"]["seq_len"]
    place = find_tokenizer(RunFolder(options.runs[0]), table["data"])
    assert place is not None
    tokenizer = Tokenizer.load(place, end_of_document=data.end_of_document)
    documents = _read_documents(data, tokenizer)
    models = [load_model(run) for run in options.runs]

    lengths = np.array([len(tokens) for tokens in documents])
    source = DocumentSample(np.concatenate(documents), np.cumsum(lengths), "")
    sizes = {"seq_len": seq_len, "local_batch_size": max(1, _TOKENS // seq_len)}
    losses = _measure(models, HeldOutLoader(source, tokenizer, **sizes), seq_len)
    sums, whole = losses.by_document(), losses.means()
    *nats, tokens = torch.from_numpy(sums)
    words = [*(f"runs/{run.name}" for run in options.runs), "--max-tokens", *map(str, options.max_tokens)]
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.held_out_sample {' '.join(words)}",
        "runs": {run.name: loss for run, loss in zip(options.runs, whole.tolist(), strict=True)},
        "standard_errors": [ratio_standard_error(each, tokens) for each in nats],
        "tokens": len(losses.document),
        "documents": len(documents),
        "row_length": seq_len,
        "vocab_size": tokenizer.vocab_size,
        "samples": {"rows": _ROW_SAMPLES, "documents": _DOCUMENT_SAMPLES},
        "by_max_tokens": {},
    }
    for max_tokens in options.max_tokens:
        rows = _rows(losses, lengths, seq_len, max_tokens)
        off, off_of_documents = rows["losses"] - whole, _documents(sums, max_tokens) - whole
        num_tokens = rows["counts"][:, 0].mean()
        scale = math.sqrt((1 / num_tokens) - 1 / len(losses.document))
        found: dict[str, Any] = {
            "tokens": num_tokens,
            "documents": rows["counts"][:, 1].mean(),
            "standard_errors": rows["standard_errors"].mean(0).tolist(),
            "within_two_standard_errors": (np.abs(off) < 2 * rows["standard_errors"]).mean(0).tolist(),
        }
        for number, run in enumerate(options.runs):
            found[run.name] = _errors(off[:, number], off_of_documents[:, number])
        for a, b in itertools.combinations(range(len(models)), 2):
            found[f"{options.runs[b].name} - {options.runs[a].name}"] = {
                "whole": whole[b] - whole[a],
                **_errors(off[:, b] - off[:, a], off_of_documents[:, b] - off_of_documents[:, a]),
                "rms_of_tokens": (losses.nats[b] - losses.nats[a]).std() * scale,
                "share_within_0.003": float((np.abs(off[:, b] - off[:, a]) < 0.003).mean()),
                "first_20": (off[:20, b] - off[:20, a]).tolist(),
            }
        result["by_max_tokens"][max_tokens] = found
        print(max_tokens, json.dumps(found))
    print(write_result(options.name, result, options.out))


if __name__ == "__main__":
    sys.exit(run_command(main))
