"""Conversion of tokenizers between runs and Hugging Face folders: same ids, and the end-of-document token."""

import json
from pathlib import Path
from typing import Any

import pytest

from config import to_table, to_toml
from data.tokenizer import Tokenizer
from errors import UserError
from models.config import ModelConfig, SoftmaxConfig
from models.convert.from_hf import convert_from_hf
from models.convert.to_hf import convert_to_hf
from models.convert.tokenizer import export_tokenizer
from models.run_folder import read_run_table
from models.run_tokenizer import copy_tokenizer
from models.sizes import ModelSize
from tests.models.test_checkpoint import save_run

transformers = pytest.importorskip("transformers")
TEXT = "a model of attention\nreads 123 keys"


def save_run_with_data(folder: Path, config: ModelConfig, data: dict[str, Any], **tables: Any) -> None:
    save_run(folder, config)
    (folder / "config.toml").write_text(to_toml({"model": to_table(config), "data": data, **tables}))


def exported_ids(folder: Path) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids


def test_a_local_tokenizer_converts_both_ways(corpus: Path, tmp_path: Path) -> None:
    data = {"tokenizer": str(corpus / "tokenizer.json"), "end_of_document": "<|endoftext|>"}
    config = ModelConfig(size="debug", vocab_size=301)
    save_run_with_data(tmp_path / "run", config, data, training={"seq_len": 77})
    assert "pad token" not in convert_to_hf(tmp_path / "run", tmp_path / "hf")
    ours = Tokenizer.load(corpus)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT).input_ids == ours.encode(TEXT)
    assert theirs.eos_token_id == model.generation_config.eos_token_id == ours.end_of_document_id
    assert theirs.pad_token_id == model.generation_config.pad_token_id == 300
    assert model.config.eos_token_id == model.config.bos_token_id == ours.end_of_document_id
    assert model.generation_config.bos_token_id == ours.end_of_document_id
    # no token in front of a text, and no row of the embedding without a gradient
    assert (theirs.bos_token_id, model.config.pad_token_id) == (None, None)
    assert model.config.max_position_embeddings == theirs.model_max_length == 77
    convert_from_hf(tmp_path / "hf", tmp_path / "again")
    table = read_run_table(tmp_path / "again" / "checkpoint" / "step-0")
    again = Tokenizer.load(table["data"]["tokenizer"], end_of_document=table["data"]["end_of_document"])
    assert again.fingerprint == ours.fingerprint
    assert table["training"]["seq_len"] == 77
    # a converted folder may be moved
    (tmp_path / "again").rename(tmp_path / "moved")
    convert_to_hf(tmp_path / "moved", tmp_path / "hf2")
    assert exported_ids(tmp_path / "hf2") == ours.encode(TEXT)


@pytest.mark.parametrize(("window_size", "has_cache"), [(None, True), (2, True), (1, False)])
def test_generate_reads_beside_a_tokenizer_whether_to_cache(
    window_size: int | None, has_cache: bool, corpus: Path, tmp_path: Path
) -> None:
    config = ModelConfig(size="debug", vocab_size=301, attention=SoftmaxConfig(window_size=window_size))
    save_run_with_data(tmp_path / "run", config, {"tokenizer": str(corpus / "tokenizer.json")})
    convert_to_hf(tmp_path / "run", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.use_cache == model.generation_config.use_cache == has_cache


def test_a_model_without_a_free_row_gets_no_pad_token(corpus: Path, tmp_path: Path) -> None:
    data = {"tokenizer": str(corpus / "tokenizer.json")}
    save_run_with_data(tmp_path / "run", ModelConfig(size="debug", vocab_size=300), data)
    summary = convert_to_hf(tmp_path / "run", tmp_path / "hf")
    assert "no pad token: the tokenizer uses all 300 ids of the model" in summary
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.pad_token_id, len(theirs)) == (None, 300)
    # texts of a generated batch still end
    options = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert options.pad_token_id == options.eos_token_id == 0


def test_a_run_with_the_name_of_a_hub_tokenizer_exports_its_own(corpus: Path, tmp_path: Path) -> None:
    ids = Tokenizer.load(corpus).encode(TEXT)
    data = {"tokenizer": "Nobody/no-such-tokenizer"}
    save_run_with_data(tmp_path / "run", ModelConfig(size="debug", vocab_size=300), data)
    # a run of an earlier version has no tokenizer folder
    with pytest.raises(UserError, match=r"tokenizer 'Nobody/no-such-.* is neither .* give --tokenizer"):
        convert_to_hf(tmp_path / "run", tmp_path / "given")
    convert_to_hf(tmp_path / "run", tmp_path / "given", tokenizer=corpus)
    assert exported_ids(tmp_path / "given") == ids
    copy_tokenizer(corpus / "tokenizer.json", tmp_path / "run" / "tokenizer")
    convert_to_hf(tmp_path / "run", tmp_path / "own")
    assert exported_ids(tmp_path / "own") == ids


def test_a_tokenizer_without_an_end_of_sequence_token_or_tokenizer_json_raises(
    corpus: Path, tmp_path: Path
) -> None:
    save_run(tmp_path / "run", ModelConfig(size="debug", vocab_size=300))
    convert_to_hf(tmp_path / "run", tmp_path / "hf", tokenizer=corpus)
    table = json.loads((tmp_path / "hf" / "config.json").read_text())
    table.pop("eos_token_id")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(table))
    (tmp_path / "hf" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"eos_token_id in .* missing and .* has no eos_token"):
        convert_from_hf(tmp_path / "hf", tmp_path / "no")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        convert_from_hf(tmp_path / "hf", tmp_path / "no")


def test_a_chat_model_keeps_its_template_and_its_two_end_tokens(corpus: Path, tmp_path: Path) -> None:
    chat = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(corpus / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    chat.chat_template = "{% for message in messages %}<|im_start|>{{ message.role }}{% endfor %}"
    chat.save_pretrained(tmp_path / "chat")
    config = ModelConfig(
        size="custom",
        custom_size=ModelSize(width=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, mlp_width=4),
        vocab_size=310,
    )
    save_run_with_data(tmp_path / "run", config, {"tokenizer": str(tmp_path / "chat")})
    convert_to_hf(tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    end_of_document = theirs.convert_tokens_to_ids("<|endoftext|>")
    # the folder's pad_token ends documents here
    assert (theirs.eos_token_id, theirs.pad_token) == (end_of_document, "<|pad|>")
    assert 300 < theirs.pad_token_id < 310
    message = [{"role": "user", "content": "?"}]
    assert theirs.apply_chat_template(message, tokenize=False) == "<|im_start|>user"
    # the first eos_token_id of config.json, here that of a turn, becomes data.end_of_document
    end_of_turn = theirs.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn >= 300
    table = json.loads((tmp_path / "hf" / "config.json").read_text())
    table["eos_token_id"] = [end_of_turn, end_of_document]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(table))
    convert_from_hf(tmp_path / "hf", tmp_path / "again")
    data = read_run_table(tmp_path / "again" / "checkpoint" / "step-0")["data"]
    assert data["end_of_document"] == "<|im_end|>"
    options = {"end_of_document": "<|im_end|>", "num_positions": None, "vocab_size": 310}
    exported = export_tokenizer(tmp_path / "chat", tmp_path / "exported", **options)
    # the pad_token of the folder stays
    assert exported == (end_of_document, end_of_turn, end_of_document)


def test_a_tokenizer_with_ids_beyond_the_vocab_size_raises(corpus: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "run", ModelConfig(size="debug", vocab_size=50))
    with pytest.raises(UserError, match=r"the model's vocab_size is 50, but .*tokenizer.json has ids up to"):
        convert_to_hf(tmp_path / "run", tmp_path / "hf", tokenizer=corpus / "tokenizer.json")
