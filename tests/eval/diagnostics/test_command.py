"""The command `python -m eval.diagnostics`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

import config
from errors import UserError
from eval.diagnostics.__main__ import main
from models.config import AttentionConfig, GatedDeltaNetConfig, ParallaxConfig
from models.init import init_weights
from models.qwen3 import Qwen3
from models.run_folder import RunFolder
from tests.training.launch import SMALL
from training.run_config import RunConfig

CONFIGS = Path(__file__).parents[3] / "configs"


def make_run(folder: Path, corpus: Path, attention: AttentionConfig) -> list[str]:
    """Write a run folder with a checkpoint of initial weights; return the options that name it."""
    words = [
        *("--run.folder", str(folder), "--data.tokenizer", str(corpus), "--eval.max_tokens", "400"),
        *("--data.train.files", json.dumps([str(corpus / "train.parquet")])),
        *("--data.validation.files", json.dumps([str(corpus / "validation.parquet")])),
        *("--data.validation_documents", "all", "--model.attention.kind", attention.kind),
    ]
    loaded = config.load(RunConfig, CONFIGS / "debug_softmax_adamw.toml", [*SMALL, *words])
    model = Qwen3(loaded.model)
    init_weights(model, 1)
    RunFolder(folder).write_config(loaded)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    dcp.save(weights, checkpoint_id=RunFolder(folder).checkpoint(3), no_dist=True)
    return ["--checkpoint", str(folder)]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "diagnostics.json").read_text())


def test_values_of_a_checkpoint_are_printed_recorded_and_drawn(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", corpus, ParallaxConfig())
    main([*run, "--out", str(tmp_path / "out"), "--queries", "40"])
    printed = capsys.readouterr().out
    record = read(tmp_path / "out")
    assert record["step"] == 3
    assert record["sample"]["num_queries"] == 40
    assert record["sample"]["num_rows"] == 8
    assert f"40 of {record['sample']['num_candidates']} rows" in printed
    assert printed.count("\n") == 1 + 1 + 4 + 1
    ratios = record["layers"][3]["heads"]["correction_ratio/median"]
    assert f"{sum(ratios) / 4:10.4g}" in printed.splitlines()[5]
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    families = {"correction", "sink", "extremes", "stable_rank", "norms", "by_context"}
    assert drawn == {f"diagnostics_{name}" for name in families}

    main([*run, "--out", str(tmp_path / "all"), "--queries", "all", "--layers", "1", "--set", "full"])
    (layer,) = read(tmp_path / "all")["layers"]
    assert layer["layer"] == 1
    assert {*layer["heads"]["probe_alignment/stderr"]} == {0.0}
    # the training text has other rows
    main([*run, "--out", str(tmp_path / "other"), "--files", str(corpus / "train.parquet")])
    samples = [read(tmp_path / name)["sample"]["tokens_sha256"] for name in ("out", "all", "other")]
    assert samples[0] == samples[1] != samples[2]
    capsys.readouterr()
    main([*run, "--prompt", "the model", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "attention_map_layer_3_head_0.png").exists()


def test_attention_without_weights_over_keys_has_spectra(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", corpus, GatedDeltaNetConfig())
    main([*run, "--out", str(tmp_path / "out")])
    header = capsys.readouterr().out.splitlines()[1]
    assert header.split() == ["layer", *(word for name in "QKVO" for word in ("rank", name))]
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {
        "diagnostics_stable_rank",
        "diagnostics_norms",
    }


def test_bad_options_are_refused(corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", corpus, ParallaxConfig())
    for words, message in (
        (["--queries", "0"], "--queries is '0', must be a number of at least 1"),
        (["--queries", "some"], "--queries is 'some'"),
        (["--prompt", "the"], "give --out DIR"),
        (["--layers", "9"], "has 9, but the model's layers are 0 to 3"),
        (["--out", str(tmp_path / "run" / "config.toml")], "is a file; want a folder"),
        (["--max-length", str(10**12)], r"--max-length is 1000000000000, must be at most \d+"),
    ):
        with pytest.raises(UserError, match=message):
            main([*run, *words])
