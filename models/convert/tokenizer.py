"""The tokenizer's files on their way between a run folder and a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from errors import UserError
from models.run_tokenizer import OTHER_FILES, SETTINGS_FILE, check_ids, copy_tokenizer
from tokens import TOKENIZER_FILE

Table = dict[str, Any]


def take_tokenizer(source: Path, out: Path, eos_token_id: int | None) -> Table | None:
    """Copy a Hugging Face folder's tokenizer for a run.

    Args:
        source: The Hugging Face folder.
        out: The folder to fill, the run's own.
        eos_token_id: What its config.json says.

    Returns:
        The run's [data] keys that go with it; None where the folder has no tokenizer.

    Raises:
        UserError: The tokenizer is in another format, or nothing says which of its tokens ends a text.
    """
    if not (source / TOKENIZER_FILE).is_file():
        if any((source / name).is_file() for name in (*OTHER_FILES, SETTINGS_FILE)):
            raise UserError(
                f"{source} has a tokenizer but no {TOKENIZER_FILE}; write one with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        return None
    if eos_token_id is None:
        token = _plain_token(_settings(source).get("eos_token"))
    else:
        token = Tokenizer.from_file(str(source / TOKENIZER_FILE)).id_to_token(eos_token_id)
    if token is None:
        raise UserError(
            f"eos_token_id in {source / 'config.json'} is {eos_token_id}, which is no token of "
            f"{TOKENIZER_FILE}, or missing without an eos_token in {SETTINGS_FILE}; one of them must name "
            "the token that ends a text"
        )
    copy_tokenizer(source, out)
    return {"tokenizer": str(out.resolve()), "end_of_document": token}


def give_tokenizer(
    source: Path, out: Path, *, end_of_document: str, num_positions: int | None, vocab_size: int
) -> tuple[int, int]:
    """Write a Hugging Face folder's tokenizer.

    Args:
        source: From models.run_tokenizer.find_tokenizer.
        out: The Hugging Face folder.
        end_of_document: The token that ends a document, which becomes its eos_token.
        num_positions: Tokens of the rows that the model was trained on.
        vocab_size: Rows of the model's embedding.

    Returns:
        The ids of its end and padding tokens.

    Raises:
        UserError: The tokenizer has no such token, or ids that the model has no rows for.
    """
    file = source / TOKENIZER_FILE if source.is_dir() else source
    tokenizer = Tokenizer.from_file(str(file))
    check_ids(tokenizer, str(file), vocab_size)
    eos = tokenizer.token_to_id(end_of_document)
    if eos is None:
        raise UserError(f"{file} has no token {end_of_document!r}, the run's data.end_of_document")
    settings: Table = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {} if num_positions is None else {"model_max_length": num_positions}
    if source.is_dir():
        settings = _settings(source) or settings
    copy_tokenizer(source, out)
    pad_token = _plain_token(settings.get("pad_token"))
    pad = None if pad_token is None else tokenizer.token_to_id(pad_token)
    settings |= {"eos_token": end_of_document} | ({"pad_token": end_of_document} if pad is None else {})
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (out / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
    return eos, eos if pad is None else pad


def _settings(folder: Path) -> Table:
    path = folder / SETTINGS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _plain_token(token: str | Table | None) -> str | None:
    """A token by its text; settings hold either that or a table of its properties."""
    return token["content"] if isinstance(token, dict) else token
