"""The run's own tokenizer: copied into the run folder when a run starts, and read from there ever after.

The config beside it (`data.tokenizer`) has the name that it came from, which may be on the hub, or gone.
"""

import os
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from config import Table
from errors import UserError
from models.run_folder import RunFolder
from tokens import TOKENIZER_FILE

SETTINGS_FILE = "tokenizer_config.json"
OTHER_FILES = (
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "chat_template.jinja",
)
"""What Hugging Face folders may have beside these two."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files, each of them atomically.

    Args:
        source: A tokenizer.json, or a folder that holds one and, maybe, Hugging Face's other files.
        folder: Where they go; made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [source / name for name in (TOKENIZER_FILE, SETTINGS_FILE, *OTHER_FILES)]
    for file in files if source.is_dir() else [source]:
        if not file.is_file():
            continue
        name = TOKENIZER_FILE if file == source else file.name
        temporary = folder / f"{name}.tmp"
        shutil.copyfile(file, temporary)
        os.replace(temporary, folder / name)


def find_tokenizer(run: RunFolder, data: Table, given: Path | None = None) -> Path | None:
    """Find a run's tokenizer.

    Args:
        run: The run folder.
        data: The run's saved [data] table, empty where it has none.
        given: The user's choice instead of the run's own.

    Returns:
        A tokenizer.json, or a folder that holds one; None for a run that names no tokenizer.

    Raises:
        UserError: It isn't there.
    """
    named = given if given is not None else data.get("tokenizer")
    if named is None:
        return None
    # runs of earlier versions have no tokenizer of their own
    places = [given] if given is not None else [run.tokenizer, Path(named)]
    for place in places:
        if place.is_file() or (place / TOKENIZER_FILE).is_file():
            return place
    if given is not None:
        raise UserError(f"--tokenizer {given} is neither a {TOKENIZER_FILE} nor a folder that holds one")
    raise UserError(
        f"{run.path} has no {run.tokenizer.name}/{TOKENIZER_FILE}, and its data.tokenizer {str(named)!r} is "
        f"neither a {TOKENIZER_FILE} nor a folder that holds one; give --tokenizer, the file or its folder"
    )


def check_ids(tokenizer: Tokenizer, name: str, vocab_size: int) -> None:
    """Refuse a tokenizer whose ids a model has no rows for.

    Args:
        tokenizer: The tokenizer.
        name: Its name in the message.
        vocab_size: Rows of the model's embedding.

    Raises:
        UserError: It has larger ids.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise UserError(
            f"the model's vocab_size is {vocab_size}, but {name} has ids up to {largest}; give the tokenizer "
            "that the model was trained with"
        )
