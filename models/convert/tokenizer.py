"""Conversion of tokenizers between run folders and Hugging Face folders."""

import json
from pathlib import Path
from typing import NamedTuple

from config import Table
from errors import UserError
from models.convert.hf_folder import file_in, read_json
from models.run_tokenizer import OTHER_FILES, SETTINGS_FILE, check_ids, copy_tokenizer, read_tokenizer
from tokens import END_OF_DOCUMENT, TOKENIZER_FILE

PAD_TOKEN = "<|pad|>"
"""The pad_token of an export whose tokenizer has none apart from the end-of-document token."""


class SpecialTokens(NamedTuple):
    """The ids that transformers treats apart.

    Attributes:
        bos: What starts a text without a prompt, "<|endoftext|>" or else the end-of-document token, as in
            Qwen3's folders. It is not put in front of a prompt.
        eos: The end-of-document token.
        pad: None if the model has no row for one.
    """

    bos: int
    eos: int
    pad: int | None


def check_tokenizer_files(source: Path) -> None:
    """Check the files of a tokenizer in a folder from outside.

    Raises:
        UserError: One leads out of the folder, or its eos_token is no text.
    """
    for name in (TOKENIZER_FILE, SETTINGS_FILE, *OTHER_FILES):
        file_in(source, name)
    if (source / TOKENIZER_FILE).is_file():
        read_tokenizer(source)
        _token(source, "eos_token")


def import_tokenizer(source: Path, out: Path, eos_token_id: int | None) -> Table | None:
    """Copy the tokenizer of a Hugging Face folder to a run folder.

    Args:
        source: The Hugging Face folder.
        out: The run's tokenizer folder.
        eos_token_id: The eos_token_id of its config.json.

    Returns:
        The run's [data] table with tokenizer and end_of_document; None if the folder has no tokenizer.

    Raises:
        UserError: The tokenizer is in another format, or its end-of-sequence token is not specified.
    """
    if not (source / TOKENIZER_FILE).is_file():
        if any((source / name).is_file() for name in (*OTHER_FILES, SETTINGS_FILE)):
            raise UserError(
                f"{source} has a tokenizer but no {TOKENIZER_FILE}; write one by transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        return None
    if eos_token_id is None:
        token = _token(source, "eos_token")
    else:
        token = read_tokenizer(source).id_to_token(eos_token_id)
    if token is None:
        raise UserError(
            f"eos_token_id in {source / 'config.json'} is {eos_token_id}, which is not a token of "
            f"{TOKENIZER_FILE}, or it is missing and {SETTINGS_FILE} has no eos_token; set one of them to "
            "the end-of-sequence token"
        )
    copy_tokenizer(source, out)
    return {"tokenizer": str(out.resolve()), "end_of_document": token}


def export_tokenizer(
    source: Path, out: Path, *, end_of_document: str, num_positions: int | None, vocab_size: int
) -> SpecialTokens:
    """Write a run's tokenizer to a Hugging Face folder.

    Its pad_token differs from the end-of-document token, since collators take the labels of padding out of
    the loss: that of the run's own settings, or else "<|pad|>", for which the model has a row that no token
    uses. Without such a row there is none.

    Args:
        source: From models.run_tokenizer.find_tokenizer.
        out: The Hugging Face folder.
        end_of_document: The run's end-of-document token, which becomes the eos_token.
        num_positions: Length of the rows in training, in tokens; None if unknown.
        vocab_size: Rows of the model's embedding.

    Returns:
        The ids of the special tokens.

    Raises:
        UserError: The tokenizer lacks the end-of-document token, or has ids beyond vocab_size.
    """
    file = source / TOKENIZER_FILE if source.is_dir() else source
    tokenizer = read_tokenizer(source)
    check_ids(tokenizer, str(file), vocab_size)
    eos = tokenizer.token_to_id(end_of_document)
    if eos is None:
        raise UserError(f"{file} has no token {end_of_document!r}, the run's data.end_of_document")
    settings: Table = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {} if num_positions is None else {"model_max_length": num_positions}
    if source.is_dir():
        settings = _settings(source) or settings
    copy_tokenizer(source, out)
    settings |= {"eos_token": end_of_document}
    settings.pop("pad_token", None)
    token = _token(source, "pad_token") if source.is_dir() else None
    if token is None or token == end_of_document or tokenizer.token_to_id(token) is None:
        token = PAD_TOKEN
        # transformers gives it the same id as it loads the settings
        tokenizer.add_special_tokens([token])
    pad = tokenizer.token_to_id(token)
    pad = pad if pad is not None and pad < vocab_size else None
    settings |= {} if pad is None else {"pad_token": token}
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (out / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
    bos = tokenizer.token_to_id(END_OF_DOCUMENT)
    return SpecialTokens(bos=eos if bos is None else bos, eos=eos, pad=pad)


def _settings(folder: Path) -> Table:
    path = folder / SETTINGS_FILE
    return read_json(path) if path.is_file() else {}


def _token(folder: Path, key: str) -> str | None:
    """Return a token's text; settings contain either the text or a table of properties."""
    found = _settings(folder).get(key)
    token = found.get("content") if isinstance(found, dict) else found
    if found is not None and not isinstance(token, str):
        raise UserError(f"{folder / SETTINGS_FILE}: {key} is {found!r}, wanted a text")
    return token
