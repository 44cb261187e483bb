"""Folders from outside: config.json, index, weights and links are checked, and errors name the file."""

import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from errors import UserError, run_command
from models.convert.__main__ import main
from models.convert.format import from_config_json
from models.convert.from_hf import convert_from_hf
from models.convert.to_hf import convert_to_hf
from tests.models.convert.test_convert import make_theirs
from tests.models.convert.test_format import QWEN3_06B

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 1.5}, "hidden_size is 1.5, wanted an integer"),
    ({"hidden_size": True}, "hidden_size is true, wanted an integer"),
    ({"hidden_size": None}, "hidden_size is null, wanted an integer"),
    ({"vocab_size": "151936"}, 'vocab_size is "151936", wanted an integer'),
    ({"num_hidden_layers": [28]}, "num_hidden_layers is [28], wanted an integer"),
    ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6", wanted a number'),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, wanted true or false"),
    ({"rope_theta": {}}, "rope_theta is {}, wanted a number or null"),
    ({"rope_scaling": "yarn"}, 'rope_scaling is "yarn", wanted a table or null'),
    ({"rope_parameters": {"rope_type": 3}}, "rope_parameters is {'rope_type': 3}"),
    ({"rope_parameters": {"rope_theta": "5"}}, "rope_parameters has rope_theta '5', wanted a number"),
    ({"layer_types": "full_attention"}, 'layer_types is "full_attention", wanted a list'),
    ({"layer_types": [3]}, "layer_types is [3], wanted a list"),
    ({"sliding_window": 8.5}, "sliding_window is 8.5, wanted an integer or null"),
    ({"max_window_layers": "28"}, 'max_window_layers is "28"'),
    ({"max_position_embeddings": "many"}, 'max_position_embeddings is "many"'),
    ({"architectures": "Qwen3ForCausalLM"}, 'architectures is "Qwen3ForCausalLM", wanted a list'),
    ({"model_type": ["qwen3"]}, 'model_type is ["qwen3"], wanted a string'),
    (
        {"eos_token_id": "end"},
        'eos_token_id is "end", wanted an integer or a list',
    ),
    ({"hidden_size": 0}, "hidden_size must be at least 1"),
    ({"hidden_size": -8}, "hidden_size must be at least 1"),
    ({"intermediate_size": 10**12}, "intermediate_size must be at least 1 and at most"),
    ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps must be at least"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps must be at least"),
    ({"rope_theta": math.inf}, "rope_theta must be at least"),
    ({"initializer_range": 1e30}, "initializer_range must be at least"),
    ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1"),
    ({"eos_token_id": -1}, "eos_token_id must be at least 0"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"head_dim": 7}, "head_dim"),
    (
        {"use_sliding_window": True, "sliding_window": -3, "max_window_layers": 0},
        "sliding_window must be at least 1",
    ),
    ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 28 layers"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[json.dumps(change)[:40] for change, _ in WRONG])
def test_types_and_ranges_of_config_json_are_checked_as_those_of_a_config(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        from_config_json(QWEN3_06B | change, "hf/config.json")
    assert str(raised.value).startswith("hf/config.json")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def complaint(table: dict[str, Any]) -> str:
    try:
        from_config_json(table, "hf/config.json")
    except UserError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("seed", range(20))
def test_no_value_of_any_key_ends_in_another_error(seed: int) -> None:
    drawn = random.Random(seed)
    values = [None, True, -1, 0, 3, 2**40, 10**30, 1.5, math.nan, -math.inf, "", "x", [], [None], [{}], {}]
    values += [[7], {"a": []}, {"rope_theta": "5"}]
    for _ in range(150):
        keys = drawn.sample([*QWEN3_06B, "layer_types", "rope_parameters", "quantization_config"], 2)
        change = {key: drawn.choice(values) for key in keys}
        assert complaint(QWEN3_06B | change).startswith(("hf/config.json", "none"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_theirs(tmp_path / "hf")
    return tmp_path / "hf"


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line in which from-hf ends; it leaves no run behind."""
    out = folder.parent / "run"
    monkeypatch.setattr(sys, "argv", ["convert", "from-hf", str(folder), "--out", str(out)])
    assert run_command(main) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert not out.exists()
    return line


def test_a_config_json_that_is_no_object_or_no_text_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "config.json"
    for content, message in (
        (b"[]", "config.json holds a list, wanted a JSON object"),
        (b"null", "config.json holds null, wanted a JSON object"),
        (b"{", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b'{\n"a": "caf\xe9"}', "config.json is not UTF-8: byte 10 of line 2 is 0xe9"),
    ):
        path.write_bytes(content)
        assert f"{folder}/{message}" in refused(folder, monkeypatch, capsys)


@pytest.mark.parametrize(("value", "found"), [(math.nan, "1 NaN"), (math.inf, "1 Inf"), (-math.inf, "1 Inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_nan_or_inf_are_named(
    folder: Path,
    name: str,
    value: float,
    found: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, folder / "model.safetensors")
    assert f"{name} has {found}" in refused(folder, monkeypatch, capsys)


def test_weights_beyond_the_chosen_dtype_are_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"in float16: model.norm.weight has 1 Inf"):
        convert_from_hf(folder, tmp_path / "run", dtype="float16")
    assert not (tmp_path / "run").exists()
    convert_from_hf(folder, tmp_path / "run", dtype="bfloat16")


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "sub/../../outside.safetensors", "{}/outside.safetensors"),
        *("link", "circle", "a\0b", "\ud83d", "{}/hf/inside.safetensors", "sub/../inside.safetensors"),
    ],
)
def test_shards_outside_the_folder_are_refused(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / "model.safetensors", folder / "inside.safetensors")
    shutil.move(folder / "model.safetensors", outside)
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "circle").symlink_to("circle")
    write_index(folder, {"model.norm.weight": name.format(folder.parent)})
    line = refused(folder, monkeypatch, capsys)
    assert "model.safetensors.index.json" in line
    assert "is not within the folder" in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "vocab.json"])
def test_no_file_of_the_folder_may_be_a_link_that_leads_out(
    folder: Path, corpus: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(corpus / "tokenizer.json", folder)
    outside = folder.parent / "outside"
    if (folder / name).exists():
        shutil.move(folder / name, outside)
    else:
        outside.write_text("secret")
    (folder / name).symlink_to(outside)
    assert f"{folder}: {name!r} is not within the folder" in refused(folder, monkeypatch, capsys)


def test_links_within_the_folder_and_those_of_the_hub_s_cache_are_read(folder: Path, tmp_path: Path) -> None:
    # models--x/snapshots/COMMIT/NAME is a link to models--x/blobs/HASH
    repository = tmp_path / "models--x"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(folder.iterdir()):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    convert_from_hf(snapshot, tmp_path / "run")
    convert_to_hf(tmp_path / "run", tmp_path / "back")
    (tmp_path / "back" / "real").mkdir()
    weights = tmp_path / "back" / "model.safetensors"
    shutil.move(weights, tmp_path / "back" / "real" / "w.safetensors")
    weights.symlink_to("real/w.safetensors")
    convert_from_hf(tmp_path / "back", tmp_path / "again")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: write_index(folder, []), "weight_map is [], wanted"),
        (lambda folder: write_index(folder, {"a": 3}), "weight_map is {"),
        (lambda folder: write_index(folder, {}), "weight_map is {}"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "weight_map is null, wanted",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
            "holds a list, wanted a JSON object",
        ),
    ],
)
def test_an_index_of_another_form_is_named(
    folder: Path,
    write: Callable[[Path], object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder)
    line = refused(folder, monkeypatch, capsys)
    assert f"{folder}/model.safetensors.index.json" in line
    assert message in line


def test_a_tensor_that_is_in_two_shards_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "a.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"]}, folder / "b.safetensors")
    write_index(folder, dict.fromkeys(weights, "a.safetensors") | {"model.norm.weight": "b.safetensors"})
    line = refused(folder, monkeypatch, capsys)
    assert "model.norm.weight is in a.safetensors and in b.safetensors" in line


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token is 3"),
        ("tokenizer_config.json", {"eos_token": {"text": "x"}}, "eos_token is {"),
        ("tokenizer_config.json", [], "holds a list"),
        ("tokenizer.json", {}, "cannot load"),
    ],
)
def test_files_of_the_tokenizer_are_named(
    folder: Path,
    corpus: Path,
    file: str,
    content: object,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(corpus / "tokenizer.json", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    if file == "tokenizer.json":
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    (folder / file).write_text(json.dumps(content))
    line = refused(folder, monkeypatch, capsys)
    assert f"{folder / file}" in line
    assert message in line
