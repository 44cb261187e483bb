"""How well samples of held-out tokens tell the losses of models, and their differences.

    python -m benchmarks.held_out_sample runs/A runs/B [...] --max-tokens 250000 [--orders 3] [--name NAME]

Runs must have the same `data.validation`, tokenizer and length of rows. The whole set is measured as
`eval.max_tokens = "none"` does. Samples are evenly spaced rows, as `eval.max_tokens` takes them: of each of
some random orders of the documents, at seven offsets, of which the project uses the middle one. For
comparison, samples of whole documents: the first of random orders, from their losses on the whole set.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.machine import write_result
from config import from_table
from data.config import DataConfig
from data.loading.held_out import HeldOutLoader
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

_OFFSETS = tuple((2 * number + 1) / 14 for number in range(7))
_DOCUMENT_SAMPLES = 2000
_TOKENS = 4096


class Losses(NamedTuple):
    """Of each predicted token: the loss in nats of each model `[M, n]`, its document and its row `[n]`."""

    nats: np.ndarray
    document: np.ndarray
    row: np.ndarray

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
    nats, documents, rows = [], [], []
    num_rows = 0
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
        rows.append(num_rows + is_label.nonzero().flatten().numpy() // seq_len)
        num_rows += batch.labels.numel() // seq_len
    return Losses(np.concatenate(nats, axis=1), np.concatenate(documents), np.concatenate(rows))


def _read_documents(config: DataConfig, tokenizer: Tokenizer) -> list[np.ndarray]:
    assert config.validation is not None
    source = open_source(
        config.validation, tokenizer_fingerprint=tokenizer.fingerprint, split=config.validation_documents
    )
    rows = tokenize(source.read(repeat=False), tokenizer)
    return [tokens[:].astype(np.int32) for _, tokens in rows if tokens is not None]


def _samples(losses: Losses, max_rows: int) -> list[dict[str, Any]]:
    """Take evenly spaced rows at each offset."""
    num_rows = int(losses.row.max()) + 1
    found = []
    for offset in _OFFSETS:
        chosen = ((np.arange(max_rows) + offset) * num_rows / max_rows).astype(np.int64)
        which = np.isin(losses.row, chosen)
        *sums, tokens = torch.from_numpy(losses.by_document(which))
        found.append(
            {
                "offset": offset,
                "tokens": int(tokens.sum()),
                "documents": int((tokens > 0).sum()),
                "losses": losses.means(which).tolist(),
                "standard_errors": [ratio_standard_error(each, tokens) for each in sums],
            }
        )
    return found


def _losses_of_documents(sums: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return losses on the first documents of random orders, `[samples, M]`, from sums by document."""
    found = []
    for seed in range(_DOCUMENT_SAMPLES):
        order = np.random.default_rng(seed).permutation(sums.shape[1])
        count = int(np.searchsorted(np.cumsum(sums[-1, order]), max_tokens)) + 1
        drawn = sums[:, order[:count]].sum(1)
        found.append(drawn[:-1] / drawn[-1])
    return np.array(found)


def _errors(rows: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    def rms(values: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(values))))

    return {"rms": rms(rows), "largest": float(np.abs(rows).max()), "rms_of_documents": rms(documents)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Command-line arguments; None for sys.argv[1:].
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.held_out_sample", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--max-tokens", type=int, nargs="+", required=True)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--name", default="held_out_sample_cpu_202611")
    options = parser.parse_args(arguments)
    table = read_run_table(find_checkpoint(options.runs[0]))
    data, seq_len = from_table(DataConfig, table["data"], "config", "data"), table["training"]["seq_len"]
    place = find_tokenizer(RunFolder(options.runs[0]), table["data"])
    assert place is not None
    tokenizer = Tokenizer.load(place, end_of_document=data.end_of_document)
    documents = _read_documents(data, tokenizer)
    models = [load_model(run) for run in options.runs]

    def measure(order: Sequence[int]) -> Losses:
        ends = np.cumsum([len(documents[number]) for number in order], dtype=np.int64)
        source = DocumentSample(np.concatenate([documents[number] for number in order]), ends, "")
        batch_size = max(1, _TOKENS // seq_len)
        loader = HeldOutLoader(
            source,
            tokenizer,
            seq_len=seq_len,
            local_batch_size=batch_size,
            mask_documents=data.mask_documents,
        )
        return _measure(models, loader, seq_len)

    in_file_order = measure(range(len(documents)))
    orders = []
    for seed in range(options.orders):
        orders.append(measure(np.random.default_rng(seed).permutation(len(documents)).tolist()))
        print(f"order {seed}: {orders[-1].means() - in_file_order.means()} off", flush=True)
    sums, whole = in_file_order.by_document(), in_file_order.means()
    *nats, tokens = torch.from_numpy(sums)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.held_out_sample", *(arguments or sys.argv[1:])]),
        "runs": [run.name for run in options.runs],
        "row_length": seq_len,
        "vocab_size": tokenizer.vocab_size,
        "whole": {
            "tokens": int(tokens.sum()),
            "documents": int((tokens > 0).sum()),
            "losses": whole.tolist(),
            "standard_errors": [ratio_standard_error(each, tokens) for each in nats],
        },
        "by_max_tokens": {},
    }
    for max_tokens in options.max_tokens:
        samples = [each for losses in orders for each in _samples(losses, -(-max_tokens // seq_len))]
        off = np.array([each["losses"] for each in samples]) - whole
        off_of_documents = _losses_of_documents(sums, max_tokens) - whole
        pairs = {}
        for a, b in itertools.combinations(range(len(models)), 2):
            name = f"{options.runs[b].name} - {options.runs[a].name}"
            pairs[name] = {"whole": whole[b] - whole[a]}
            pairs[name] |= _errors(off[:, b] - off[:, a], off_of_documents[:, b] - off_of_documents[:, a])
            print(max_tokens, name, {key: round(value, 5) for key, value in pairs[name].items()})
        single = [_errors(off[:, number], off_of_documents[:, number]) for number in range(len(models))]
        print(max_tokens, single, samples[0]["documents"], samples[0]["standard_errors"])
        result["by_max_tokens"][max_tokens] = {"losses": single, "differences": pairs, "samples": samples}
    print(write_result(options.name, result))


if __name__ == "__main__":
    sys.exit(run_command(main))
