"""What --help-config prints, and the document made of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from errors import UserError
from training.config_help import describe_config

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_every_key_of_every_table_has_type_default_and_meaning() -> None:
    text = describe_config()
    for table in ("run", "model.custom_size", "optimizer.groups.NAME", "data.train", "metrics"):
        assert f"## [{table}]" in text
    assert '* `stop_at_step` (an integer or "none"; default "none"): ' in text
    assert "* `seq_len` (an integer; required): " in text
    # keys that the kinds of a source share are described by their base class
    assert text.count("* `min_characters` (") > 1


def test_one_table_and_those_below_it() -> None:
    text = describe_config("model")
    assert text.startswith("## [model]")
    assert '## [model.attention], kind = "parallax"' in text
    assert "[training]" not in text
    with pytest.raises(UserError, match=r"--help-config modle: no such table, wanted one of run, model,"):
        describe_config("modle")


@pytest.mark.parametrize("words", [["--help-config"], ["--help-config", "run"]])
def test_nothing_of_the_help_is_lost_in_a_pipe(words: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=DOCUMENT.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == describe_config(words[1] if words[1:] else None) + "\n"


def test_the_document_is_what_is_printed() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == describe_config() + "\n", (
        "run `python train.py --help-config > docs/configuration.md`"
    )
