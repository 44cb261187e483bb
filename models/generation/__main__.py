"""Generates text from a trained model.

`python -m models.generation --checkpoint runs/0.6b_parallax_muon --prompt "The capital of France is"` streams
the continuation; without --prompt the prompt is read from stdin. Several --prompt are continued as one batch.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from errors import UserError, check_at_least_1, decode_text, run_command
from models.checkpoint.load import load_model, model_config
from models.device import check_device
from models.generation.generate import stream
from models.generation.sampling import Sampling
from models.generation.text_stream import TextStream, stop_at
from models.qwen3 import Qwen3
from models.run_folder import RunFolder, find_checkpoint, read_run_table
from models.run_tokenizer import check_ids, encode_prompt, find_tokenizer, read_tokenizer
from tokens import END_OF_DOCUMENT

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run folder, or one of its checkpoint/step-N"
    )
    parser.add_argument("--average", action="store_true", help="the average of the weights ([average])")
    parser.add_argument("--prompt", action="append", help="repeatable; stdin by default")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="per prompt (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens, at a temperature")
    parser.add_argument("--top-p", type=float, help="nucleus sampling, at a temperature")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument(
        "--stop", action="append", default=[], help="a string that ends the continuation; repeatable"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (the run's own)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N or cpu"
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks: for long texts on a GPU")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="bfloat16 on a GPU, float32 on CPU by default")
    return parser


def load(options: argparse.Namespace) -> tuple[Qwen3, Tokenizer, int]:
    """Load the model, its tokenizer and the id of the end-of-document token.

    Raises:
        UserError: The checkpoint or the tokenizer is not available.
    """
    checkpoint = find_checkpoint(options.checkpoint)
    table = read_run_table(checkpoint)
    data = table.get("data", {})
    file = find_tokenizer(RunFolder.of_checkpoint(checkpoint), data, options.tokenizer)
    if file is None:
        raise UserError(f"the run of {checkpoint} names no tokenizer; give --tokenizer")
    tokenizer = read_tokenizer(file)
    check_ids(tokenizer, str(file), model_config(table, checkpoint).vocab_size)
    end_of_document = data.get("end_of_document", END_OF_DOCUMENT)
    end_id = tokenizer.token_to_id(end_of_document)
    if end_id is None:
        raise UserError(f"{file} has no token {end_of_document!r}, the run's data.end_of_document")
    is_on_gpu = options.device != "cpu"
    if is_on_gpu and torch.device(options.device).index is not None:
        torch.cuda.set_device(options.device)
    dtype = _DTYPES[options.dtype or ("bfloat16" if is_on_gpu else "float32")]
    model = load_model(checkpoint, device=options.device, dtype=dtype, average=options.average)
    return model, tokenizer, end_id


def main() -> None:
    """Run the command line.

    Raises:
        UserError: An option is out of range, or as load.
    """
    options = make_parser().parse_args()
    check_at_least_1(options, "max_new_tokens")
    check_device(options.device)
    sampling = Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    prompts, stops = _texts(options.prompt or [], "--prompt"), _texts(options.stop, "--stop")
    model, tokenizer, end_id = load(options)

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False)

    # the newline that a shell appends to piped text is not part of the prompt
    prompts = prompts or [decode_text(sys.stdin.buffer.read(), "stdin").removesuffix("\n")]
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    stop = stop_at(decode, stops, ids)
    streams = [TextStream(decode, stops, each) for each in ids]
    texts = list(prompts)
    is_single = len(prompts) == 1
    print(prompts[0] if is_single else "", end="", flush=True)
    num_tokens, started, first = 0, time.perf_counter(), None
    for new in stream(
        model,
        [each or [end_id] for each in ids],
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop_ids=(end_id,),
        stop=stop,
        compile_blocks=options.compile,
    ):
        first = first or time.perf_counter()
        num_tokens += len(new)
        for each in new:
            piece = streams[each.row].add(each.token) if each.token != end_id else ""
            texts[each.row] += piece
            print(piece if is_single else "", end="", flush=True)
    finished = time.perf_counter()
    for text_stream, text in zip(streams, texts, strict=True):
        print(text_stream.end() if is_single else f"{text}{text_stream.end()}\n---", flush=True)
    rate = (num_tokens - len(prompts)) / (finished - first) if first and finished > first else float("nan")
    print(
        f"{num_tokens} tokens; first after {(first or finished) - started:.2f} s, then {rate:,.1f} tokens/s",
        file=sys.stderr,
    )


def _texts(words: list[str], option: str) -> list[str]:
    """Return an option's texts; the bytes of a word that is not UTF-8 come as surrogates."""
    return [decode_text(os.fsencode(word), option) for word in words]


if __name__ == "__main__":
    sys.exit(run_command(main))
