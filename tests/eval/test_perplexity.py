"""The command `python -m eval.perplexity`: it reads the run's own text or a named one, and checks options."""

import json
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from config import to_table, to_toml
from data.config import ParquetSource
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_byte_level_bpe
from errors import UserError
from eval.perplexity import main
from tests.eval.conftest import build


def make_run(run: Path, corpus: Path, tokenizer: Path) -> None:
    """Write a run folder with a checkpoint of random weights."""
    model = build(vocab_size=304)
    validation = to_table(ParquetSource(files=[str(corpus / "validation.parquet")]))
    data = {"tokenizer": str(tokenizer), "end_of_document": "<|endoftext|>", "validation_documents": "all"}
    table = {
        "model": to_table(model.config),
        "data": {**data, "validation": validation},
        "training": {"seq_len": 48},
    }
    (run / "checkpoint").mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(table))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    dcp.save(weights, checkpoint_id=run / "checkpoint" / "step-2", no_dist=True)


def test_the_command_reads_the_run_s_held_out_text_or_the_named_one(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    make_run(run, corpus, corpus)
    main(["--checkpoint", f"{run}", "--out", f"{tmp_path}/out"])
    own = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert own["stride"] == own["max_length"] == 48
    assert f"{own['loss']:.4f} +/- {own['standard_error']:.4f} nats/token" in capsys.readouterr().out
    main(["--checkpoint", f"{run}", "--files", f"{corpus}/train.parquet", "--stride", "16"])
    assert "of 200 documents" in capsys.readouterr().out
    main(["--checkpoint", f"{run}", "--limit", "3", "--max-tokens", "100000", "--out", f"{tmp_path}/few"])
    few = json.loads((tmp_path / "few" / "perplexity.json").read_text())
    assert (few["limit"], few["max_tokens"], few["num_documents"]) == (3, 100000, 3)
    assert (few["bytes_of"], few["skipped"]) == ("text", {})
    assert f"{few['num_cut_documents']} of 3 documents are longer than max_length" in capsys.readouterr().out
    # no memory for lengths that no document has
    main(["--checkpoint", f"{run}", "--limit", "3", "--max-length", str(10**12), "--out", f"{tmp_path}/long"])
    long = json.loads((tmp_path / "long" / "perplexity.json").read_text())
    assert (long["num_cut_documents"], long["num_tokens"]) == (0, few["num_tokens"])
    assert long["per_position"][-1]["first"] > 48
    for option in ("--limit", "--max-tokens"):
        with pytest.raises(UserError, match=f"{option} is 0, must be at least 1"):
            main(["--checkpoint", f"{run}", option, "0"])
    with pytest.raises(ValueError, match=r"nothing.parquet"):
        main(["--checkpoint", f"{run}", "--files", f"{corpus}/nothing.parquet"])


def test_a_tokenizer_that_has_changed_since_the_training_is_refused_unless_it_is_chosen(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run, other = tmp_path / "run", tmp_path / "other.json"
    make_run(run, corpus, other)
    launches = [{"step": 0, "launch": {"tokenizer_fingerprint": tokenizer.fingerprint}}, {"step": 2}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in launches))
    # a folder with metrics has the config of a training
    with (run / "config.toml").open("a") as config:
        config.write("[run]\n[optimizer]\n[schedule]\n[checkpoint]\n")
    train_byte_level_bpe(["other text of other letters"], 260).save(str(other))
    found = Tokenizer.load(other)
    message = f"{other} has fingerprint {found.fingerprint}, but {run} was .*{tokenizer.fingerprint}"
    with pytest.raises(UserError, match=f"{message}: restore that one, or choose one with --tokenizer"):
        main(["--checkpoint", f"{run}"])
    for name, path, expected in (("a", other, found), ("b", corpus, tokenizer)):
        main(["--checkpoint", f"{run}", "--tokenizer", f"{path}", "--out", f"{tmp_path}/{name}"])
        facts = json.loads((tmp_path / name / "perplexity.json").read_text())
        assert facts["tokenizer_fingerprint"] == expected.fingerprint
        assert facts["dtype"] == "float32"


def test_bad_options_are_refused_before_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    run = ["--checkpoint", f"{tmp_path}/none"]
    for out in (file, file / "below"):
        with pytest.raises(UserError, match=f"--out is {out}, but {file} is a file; want a folder"):
            main([*run, "--out", f"{out}"])
    for words in (["--fles", "a.parquet"], ["--files", "a.parquet", "--strde=3"], ["stray"]):
        with pytest.raises(SystemExit, match="2"):
            main([*run, *words])
        wrong = words[-1] if len(words) != 2 else words[0]
        assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--files GLOB", "--hub-files", "--min-score", "--stride"))
