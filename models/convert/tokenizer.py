"""The tokenizer's files on their way between a run folder and a Hugging Face folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

Table = dict[str, Any]

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


def take_tokenizer(source: Path, out: Path, eos_token_id: int | None) -> Table | None:
    """Copy a Hugging Face folder's tokenizer for a run.

    Args:
        source: The Hugging Face folder.
        out: The folder to fill, the run's own.
        eos_token_id: What its config.json says.

    Returns:
        The run's [data] keys that go with it; None where the folder has no tokenizer.

    Raises:
        ValueError: The tokenizer is in another format, or nothing says which of its tokens ends a text.
    """
    if not (source / _FILE).is_file():
        if any((source / name).is_file() for name in (*_BESIDE, _SETTINGS)):
            raise ValueError(
                f"{source} has a tokenizer but no {_FILE}; write one with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        return None
    if eos_token_id is None:
        token = _plain_token(_settings(source).get("eos_token"))
    else:
        token = Tokenizer.from_file(str(source / _FILE)).id_to_token(eos_token_id)
    if token is None:
        raise ValueError(
            f"eos_token_id in {source / 'config.json'} is {eos_token_id}, which is no token of {_FILE}, or "
            f"missing without an eos_token in {_SETTINGS}; one of them must name the token that ends a text"
        )
    _copy(source, out)
    return {"tokenizer": str(out.resolve()), "end_of_document": token}


def find_tokenizer(run: Path, data: Table, given: Path | None) -> Path | None:
    """Where a run's tokenizer lies.

    Args:
        run: The run folder.
        data: The run's [data] table, empty where it has none.
        given: What the user names instead.

    Returns:
        A tokenizer.json, or a folder that holds one; None for a run that names no tokenizer.

    Raises:
        ValueError: It isn't there.
    """
    named = given if given is not None else data.get("tokenizer")
    if named is None:
        return None
    # a folder of ours may have moved since it was converted
    places = [Path(named)] if given is not None else [Path(named), run / "tokenizer"]
    for place in places:
        if place.is_file() or (place / _FILE).is_file():
            return place
    raise ValueError(
        f"the tokenizer {str(named)!r} is neither a {_FILE} nor a folder with one; "
        "give --tokenizer, the file or its folder"
    )


def check_ids(tokenizer: Tokenizer, name: str, vocab_size: int) -> None:
    """Refuse a tokenizer whose ids a model has no rows for.

    Args:
        tokenizer: The tokenizer.
        name: What the message calls it.
        vocab_size: Rows of the model's embedding.

    Raises:
        ValueError: It has larger ids.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise ValueError(
            f"the model's vocab_size is {vocab_size}, but {name} has ids up to {largest}; give the tokenizer "
            "that the model was trained with"
        )


def give_tokenizer(
    source: Path, out: Path, *, end_of_document: str, num_positions: int | None, vocab_size: int
) -> tuple[int, int]:
    """Write a Hugging Face folder's tokenizer.

    Args:
        source: From find_tokenizer.
        out: The Hugging Face folder.
        end_of_document: The token that ends a document, which becomes its eos_token.
        num_positions: Tokens of the rows that the model was trained on.
        vocab_size: Rows of the model's embedding.

    Returns:
        The ids of its end and padding tokens.

    Raises:
        ValueError: The tokenizer has no such token, or ids that the model has no rows for.
    """
    file = source / _FILE if source.is_dir() else source
    tokenizer = Tokenizer.from_file(str(file))
    check_ids(tokenizer, str(file), vocab_size)
    eos = tokenizer.token_to_id(end_of_document)
    if eos is None:
        raise ValueError(f"{file} has no token {end_of_document!r}, the run's data.end_of_document")
    settings: Table = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {} if num_positions is None else {"model_max_length": num_positions}
    if source.is_dir():
        settings = _settings(source) or settings
        _copy(source, out)
    else:
        shutil.copyfile(file, out / _FILE)
    pad_token = _plain_token(settings.get("pad_token"))
    pad = None if pad_token is None else tokenizer.token_to_id(pad_token)
    settings |= {"eos_token": end_of_document} | ({"pad_token": end_of_document} if pad is None else {})
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (out / _SETTINGS).write_text(text + "\n", encoding="utf-8")
    return eos, eos if pad is None else pad


def _copy(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in (_FILE, _SETTINGS, *_BESIDE):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _settings(folder: Path) -> Table:
    path = folder / _SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _plain_token(token: str | Table | None) -> str | None:
    """A token by its text; settings hold either that or a table of its properties."""
    return token["content"] if isinstance(token, dict) else token
