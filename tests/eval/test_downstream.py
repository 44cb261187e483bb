"""The command `python -m eval.downstream`: it prints a table, writes results, and refuses bad options."""

import json
import re
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from config import to_table, to_toml
from data.tokenizer import Tokenizer
from errors import UserError
from eval.downstream import main
from eval.report.task_records import read_results
from eval.task_results import PAPER
from models.qwen3 import Qwen3
from tests.eval.conftest import build


def save_run(folder: Path, tokenizer_folder: Path, model: Qwen3, **data: object) -> None:
    table = {
        "model": to_table(model.config),
        "data": {"tokenizer": str(tokenizer_folder), "end_of_document": "<|endoftext|>", **data},
        "training": {"seq_len": 96},
    }
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(table))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    dcp.save(weights, checkpoint_id=folder / "checkpoint" / "step-7", no_dist=True)


def test_the_command_prints_a_table_and_writes_results(
    tasks_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(vocab_size=304)
    save_run(tmp_path / "run", corpus, model)
    words = ["--checkpoint", f"{tmp_path}/run", "--tasks", "paper", "--data", f"{tasks_folder}"]
    main([*words, "--limit", "4", "--out", f"{tmp_path}/out"])
    printed = capsys.readouterr().out
    assert "mean of eight" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["checkpoint"].endswith("step-7")
    assert results["harness"] == "0.4.13"
    assert results["tokenizer_fingerprint"] == Tokenizer.load(corpus).fingerprint
    assert (results["max_length"], results["dtype"]) == (96, "float32")
    assert set(results["metrics"]) == set(PAPER)
    assert f"{results['mean_accuracy']:.4f}" in printed
    main([*words, "--limit", "4", "--out", f"{tmp_path}/out"])
    assert "were reused from an earlier evaluation" in capsys.readouterr().out
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["metrics"] == results["metrics"]
    assert again["num_tokens"] == 0
    with pytest.raises(UserError, match=r"is no checkpoint"):
        main(["--checkpoint", f"{tmp_path}/none", "--tasks", "paper"])
    with pytest.raises(UserError, match=r"--limit is 0, must be at least 1"):
        main([*words, "--limit", "0"])
    with pytest.raises(UserError, match=r"--num-fewshot is -1, must be at least 0"):
        main([*words, "--num-fewshot", "-1"])


def test_cut_contexts_and_few_shot_examples_are_on_screen_in_results_json_and_in_the_report_s_data(
    tasks_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "run", corpus, build(vocab_size=304))
    data = tmp_path / "data"
    data.mkdir()
    for name in ("sciq", "sciq.train"):
        (data / f"{name}.jsonl").write_text((tasks_folder / "sciq.jsonl").read_text())
    words = ["--checkpoint", f"{tmp_path}/run", "--tasks", "sciq", "--data", f"{data}", "--max-length", "40"]
    main([*words, "--num-fewshot", "3", "--out", f"{tmp_path}/run/eval"])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
    cut = results["cut"]["sciq"]
    assert results["num_fewshot"] == {"sciq": 3}
    assert cut["num_requests"] == cut["num_cut"] == 48
    assert f"sciq: 48 of 48 requests did not fit: {cut['num_dropped']:,} of {cut['num_tokens']:,}" in printed
    assert re.search(r"sciq +acc +[\d.]+ +[\d.]+ +12 +3$", printed, re.MULTILINE)
    (record,), _ = read_results(tmp_path / "run", None)
    assert (record["tasks/sciq/num_cut"], record["tasks/sciq/num_fewshot"]) == (48, 3)
