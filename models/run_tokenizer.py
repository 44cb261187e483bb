"""The run's own tokenizer: copied to the run folder when a run starts, and read from there afterwards.

`data.tokenizer` of the config names its source, which may be on the hub, or may no longer exist.
"""

import shutil
from pathlib import Path

from tokenizers import Tokenizer

from config import Table
from disk import replacing
from errors import UserError, converting_panics
from models.run_folder import RunFolder
from tokens import TOKENIZER_FILE

SETTINGS_FILE = "tokenizer_config.json"
OTHER_FILES = (
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "chat_template.jinja",
)
"""Other files that the tokenizer of a Hugging Face folder may have."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files, each atomically.

    Args:
        source: A tokenizer.json, or a folder with one and possibly Hugging Face's other files.
        folder: The destination; created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [source / name for name in (TOKENIZER_FILE, SETTINGS_FILE, *OTHER_FILES)]
    for file in files if source.is_dir() else [source]:
        if not file.is_file():
            continue
        name = TOKENIZER_FILE if file == source else file.name
        with replacing(folder / name) as temporary:
            shutil.copyfile(file, temporary)


def find_tokenizer(run: RunFolder, data: Table, given: Path | None = None) -> Path | None:
    """Find a run's tokenizer.

    Args:
        run: The run folder.
        data: The run's saved [data] table, possibly empty.
        given: The --tokenizer option, which replaces the run's own tokenizer.

    Returns:
        A tokenizer.json, or a folder with one; None for a run without a data.tokenizer.

    Raises:
        UserError: The tokenizer does not exist.
    """
    named = given if given is not None else data.get("tokenizer")
    if named is None:
        return None
    # runs of earlier versions have no copy of their tokenizer
    places = [given] if given is not None else [run.tokenizer, Path(named)]
    for place in places:
        if place.is_file() or (place / TOKENIZER_FILE).is_file():
            return place
    if given is not None:
        raise UserError(f"--tokenizer {given} is neither a {TOKENIZER_FILE} nor a folder with one")
    raise UserError(
        f"{run.path} has no {run.tokenizer.name}/{TOKENIZER_FILE}, and its data.tokenizer {str(named)!r} is "
        f"neither a {TOKENIZER_FILE} nor a folder with one; give --tokenizer, the file or its folder"
    )


def read_tokenizer(place: Path) -> Tokenizer:
    """Read a tokenizer.

    Args:
        place: A tokenizer.json, or a folder with one.

    Raises:
        UserError: The file is damaged.
    """
    file = place / TOKENIZER_FILE if place.is_dir() else place
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"cannot load {file} as a tokenizer ({error}): restore it") from error


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a prompt, without added special tokens.

    Raises:
        UserError: The tokenizer's regular expressions fail on it.
    """
    with converting_panics("the tokenizer cannot encode the prompt"):
        return tokenizer.encode(text, add_special_tokens=False).ids


def check_ids(tokenizer: Tokenizer, name: str, vocab_size: int) -> None:
    """Check that all ids of a tokenizer are below the model's vocab_size.

    Args:
        tokenizer: The tokenizer.
        name: Its name in the error message.
        vocab_size: Rows of the model's embedding.

    Raises:
        UserError: The tokenizer has larger ids.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise UserError(
            f"the model's vocab_size is {vocab_size}, but {name} has ids up to {largest}; give the tokenizer "
            "that the model was trained with"
        )
