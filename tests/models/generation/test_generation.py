"""Generation: greedy decoding, sampling, stops, text streaming, and the command line."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from config import to_table, to_toml
from errors import UserError
from models import sizes
from models.config import AttentionConfig, LinearConfig, ModelConfig, ParallaxConfig, SoftmaxConfig
from models.device import check_device
from models.generation import __main__ as command_line
from models.generation.generate import generate, stream
from models.generation.sampling import Sampling, sample_tokens
from models.generation.text_stream import TextStream, stop_at
from tests.models.test_checkpoint import save_run
from tests.models.test_qwen3 import TINY, build, tokens


@pytest.fixture(autouse=True)
def _tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


@pytest.fixture
def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {character: 1 + i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_sampled_tokens_are_awaited_on_the_stream_of_the_models_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # an event on the current device's stream would not wait for the copy from another GPU
    recorded: list[object] = []

    class Event:
        def record(self, stream: object = None) -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    generate(build(SoftmaxConfig()), [[1, 2, 3]], max_new_tokens=2)
    assert recorded == ["the stream of cpu"] * 2


@pytest.mark.parametrize(
    "attention", [SoftmaxConfig(), ParallaxConfig(), LinearConfig()], ids=lambda a: a.kind
)
def test_greedy_decoding_equals_the_argmax_of_full_forwards(attention: AttentionConfig) -> None:
    model = build(attention, torch.float64)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (1, 7, 4)]
    results = generate(model, prompts, max_new_tokens=12, batch_size=2)
    for prompt, result in zip(prompts, results, strict=True):
        sequence, logprobs = list(prompt), []
        for _ in range(12):
            row = model(torch.tensor([sequence]))[0, -1].log_softmax(-1)
            sequence.append(int(row.argmax()))
            logprobs.append(float(row.max()))
        assert result.tokens == sequence[len(prompt) :]
        assert result.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert not result.is_finished


def test_a_stop_ends_one_continuation_and_not_the_others() -> None:
    model = build(SoftmaxConfig())
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 5)]
    free = generate(model, prompts, max_new_tokens=8)
    end = free[0].tokens[2]
    first = free[0].tokens.index(end) + 1
    results = generate(model, prompts, max_new_tokens=8, stop=lambda row, new: row == 0 and new[-1] == end)
    assert results[0].tokens == free[0].tokens[:first]
    assert results[0].is_finished
    assert results[1].tokens == free[1].tokens
    assert not results[1].is_finished
    by_id = generate(model, prompts[:1], max_new_tokens=8, stop_ids={end})
    assert by_id[0].tokens == free[0].tokens[:first]
    streamed = [each.token for new in stream(model, prompts[:1], max_new_tokens=8) for each in new]
    assert streamed == free[0].tokens


def test_sampling_follows_temperature_top_k_and_top_p() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0])
    rows = logits.expand(20_000, -1)

    def frequencies(**options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn, logprobs = sample_tokens(rows, Sampling(**options), generator)
        torch.testing.assert_close(logprobs, logits.log_softmax(-1)[drawn])
        return drawn.bincount(minlength=6) / len(rows)

    def close(frequency: torch.Tensor, wanted: torch.Tensor) -> None:
        assert ((frequency - wanted).abs() < 5 * (wanted * (1 - wanted) / len(rows)).sqrt() + 1e-9).all()

    close(frequencies(temperature=1.0), logits.softmax(-1))
    close(frequencies(temperature=2.0), (logits / 2).softmax(-1))
    three = logits[:3].softmax(-1)
    close(frequencies(temperature=1.0, top_k=3), torch.cat((three, torch.zeros(3))))
    # the first two have a probability of 0.86: below 0.87, so that the third stays
    close(frequencies(temperature=1.0, top_p=0.87), torch.cat((three, torch.zeros(3))))
    close(frequencies(temperature=1.0, top_p=1e-6), torch.tensor([1.0, 0, 0, 0, 0, 0]))
    close(frequencies(temperature=0.0), torch.tensor([1.0, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_an_option_of_sampling_without_a_temperature_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} has no effect.*temperature"):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_a_tiny_temperature_gives_the_greedy_token(temperature: float, options: dict[str, Any]) -> None:
    logits = 30 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=temperature, **options)
    drawn, logprobs = sample_tokens(logits, sampling, torch.Generator().manual_seed(0))
    assert drawn.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).max(-1).values)


def test_sampling_is_reproducible_by_its_seed() -> None:
    model = build(ParallaxConfig())
    prompts = [[1, 2], [3]]
    first, again, other = (
        generate(model, prompts, max_new_tokens=20, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_a_smaller_last_batch_does_not_repeat_the_draws_of_the_first() -> None:
    model = build(SoftmaxConfig())
    first_tokens = [
        [
            g.tokens[0]
            for g in generate(model, 5 * [[1]], max_new_tokens=1, temperature=1.0, seed=s, batch_size=4)
        ]
        for s in range(30)
    ]
    assert sum(row[0] == row[4] for row in first_tokens) < 15


def test_autocast_does_not_reach_generation() -> None:
    model = build(ParallaxConfig())
    expected = generate(model, [[1, 2], [3]], max_new_tokens=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, [[1, 2], [3]], max_new_tokens=5) == expected


def test_cuda_without_an_index_is_the_current_device(
    tmp_path: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path, ModelConfig(size="debug", vocab_size=257))
    byte_tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        command_line, "load_model", lambda checkpoint, *, device, dtype, average: (device, dtype)
    )
    words = ["--checkpoint", str(tmp_path), "--tokenizer", str(tmp_path)]
    assert command_line.load(command_line.make_parser().parse_args(words))[0] == ("cuda", torch.bfloat16)


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "foo", "cuda:", "cuda:x", "cuda:-1", "meta", "cpu:0"):
        with pytest.raises(UserError, match=f'--device is "{name}", want cuda, cuda:N or cpu'):
            check_device(name)
    check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device is cuda:1, but no CUDA device is available; give cpu"):
        check_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:0", "cuda:1"):
        check_device(name)
    with pytest.raises(UserError, match="--device is cuda:2, but there are 2 GPUs, counted from 0"):
        check_device("cuda:2")


def test_options_out_of_range_raise() -> None:
    model = build(SoftmaxConfig())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or above"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 10**12}, r"the decoding cache of 1 sequences .* give a smaller max_new_tokens"),
        ({"seed": 2**63}, "seed must be at least 0 and at most 9223372036854775807"),
    ]
    for options, match in wrong:
        arguments: dict[str, Any] = {"max_new_tokens": 4, **options}
        with pytest.raises(UserError, match=match):
            generate(model, [[1]], **arguments)
    with pytest.raises(UserError, match="a prompt is empty"):
        generate(model, [[1], []], max_new_tokens=4)
    assert generate(model, [], max_new_tokens=4) == []


def test_streamed_text_has_whole_characters_and_ends_before_a_stop_string(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("caf\u00e9 \u20ac END tail").ids
    decode, strings = byte_tokenizer.decode, ["END", "never"]
    text, stop = TextStream(decode, strings, []), stop_at(decode, strings, [[]])
    shown, count = [], 0
    for count in range(1, len(ids) + 1):
        shown.append(text.add(ids[count - 1]))
        if stop(0, ids[:count]):
            break
    assert "".join(shown) + text.end() == "caf\u00e9 \u20ac "
    assert not any("\ufffd" in piece or "E" in piece for piece in shown)
    assert byte_tokenizer.decode(ids[:count]).endswith("END")


def test_a_run_generates_with_its_own_tokenizer(
    tmp_path: Path,
    byte_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = ModelConfig(size="debug", vocab_size=257)
    save_run(tmp_path / "run", config)
    tables = {"model": to_table(config), "data": {"tokenizer": "Nobody/no-such-tokenizer"}}
    (tmp_path / "run" / "config.toml").write_text(to_toml(tables))
    words = ["generation", "--checkpoint", str(tmp_path / "run"), "--prompt", "Hi", "--max-new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu"])
    with pytest.raises(UserError, match=r"has no tokenizer/tokenizer.json.*Nobody/no-such-.*--tokenizer"):
        command_line.main()
    file = tmp_path / "elsewhere.json"
    byte_tokenizer.save(str(file))
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu", "--tokenizer", str(file)])
    command_line.main()
    written = capsys.readouterr().out
    assert written.startswith("Hi")
    (tmp_path / "run" / "tokenizer").mkdir()
    file.rename(tmp_path / "run" / "tokenizer" / "tokenizer.json")
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu"])
    command_line.main()
    assert capsys.readouterr().out == written


def test_the_command_line_continues_a_prompt(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    save_run(tmp_path, ModelConfig(size="debug", vocab_size=257, attention=ParallaxConfig()))
    file = tmp_path / "tokenizer.json"
    byte_tokenizer.save(str(file))
    command = [
        sys.executable,
        "-m",
        "models.generation",
        "--checkpoint",
        str(tmp_path),
        "--tokenizer",
        str(file),
    ]
    command += ["--max-new-tokens", "9", "--temperature", "1", "--device", "cpu"]
    run: dict[str, Any] = {"capture_output": True, "check": False}
    done = subprocess.run([*command, "--prompt", "Hello"], **run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"Hello")
    assert b"9 tokens; first after" in done.stderr
    assert b"tokens/s" in done.stderr
    again = subprocess.run(command, input=b"Hello\n", **run)
    assert again.stdout == done.stdout
    for words, message in (
        (["--checkpoint", str(tmp_path / "nowhere")], b"nowhere is no checkpoint"),
        (["--stop", ""], b"a stop string is empty"),
        (["--seed", "9" * 23], b"seed must be at least 0 and at most 9223372036854775807"),
        (["--max-new-tokens", "0"], b"--max-new-tokens is 0, must be at least 1"),
    ):
        wrong = subprocess.run([*command, *words, "--prompt", "a"], **run)
        assert wrong.returncode == 2
        assert wrong.stdout == b""
        assert wrong.stderr.startswith(b"error: ")
        assert wrong.stderr.count(b"\n") == 1
        assert message in wrong.stderr
