"""Batched scoring: no request is computed twice or lost, over ranks and over interruptions."""

import json
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from errors import UserError
from eval.scoring.groups import Group, Scores, rows_of
from eval.scoring.language_model import LanguageModel, Qwen3Model
from eval.scoring.requests import truncate
from eval.scoring.saved_results import SavedResults
from eval.scoring.scorer import Scorer, group_requests, plan_batches, windows
from models.config import SoftmaxConfig
from tests.eval.conftest import build, ids
from tests.ranks import run_ranks


class IdModel(LanguageModel):
    """Scores a token by its id and records its batches; interrupted after a number of them."""

    identity = "counting"

    def __init__(self, *, is_padded: bool = False, interrupt_after: int = 1000, max_length: int = 50) -> None:
        self.is_padded = is_padded
        self.max_length = max_length
        self.batches: list[Sequence[Group]] = []
        self._interrupt_after = interrupt_after

    def row_lengths(self, group: Group) -> list[int]:
        return [len(group.context) + len(each) - 1 for each in group.continuations]

    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        if len(self.batches) == self._interrupt_after:
            raise KeyboardInterrupt
        self.batches.append(groups)
        return [
            [Scores([-float(t) for t in each], [t < 100 for t in each]) for each in group.continuations]
            for group in groups
        ]

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        self.batches.append([Group(tuple(prompt), ()) for prompt in prompts])
        return [prompt[-1:] * max_new_tokens for prompt in prompts]


def requests(count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(ids(seed // 3, 1 + seed % 20 // 3), ids(1000 + seed, 1 + seed % 4)) for seed in range(count)]


def test_a_long_context_is_truncated_from_the_left_as_in_the_harness() -> None:
    context, continuation = tuple(range(20)), (90, 91, 92)
    # the harness gives the model (context + continuation)[-(max_length + 1):][:-1]
    kept, same = truncate(context, continuation, 8)
    assert kept + same == (context + continuation)[-9:]
    assert same == continuation
    assert truncate(context, continuation, 22) == (context, continuation)
    with pytest.raises(ValueError, match="a continuation has 3 tokens, but the model's max_length is 2"):
        truncate(context, continuation, 2)


def test_a_truncated_request_is_scored_given_the_rest_of_its_context() -> None:
    model = build()
    context, continuation = ids(1, 40), ids(2, 3)
    (found,) = Scorer(Qwen3Model(model, max_length=10), token_budget=64).log_likelihoods(
        [(context, continuation)]
    )
    inputs = torch.tensor([(context + continuation)[-11:-1]])
    log_probs = model(inputs)[0, -3:].log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    assert found[0] == pytest.approx(float(log_probs.sum()), abs=1e-4)


def test_an_empty_continuation_has_probability_one_and_is_not_computed() -> None:
    model = IdModel()
    scorer = Scorer(model, token_budget=64)
    assert scorer.log_likelihoods([((1, 2), ()), ((3,), (5, 6))]) == [(0.0, True), (-11.0, True)]
    assert scorer.log_likelihoods([((1, 2), ())]) == [(0.0, True)]
    assert len(model.batches) == 1
    assert scorer.num_tokens == 2


def test_equal_requests_and_contexts_are_computed_once() -> None:
    model = IdModel()
    wanted = requests(60)
    found = Scorer(model, token_budget=10_000).log_likelihoods([*wanted, *wanted])
    assert found == [(-float(sum(text)), all(t < 100 for t in text)) for _, text in [*wanted, *wanted]]
    ((*groups,),) = model.batches
    assert len(groups) == len({context for context, _ in wanted})
    assert sum(len(group.continuations) for group in groups) == len(set(wanted))


@pytest.mark.parametrize("is_padded", [False, True])
def test_batches_stay_within_the_token_budget_and_are_sorted_by_length(is_padded: bool) -> None:
    model = IdModel(is_padded=is_padded)
    groups = group_requests(requests(200))
    batches = plan_batches(model, groups, 60)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    longest = [max(max(model.row_lengths(groups[index])) for index in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, widest in zip(batches, longest, strict=True):
        lengths = [length for index in batch for length in model.row_lengths(groups[index])]
        assert (len(lengths) * widest if is_padded else sum(lengths)) <= 60 or len(batch) == 1
    assert len(batches) < len(groups) / 2


def test_an_interrupted_evaluation_resumes(tmp_path: Path) -> None:
    path, wanted = tmp_path / "out" / "requests.jsonl", requests(100)
    whole = IdModel()
    truth = Scorer(whole, token_budget=60).log_likelihoods(wanted)
    interrupted = IdModel(interrupt_after=4)
    with pytest.raises(KeyboardInterrupt):
        Scorer(interrupted, token_budget=60, saved=SavedResults(path, "a")).log_likelihoods(wanted)
    # an interrupted write
    with path.open("a") as file:
        file.write('["half a li')
    again = IdModel()
    scorer = Scorer(again, token_budget=60, saved=SavedResults(path, "a"))
    assert scorer.log_likelihoods(wanted) == truth
    assert len(again.batches) <= len(whole.batches) - 4 + 1
    assert scorer.num_reused == sum(
        len(group.continuations) for batch in interrupted.batches for group in batch
    )
    third = IdModel()
    assert Scorer(third, token_budget=60, saved=SavedResults(path, "a")).log_likelihoods(wanted) == truth
    assert third.batches == []
    assert path.read_text().count("\n") == 1 + len(set(wanted))


def test_saved_results_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    SavedResults(path, "a").add({"key": 1})
    assert SavedResults(path, "a").get("key") == 1
    with pytest.raises(ValueError, match=r"requests.jsonl holds results of another checkpoint or tokenizer"):
        SavedResults(path, "b")
    path.write_text('["fingerprint", "a"]\nnonsense\n')
    with pytest.raises(ValueError, match=r"requests.jsonl, line 2 is not a saved result"):
        SavedResults(path, "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'["fingerprint", "f"]\n3\n', "line 2 is not a saved result"),
        (b'["fingerprint", "f"]\n["k", "\xe9"]\n', "is not UTF-8: byte 8 of line 2 is 0xe9"),
    ],
)
def test_a_damaged_file_of_results_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        SavedResults(path, "f")


def test_equal_prompts_are_generated_once_and_saved(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    prompts, until = [[1, 2], [3], [1, 2], [4] * 30], [["x"], [], ["x"], []]

    def run(model: IdModel) -> list[list[int]]:
        scorer = Scorer(model, token_budget=40, saved=SavedResults(path, "a"))
        return scorer.generate(prompts, until, 3, {0}, lambda index, tokens: False)

    first, second = IdModel(), IdModel()
    assert run(first) == run(second) == [[2] * 3, [3] * 3, [2] * 3, [4] * 3]
    assert [len(batch) for batch in first.batches] == [1, 2]
    assert second.batches == []


def _score_on_two(rank: int, folder: str, wanted: list[Any]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Qwen3Model(build(SoftmaxConfig()), max_length=64, identity="x")
    seen: list[int] = []
    plain = model.score
    model.score = lambda groups: seen.append(len(groups)) or plain(groups)  # type: ignore[method-assign]
    saved = SavedResults(Path(folder, "requests.jsonl"), "a")
    scorer = Scorer(model, token_budget=100, saved=saved)
    found = scorer.log_likelihoods(wanted)
    torch.save((found, scorer.num_tokens, seen), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_share_the_batches_and_return_the_scores_of_one(tmp_path: Path) -> None:
    wanted = requests(50)
    run_ranks(_score_on_two, 2, str(tmp_path), wanted)
    one = Scorer(Qwen3Model(build(SoftmaxConfig()), max_length=64), token_budget=100)
    truth = one.log_likelihoods(wanted)
    (first, tokens, batches), (second, _, others) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert first == second
    assert [each[0] for each in first] == pytest.approx([each[0] for each in truth], abs=1e-4)
    assert [each[1] for each in first] == [each[1] for each in truth]
    assert len(batches) == len(others)
    assert one.num_tokens <= tokens <= one.num_tokens + 100
    assert (tmp_path / "requests.jsonl").read_text().count("\n") == 1 + len(set(wanted))


def _complaint(work: Callable[[], Any]) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return "none"


def _differ_on_two(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    wanted = requests(9)
    scorer = Scorer(IdModel(), token_budget=20)
    swapped = [*wanted[:-1], ((5, 6), (7,))] if rank else wanted
    prompts = [[1, 2], [3 + rank]]
    # each rank has a folder of its own
    own = Path(folder, str(rank))
    saved = SavedResults(own / "requests.jsonl", "a")
    complaints = [
        _complaint(lambda: SavedResults(own / "damaged.jsonl", "a")),
        _complaint(lambda: scorer.log_likelihoods(swapped)),
        _complaint(lambda: scorer.log_likelihoods([] if rank else wanted)),
        _complaint(lambda: scorer.generate(prompts, [[], []], 3, {0}, lambda index, tokens: False)),
        _complaint(lambda: scorer.log_likelihoods(wanted)),
    ]
    Path(folder, f"{rank}.json").write_text(json.dumps([saved.get("key"), *complaints]))
    dist.destroy_process_group()


def test_requests_that_differ_are_refused_on_all_ranks_and_saved_results_are_the_main_rank_s(
    tmp_path: Path,
) -> None:
    SavedResults(tmp_path / "0" / "requests.jsonl", "a").add({"key": 1})
    (tmp_path / "0" / "damaged.jsonl").write_text('["fingerprint", "a"]\nnonsense\n')
    run_ranks(_differ_on_two, 2, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    key, damaged, *differing, same = first
    assert key == 1
    assert "damaged.jsonl, line 2 is not a saved result" in damaged
    for each in differing:
        assert "ranks were given different requests (rank 1: others than rank 0)" in each
    assert same == "none"
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    ("num_tokens", "max_length", "stride"), [(1, 4, 4), (5, 4, 4), (23, 4, 4), (23, 8, 3)]
)
def test_windows_predict_every_token_once_with_as_much_context_as_fits(
    num_tokens: int, max_length: int, stride: int
) -> None:
    found = list(windows(num_tokens, max_length, stride))
    predicted = [token for _, first, end in found for token in range(first, end)]
    assert predicted == list(range(1, num_tokens))
    assert all(end - 1 - start == min(end - 1, max_length) for start, _, end in found)
    assert all(end - first == stride for _, first, end in found[1:-1])


def test_a_stride_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="stride is 9, must be from 1 to 8"):
        list(windows(20, 8, 9))


def test_the_windows_drawn_in_the_docstring() -> None:
    rows = [line.split("  ") for line in (windows.__doc__ or "").splitlines() if line.endswith(")")]
    drawn = [tuple(map(int, row[-1].strip(" ()").split(", "))) for row in rows if "(" in row[-1]]
    assert drawn == [*windows(11, 4), *windows(11, 4, 2)]


def test_continuations_whose_inputs_begin_another_s_share_its_row() -> None:
    # the last token of each is no input
    tails, row_of = rows_of(Group((5,), ((1, 2, 3), (1, 2), (9,), (1, 4, 5))))
    assert tails == [(1, 4), (1, 2)]
    assert row_of == [1, 1, 1, 0]
