"""Tokenizers between runs and Hugging Face folders: the same ids, and the right end of a document."""

import json
from pathlib import Path

import pytest

from config import to_table, to_toml
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.convert.from_hf import convert_from_hf
from models.convert.to_hf import convert_to_hf
from models.run_folder import read_run_table
from models.sizes import ModelSize
from tests.models.test_checkpoint import save_run

transformers = pytest.importorskip("transformers")
QWEN3_TOKENIZER = Path(__file__).parents[4] / "shared" / "data" / "qwen3_tokenizer"


def test_a_trained_runs_tokenizer_goes_with_it(corpus: Path, tmp_path: Path) -> None:
    config = ModelConfig(size="debug", vocab_size=300)
    save_run(tmp_path / "run", config)
    data = {"tokenizer": str(corpus / "tokenizer.json"), "end_of_document": "<|endoftext|>"}
    tables = {"model": to_table(config), "training": {"seq_len": 77}, "data": data}
    (tmp_path / "run" / "config.toml").write_text(to_toml(tables))
    convert_to_hf(tmp_path / "run", tmp_path / "hf")
    ours = Tokenizer.load(corpus)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    text = "a model of attention\nreads 123 keys"
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.eos_token_id == model.generation_config.eos_token_id == ours.end_of_document_id
    assert theirs.pad_token_id == model.generation_config.pad_token_id == ours.end_of_document_id
    assert model.config.eos_token_id == ours.end_of_document_id
    assert model.config.max_position_embeddings == theirs.model_max_length == 77
    # and back: the same tokenizer and end of document
    convert_from_hf(tmp_path / "hf", tmp_path / "again")
    table = read_run_table(tmp_path / "again" / "checkpoint" / "step-0")
    again = Tokenizer.load(table["data"]["tokenizer"], end_of_document=table["data"]["end_of_document"])
    assert again.fingerprint == ours.fingerprint
    assert table["training"]["seq_len"] == 77
    # a converted folder that has moved still knows its tokenizer
    (tmp_path / "again").rename(tmp_path / "moved")
    convert_to_hf(tmp_path / "moved", tmp_path / "hf2")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf2")(text).input_ids == ours.encode(text)
    save_run(tmp_path / "lost", config)
    lost = to_toml({**tables, "data": {"tokenizer": "Qwen/Nothing"}})
    (tmp_path / "lost" / "config.toml").write_text(lost)
    with pytest.raises(ValueError, match=r"tokenizer 'Qwen/Nothing' is neither .* give --tokenizer"):
        convert_to_hf(tmp_path / "lost", tmp_path / "hf3")
    convert_to_hf(tmp_path / "lost", tmp_path / "hf3", tokenizer=corpus)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf3").eos_token == "<|endoftext|>"
    for settings, message in (
        (b"{}", "eos_token_id in .* missing without an eos_token"),
        (None, "no tokenizer.json"),
    ):
        table = json.loads((tmp_path / "hf3" / "config.json").read_text())
        table.pop("eos_token_id", None)
        (tmp_path / "hf3" / "config.json").write_text(json.dumps(table))
        if settings is None:
            (tmp_path / "hf3" / "tokenizer.json").unlink()
        else:
            (tmp_path / "hf3" / "tokenizer_config.json").write_bytes(settings)
        with pytest.raises(ValueError, match=message):
            convert_from_hf(tmp_path / "hf3", tmp_path / "no")


@pytest.mark.skipif(not QWEN3_TOKENIZER.is_dir(), reason="needs the Qwen3 tokenizer")
def test_qwen3s_own_tokenizer_keeps_its_template_and_gets_the_runs_end(tmp_path: Path) -> None:
    config = ModelConfig(
        size="custom",
        custom_size=ModelSize(width=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, mlp_width=4),
        vocab_size=151936,
    )
    save_run(tmp_path / "run", config)
    tables = {"model": to_table(config), "data": {"tokenizer": str(QWEN3_TOKENIZER)}}
    (tmp_path / "run" / "config.toml").write_text(to_toml(tables))
    convert_to_hf(tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("Hello, world!").input_ids == [9707, 11, 1879, 0]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (151643, 151643)
    assert "<|im_start|>user" in theirs.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False
    )
    # a chat model's end is the other one
    table = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"eos_token_id": [151645, 151643]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(table))
    convert_from_hf(tmp_path / "hf", tmp_path / "again")
    assert (
        read_run_table(tmp_path / "again" / "checkpoint" / "step-0")["data"]["end_of_document"]
        == "<|im_end|>"
    )


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(corpus: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "run", ModelConfig(size="debug", vocab_size=50))
    with pytest.raises(ValueError, match=r"the model's vocab_size is 50, but .*tokenizer.json has ids up to"):
        convert_to_hf(tmp_path / "run", tmp_path / "hf", tokenizer=corpus / "tokenizer.json")
