import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from data.config import DataConfig, ParquetSource
from data.loading.held_out import HeldOutLoader
from data.sources.split import is_held_out
from data.titan import TitanLoader, build_dataloader, build_validation_loader
from data.tokenizer import Tokenizer
from tests.ranks import run_ranks

TEXTS = ["x" * 30, "short", None, "a somewhat longer document", "b" * 70, "end"]


@pytest.fixture
def config(write_parquet: Callable[..., Path], byte_tokenizer: Tokenizer, tmp_path: Path) -> DataConfig:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    path = str(write_parquet("train.parquet", TEXTS))
    return DataConfig(
        tokenizer=str(tmp_path),
        train=ParquetSource(files=[path]),
        validation=ParquetSource(files=[path]),
        validation_documents="held_out",
        prefetch_batches=2,
    )


def _build(config: DataConfig, rank: int = 0, world: int = 1) -> TitanLoader:
    return build_dataloader(
        config,
        tokenizer=Tokenizer.load(config.tokenizer),
        seq_len=8,
        local_batch_size=1,
        global_batch_size=4,
        dp_rank=rank,
        dp_world_size=world,
    )


def _inputs(loader: TitanLoader, count: int) -> list[list[int]]:
    taken = [batch["input"][0].tolist() for batch, _ in itertools.islice(loader, count)]
    loader.close()
    return taken


@pytest.mark.parametrize("taken", [0, 1, 4, 13, 40])
def test_a_distributed_checkpoint_restores_the_position(
    config: DataConfig, tmp_path: Path, taken: int
) -> None:
    whole = _inputs(_build(config), taken + 6)
    saved = _build(config)
    assert _inputs(saved, taken) == whole[:taken]
    dcp.save({"dataloader": saved}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    resumed = _build(config)
    # a position of another length must be replaced by the saved one
    _inputs(resumed, 25)
    dcp.load({"dataloader": resumed}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert resumed.state_dict() == saved.state_dict()
    assert _inputs(resumed, 6) == whole[taken:]


def test_the_state_is_a_snapshot(config: DataConfig) -> None:
    loader = _build(config)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    before = copy.deepcopy(state)
    for _ in range(20):
        next(iterator)
    assert state == before != loader.state_dict()
    loader.close()


def _save_from_two_ranks(rank: int, config: DataConfig, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    loader = _build(config, rank, 2)
    _inputs(loader, 6)
    dcp.save({"dataloader": loader}, checkpoint_id=f"{folder}/checkpoint")
    torch.distributed.destroy_process_group()


def test_a_checkpoint_of_two_ranks_resumes_on_one_and_on_four(config: DataConfig, tmp_path: Path) -> None:
    run_ranks(_save_from_two_ranks, 2, config, str(tmp_path))
    whole = _inputs(_build(config), 20)
    for world in (1, 4):
        loaders = [_build(config, rank, world) for rank in range(world)]
        for loader in loaders:
            dcp.load({"dataloader": loader}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
        ranks = [_inputs(loader, 8 // world) for loader in loaders]
        # the rows of a micro-step are divided by their attention
        found = [sorted(micro_step) for micro_step in zip(*ranks, strict=True)]
        assert found == [sorted(whole[first : first + world]) for first in range(12, 20, world)]


def test_a_state_of_another_loader_is_rejected(config: DataConfig) -> None:
    loader = _build(config)
    loader.load_state_dict({})
    assert _inputs(loader, 1) == _inputs(_build(config), 1)
    with pytest.raises(ValueError, match=r"packed_loader.*dp_rank_0"):
        loader.load_state_dict({"dp_rank_0": b"", "world_size": 1})


def _validation(config: DataConfig, folder: Path, **changes: Any) -> HeldOutLoader:
    sizes: dict[str, Any] = {"seq_len": 4, "local_batch_size": 1, "max_tokens": None}
    ranks = {"dp_rank": 0, "dp_world_size": 1}
    tokenizer = Tokenizer.load(config.tokenizer)
    return build_validation_loader(
        config, tokenizer=tokenizer, kept_in=folder, **{**sizes, **ranks, **changes}
    )


def test_validation_reads_its_own_files_once(
    config: DataConfig, write_parquet: Callable[..., Path], byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    held_out = str(write_parquet("held_out.parquet", ["held out"]))
    changed = DataConfig(
        tokenizer=config.tokenizer, train=config.train, validation=ParquetSource(files=[held_out])
    )
    loader = _validation(changed, tmp_path)
    for _ in range(2):
        labels = torch.cat([batch.labels[0] for batch in loader])
        assert byte_tokenizer.decode(labels[labels != -100].tolist()) == "eld out<|endoftext|>"


def test_a_number_of_held_out_tokens_takes_as_many_rows_of_all_documents(
    config: DataConfig, write_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    path = str(write_parquet("held_out.parquet", ["abcdefghij" * 3] * 4))
    changed = DataConfig(
        tokenizer=config.tokenizer, train=config.train, validation=ParquetSource(files=[path])
    )
    whole = list(_validation(changed, tmp_path, max_tokens=None))
    # 124 tokens, 123 of them after the first, in rows of 4
    assert len(whole) == 31
    batches = list(_validation(changed, tmp_path, max_tokens=18))
    assert [len(batches), batches[-1].num_documents] == [5, 4]
    # the middle rows of five parts
    middle = [whole[row].inputs["input"] for row in (3, 9, 15, 21, 27)]
    assert torch.equal(torch.cat([batch.inputs["input"] for batch in batches]), torch.cat(middle))
    # of a larger set, documents of 8 times as many tokens
    _validation(changed, tmp_path / "kept", max_tokens=6)
    (file,) = (tmp_path / "kept").iterdir()
    assert len(np.load(file)["tokens"]) == 48


def test_validation_without_document_masks_attends_and_predicts_across_documents(
    config: DataConfig, write_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    path = str(write_parquet("held_out.parquet", ["abc", "de", "f"]))
    numbers = {}
    for masked in (True, False):
        changed = DataConfig(
            tokenizer=config.tokenizer,
            train=config.train,
            validation=ParquetSource(files=[path]),
            mask_documents=masked,
        )
        batches = list(_validation(changed, tmp_path))
        assert all(("cu_seqlens" in batch.inputs) == masked for batch in batches)
        numbers[masked] = sum(int((batch.labels != -100).sum()) for batch in batches)
    # 9 tokens: the first of all is no label, with masks the first of each document
    assert numbers == {True: 6, False: 8}


def test_validation_without_a_source_is_rejected(config: DataConfig, tmp_path: Path) -> None:
    none = DataConfig(tokenizer=config.tokenizer, train=config.train)
    with pytest.raises(ValueError, match=r"data\.validation is none"):
        _validation(none, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"shuffle_window": 16}, ""),
        ({"shuffle_window": 15}, r"data.shuffle_window is 15 rows, less than 4 times the global batch \(4\)"),
        ({"shuffle_seed": None}, "data.shuffle_seed is none: neither documents nor rows are shuffled"),
    ],
)
def test_a_launch_that_shuffles_little_or_nothing_says_so_once(
    config: DataConfig, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], message: str
) -> None:
    for rank in range(2):
        _build(replace(config, **changes), rank, 2)
    assert len(caplog.messages) == bool(message)
    assert not message or re.match(message, caplog.messages[0])


def test_training_is_shuffled_unless_the_run_says_none(config: DataConfig, byte_tokenizer: Tokenizer) -> None:
    texts = [text for text in TEXTS if text and not is_held_out(text)]
    stream = [token for text in texts for token in [*byte_tokenizer.encode(text), 0]]
    in_order = [stream[first : first + 8] for first in range(0, len(stream) - 8, 8)]
    assert _inputs(_build(replace(config, shuffle_seed=None)), len(in_order)) == in_order
    shuffled = [_inputs(_build(replace(config, shuffle_seed=seed)), len(in_order)) for seed in (0, 1)]
    assert shuffled[0] == _inputs(_build(config), len(in_order))
    assert in_order != shuffled[0] != shuffled[1] != in_order


def test_a_negative_prefetch_is_rejected(config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"prefetch_batches must be at least 0 .* got -1"):
        DataConfig(tokenizer=config.tokenizer, train=config.train, prefetch_batches=-1)
