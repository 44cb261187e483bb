"""Log-likelihoods and accuracies of our batched scoring equal those of the harness's Hugging Face model."""

from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
pytest.importorskip("accelerate", reason="the harness's Hugging Face model needs accelerate")

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from benchmarks.harness_comparison import (
    Answers,
    answer,
    compare,
    errors_at_largest_differences,
    harness_model,
    open_gguf,
    to_fast_tokenizer,
    to_transformers,
)
from data.tokenizer import Tokenizer
from eval.harness import HarnessModel
from eval.scoring.language_model import Qwen3Model
from eval.scoring.scorer import Scorer
from eval.scoring.transformers_model import TransformersModel
from eval.task_results import ACCURACIES, PAPER
from tests.conftest import make_text
from tests.eval.conftest import build


def both(
    tasks: Sequence[str],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    data: Path,
    max_length: int,
    limit: int | None = None,
) -> tuple[Answers, Answers, dict[str, float]]:
    """Evaluate a random model of ours, and the same model in transformers through the harness's HFLM.

    Returns the answers of both, and their errors against fp64.
    """
    network = build(vocab_size=tokenizer.vocab_size + 4)
    model = Qwen3Model(network, max_length=max_length)
    ours = HarnessModel(model, tokenizer, Scorer(model, token_budget=2000))
    fast = to_fast_tokenizer(tokenizer, folder)
    theirs = harness_model(to_transformers(network), fast, max_length=max_length, batch_size=8)
    first, second = (answer(lm, tasks, data=data, limit=limit) for lm in (ours, theirs))
    exact = Qwen3Model(network.double(), max_length=max_length)
    return first, second, errors_at_largest_differences(first, second, exact, tokenizer)


def test_log_likelihoods_and_accuracies_equal_those_of_hflm(
    tasks_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    # texts of WikiText are several times max_length
    first, second, errors = both(["paper"], tokenizer, tmp_path, data=tasks_folder, max_length=96)
    for task in PAPER[-2:]:
        assert first.metrics[task] == pytest.approx(second.metrics[task], rel=1e-5)
    parity = compare(first, second)
    assert parity.num_documents == 12 * len(PAPER)
    assert parity.max_relative < 2e-6  # rounding: 1.1e-6 on a processor, below 1e-6 on another
    assert errors["ours"] < 2 * errors["harness"]
    assert parity.flags_differ == 0
    assert parity.choices_differ == {}
    del first.values["wikitext"], second.values["wikitext"]  # sums of 2000 nats
    assert compare(first, second).max_difference < 1e-4


def test_log_likelihoods_of_real_documents_equal_those_of_hflm(
    olmo_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    # with a vocabulary of 300, some contexts are longer than max_length
    first, second, errors = both(ACCURACIES, tokenizer, tmp_path, data=olmo_folder, max_length=256, limit=4)
    parity = compare(first, second)
    assert parity.num_documents == 4 * 8
    # continuations have up to a hundred tokens of 10 nats each
    assert parity.max_difference < 1e-3
    assert parity.max_relative < 2e-6
    assert errors["ours"] < 2 * errors["harness"]
    assert parity.flags_differ == 0
    assert parity.choices_differ == {}


def test_scores_differ_from_those_of_hflm_only_where_a_token_spans_the_join(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    network = build(vocab_size=tokenizer.vocab_size)
    model = Qwen3Model(network, max_length=96)
    ours = HarnessModel(model, tokenizer, Scorer(model, token_budget=500))
    fast = to_fast_tokenizer(tokenizer, tmp_path)
    theirs = harness_model(to_transformers(network), fast, max_length=96, batch_size=4)
    texts = list(dict.fromkeys(make_text(seed, 3) for seed in range(60)))
    pairs = [(text[: 3 + n % 9], text[3 + n % 9 :]) for n, text in enumerate(texts)]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    tokens = [tokenizer.encode_prompts([context.rstrip(), context + rest]) for context, rest in pairs]
    # the harness scores what is left behind as many tokens as the context has
    swallowed = [len(whole) <= len(before) for before, whole in tokens]
    found = ours.loglikelihood(requests)
    assert all(score < 0 for score, _ in found)
    assert 2 < sum(swallowed) < len(pairs) / 2
    for request, is_swallowed in zip(requests, swallowed, strict=True):
        if is_swallowed:
            with pytest.raises(AssertionError):
                theirs.loglikelihood([request], disable_tqdm=True)
    kept = [index for index, is_swallowed in enumerate(swallowed) if not is_swallowed]
    # one by one: HFLM takes requests of equal tokens but another split for one
    scores = [theirs.loglikelihood([requests[index]], disable_tqdm=True)[0] for index in kept]
    same = 0
    for index, (score, is_greedy) in zip(kept, scores, strict=True):
        before, whole = tokens[index]
        if whole[: len(before)] == before:
            same += 1
            assert found[index] == (pytest.approx(score, rel=1e-5), is_greedy)
    assert len(pairs) / 4 < same < len(kept)


def test_generated_texts_equal_those_of_hflm(tokenizer: Tokenizer, tmp_path: Path) -> None:
    network = build(vocab_size=tokenizer.vocab_size)
    model = Qwen3Model(network, max_length=96)
    ours = HarnessModel(model, tokenizer, Scorer(model, token_budget=150))
    fast = to_fast_tokenizer(tokenizer, tmp_path)
    theirs = harness_model(to_transformers(network), fast, max_length=96, batch_size=1)
    options = {"until": [], "do_sample": False, "max_gen_toks": 24}
    # 600 words are longer than max_length: both sides truncate the prompt from the left
    prompts = [make_text(seed, length) for seed, length in enumerate((3, 8, 20, 3, 600))]

    def run(lm: TemplateLM, until: list[str]) -> list[str]:
        arguments = [(prompt, {**options, "until": until}) for prompt in prompts]
        return lm.generate_until([Instance("generate_until", {}, each, 0) for each in arguments])

    plain = run(ours, [])
    assert plain == run(theirs, [])
    assert all(plain)
    until = [plain[0][2:4], plain[1][5:7]]
    stopped = run(ours, until)
    assert stopped == run(theirs, until)
    assert stopped[0] == plain[0].split(until[0])[0].split(until[1])[0]
    assert stopped[0] != plain[0]


def smollm2(file: Path, data: Path, limit: int) -> tuple[Answers, Answers, dict[str, float]]:
    """Evaluate a pretrained model on both sides; return their answers and errors against fp64."""
    network, fast, tokenizer = open_gguf(file)
    tasks = ["piqa", "arc_easy", "openbookqa", "winogrande"]
    model = TransformersModel(network, max_length=2048)
    ours = HarnessModel(model, tokenizer, Scorer(model, token_budget=2048))
    theirs = harness_model(network, fast, max_length=2048, batch_size=8)
    first, second = (answer(lm, tasks, data=data, limit=limit) for lm in (ours, theirs))
    exact = TransformersModel(network.double(), max_length=2048)
    return first, second, errors_at_largest_differences(first, second, exact, tokenizer, count=4)


def assert_same(first: Answers, second: Answers, errors: dict[str, float]) -> None:
    parity = compare(first, second)
    assert parity.max_relative < 2e-5
    assert parity.flags_differ == 0
    assert parity.choices_differ == {}
    # the differences are rounding: ours is as close to fp64 as the harness's
    assert errors["ours"] < 5e-4
    assert errors["ours"] < 3 * errors["harness"]


def test_scores_of_a_pretrained_model_equal_those_of_hflm(smollm2_file: Path, olmo_folder: Path) -> None:
    pytest.importorskip("gguf", reason="transformers reads the weights with gguf")
    assert_same(*smollm2(smollm2_file, olmo_folder, 3))


@pytest.mark.slow
def test_a_pretrained_model_has_its_accuracy_on_200_documents(smollm2_file: Path, olmo_folder: Path) -> None:
    pytest.importorskip("gguf", reason="transformers reads the weights with gguf")
    first, second, errors = smollm2(smollm2_file, olmo_folder, 200)
    assert_same(first, second, errors)
    assert sum(first.num_documents.values()) == 800
    # far above chance
    assert first.metrics["piqa"]["acc,none"] > 0.6
    assert first.metrics["arc_easy"]["acc,none"] > 0.4
