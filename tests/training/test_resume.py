"""What a resumed run takes from its folder."""

from pathlib import Path

import pytest

import config
from errors import UserError
from models.run_folder import RunFolder
from training.resume import (
    check_start,
    find_start,
    remove_partial_checkpoints,
    resume_warnings,
    tokenizer_source,
)
from training.run_config import RunConfig
from training.saved_config import check_model

CONFIG = Path(__file__).parents[2] / "configs" / "debug_softmax_muon.toml"


def load(folder: Path, *words: str) -> RunConfig:
    return config.load(RunConfig, CONFIG, ["--run.folder", str(folder), *words])


def write_run(folder: Path, *words: str) -> None:
    run = RunFolder(folder)
    run.write_config(load(folder, *words))
    run.checkpoint(20).mkdir(parents=True)
    (run.checkpoint(20) / ".metadata").touch()


def test_a_resume_needed_the_hub_for_a_tokenizer_that_the_run_has(tmp_path: Path) -> None:
    name = ("--data.tokenizer", "organization/model")
    assert tokenizer_source(load(tmp_path, *name)) == "organization/model"
    write_run(tmp_path, *name)
    # a run of an earlier version has no copy
    assert tokenizer_source(load(tmp_path, *name)) == "organization/model"
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert tokenizer_source(load(tmp_path, *name)) == tmp_path / "tokenizer"
    # another name is taken at its word; the loader compares the two
    assert tokenizer_source(load(tmp_path, "--data.tokenizer", "other/model")) == "other/model"


def test_a_moved_decay_did_not_name_the_key_that_moved_it(tmp_path: Path) -> None:
    write_run(tmp_path, "--training.steps", "20")
    (warning,) = resume_warnings(load(tmp_path, "--training.steps", "30"), 20)
    assert "training.steps: saved 20, now 30; lr of group" in warning
    # steps after the checkpoint may differ without a word
    assert resume_warnings(load(tmp_path, "--training.steps", "20"), 20) == []


def test_another_window_of_the_shuffle_changed_the_order_in_silence(tmp_path: Path) -> None:
    write_run(tmp_path)
    (warning,) = resume_warnings(load(tmp_path, "--data.shuffle_window", "1024"), 20)
    assert 'data.shuffle_window: saved "none", now 1024' in warning


def test_a_key_that_this_version_no_longer_has_is_a_difference(tmp_path: Path) -> None:
    saved = config.to_table(load(tmp_path))
    check_model(load(tmp_path), saved, tmp_path, "Give another folder")
    saved["model"]["attention"]["soft_cap"] = 30
    with pytest.raises(UserError, match=r"model\.attention\.soft_cap: saved 30, now nothing"):
        check_model(load(tmp_path), saved, tmp_path, "Give another folder")


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.97])
def test_a_config_that_was_cut_gave_a_traceback(kept: float, tmp_path: Path) -> None:
    write_run(tmp_path)
    file = RunFolder(tmp_path).config_file
    text = file.read_text()
    file.write_text(text[: round(kept * len(text))])
    with pytest.raises(UserError, match=r"config\.toml.*restore it, or delete it") as error:
        check_start(load(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("table", ["[model]", "[model.attention]", "[schedule]", "[training]", "[data]"])
def test_a_config_that_was_cut_at_the_end_of_a_line_is_damaged(table: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    run = RunFolder(tmp_path)
    run.metrics_file.touch()
    text = run.config_file.read_text()
    end = text.index("\n", text.index(f"\n{table}") + 1)
    run.config_file.write_text(text[: text.index("\n", end + 1) + 1])
    with pytest.raises(UserError, match=r"config\.toml is damaged, .* no (\[.*)?\[checkpoint\]; restore it"):
        run.read_config()


def test_each_table_that_is_missing_in_a_config_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    file = RunFolder(tmp_path).config_file
    whole = config.to_table(load(tmp_path))
    for name in ("run", "model", "schedule", "training", "data", "checkpoint"):
        file.write_text(config.to_toml({key: table for key, table in whole.items() if key != name}))
        with pytest.raises(UserError, match=rf"config\.toml is damaged, it has no \[{name}\]; restore it"):
            check_start(load(tmp_path))


def test_only_the_folders_of_cut_writes_are_deleted_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    write_run(tmp_path)
    run.checkpoint(30).mkdir()
    (run.checkpoints / "step-0012").mkdir()
    (run.checkpoints / "step-5").write_text("")
    (run.checkpoints / "step-7").symlink_to("nowhere")
    (run.checkpoints / "step-8").symlink_to("step-0012")
    remove_partial_checkpoints(run)
    names = {path.name for path in run.checkpoints.iterdir()}
    assert names == {"step-20", "step-0012", "step-5", "step-7", "step-8"}
    assert f"deleting {run.checkpoint(30)}: it has no .metadata" in caplog.text
    for name in ("step-0012", "step-5", "step-7", "step-8"):
        assert f"{run.checkpoints / name} is " in caplog.text
    assert find_start(load(tmp_path)).checkpoint == run.checkpoint(20)
