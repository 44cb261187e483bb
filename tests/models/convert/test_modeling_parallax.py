"""The exported Parallax model in transformers: same logits, gradients and generated text in every variant."""

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from config import to_table, to_toml
from models.checkpoint.load import load_model
from models.config import ModelConfig, ParallaxConfig, SoftmaxConfig
from models.convert.format import PARALLAX_FILES, to_config_json, to_hugging_face
from models.convert.from_hf import convert_from_hf
from models.convert.to_hf import convert_to_hf
from models.qwen3 import Qwen3
from models.sizes import ModelSize
from tests.models.convert.test_convert import all_tensors, assert_same_bits
from tests.models.test_checkpoint import save_run
from tokens import IGNORE_INDEX

transformers = pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[3] / "models" / "convert"
VOCAB = 97
PAD = 96
SIZE = ModelSize(width=36, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10, mlp_width=52)
VARIANTS = {
    "default": ParallaxConfig(),
    "window": ParallaxConfig(window_size=4),
    "probe per kv head": ParallaxConfig(r_heads="kv"),
    "low rank": ParallaxConfig(r_rank=5),
    "no norm": ParallaxConfig(r_norm=False, r_scale=0.3),
    "gain and scale": ParallaxConfig(r_gain_init=1.5, r_scale=0.5),
    "no RoPE on r": ParallaxConfig(rope_on_r=False),
    "gate per token": ParallaxConfig(gate="token"),
    "gate per head": ParallaxConfig(gate="head", rope_on_r=False),
    "plain layers": ParallaxConfig(num_plain_layers=2),
    "all": ParallaxConfig(
        window_size=6, r_heads="kv", r_rank=7, r_scale=0.5, gate="head", num_plain_layers=1, rope_on_r=False
    ),
}
variants = pytest.mark.parametrize("attention", VARIANTS.values(), ids=list(VARIANTS))


def settings(attention: ParallaxConfig | SoftmaxConfig, **options: Any) -> ModelConfig:
    return ModelConfig(
        size="custom", custom_size=SIZE, vocab_size=VOCAB, attention=attention, init_std=0.2, **options
    )


def export(
    folder: Path, attention: ParallaxConfig | SoftmaxConfig, dtype: Any = "float32", **options: Any
) -> tuple[Qwen3, Any]:
    """A random model of this project, and its export as loaded by transformers."""
    save_run(folder / "run", settings(attention, **options))
    convert_to_hf(folder / "run", folder / "hf", dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True)
    return load_model(folder / "run", dtype=getattr(torch, dtype)), theirs


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, PAD, (n,), generator=generator).tolist() for n in lengths]


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


def greedy(model: Qwen3, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy decoding by full forwards without a cache."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance * float(b.detach().abs().max()), rtol=0)


@variants
@torch.no_grad()
def test_logits_and_greedy_decoding_equal_ours(attention: ParallaxConfig, tmp_path: Path) -> None:
    ours, theirs = export(tmp_path, attention)
    assert type(theirs).__module__.startswith("transformers_modules.")
    # longer than a block of queries
    ids = torch.tensor(tokens(140, 140))
    close(theirs(ids).logits, ours(ids))
    softmax = Qwen3(settings(SoftmaxConfig(window_size=attention.window_size)))
    softmax.load_state_dict(ours.state_dict(), strict=False)
    assert (softmax(ids) - ours(ids)).abs().max() > 0.05
    prompts = tokens(11, 3, 7)
    written = theirs.generate(**left_padded(prompts), max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    assert written[:, 11:].tolist() == [greedy(ours, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("attention", [SoftmaxConfig(window_size=1), ParallaxConfig(window_size=1)], ids=str)
@torch.no_grad()
def test_a_window_of_one_key_is_generated_without_a_cache(
    attention: ParallaxConfig | SoftmaxConfig, tmp_path: Path
) -> None:
    ours, theirs = export(tmp_path, attention)
    (prompt,) = tokens(11)
    written = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=PAD)
    assert written[0, 11:].tolist() == greedy(ours, prompt, 12)


@variants
def test_the_exported_folder_converts_back_to_the_same_run(attention: ParallaxConfig, tmp_path: Path) -> None:
    ours, theirs = export(tmp_path, attention)
    convert_from_hf(tmp_path / "hf", tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == settings(attention)
    assert_same_bits(dict(ours.state_dict()), dict(again.state_dict()))
    # also after save_pretrained
    theirs.save_pretrained(tmp_path / "saved")
    assert_same_bits(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "saved"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    ids = torch.tensor(tokens(9))
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_ours(tied: bool, tmp_path: Path) -> None:
    ours, theirs = export(tmp_path, VARIANTS["all"], tie_embeddings=tied)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    ours.requires_grad_(True)
    ids = torch.tensor(tokens(20, 20))
    labels = ids.clone()
    labels[0, :5] = IGNORE_INDEX
    expected = ours(ids[:, :-1], labels_BT=labels[:, 1:]) / (15 + 19)
    loss = theirs(ids, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(theirs(ids, labels=labels, num_items_in_batch=68).loss, expected / 2)
    loss.backward()
    expected.backward()
    grads = to_hugging_face({name: p.grad for name, p in ours.named_parameters()})
    found = {name: p.grad for name, p in theirs.named_parameters()}
    assert grads.keys() == found.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
def test_logits_with_a_cache_filled_in_parts_equal_one_forward(tmp_path: Path) -> None:
    for name in ("default", "all"):
        ours, theirs = export(tmp_path / name.replace(" ", "_"), VARIANTS[name])
        (row,) = tokens(150)
        ids = torch.tensor([row])
        whole = ours(ids)
        cache, parts = transformers.DynamicCache(), []
        for part in ids.split([130, 1, 1, 18], dim=1):
            out = theirs(part, past_key_values=cache, use_cache=True)
            assert out.past_key_values is cache
            parts.append(out.logits)
        close(torch.cat(parts, dim=1), whole)
        assert cache.get_seq_length() == 150
        assert cache.layers[0].keys.shape == (1, SIZE.num_kv_heads, 150, SIZE.head_dim)
        close(theirs(ids, logits_to_keep=2, use_cache=False).logits, whole[:, -2:])
        assert theirs(ids, use_cache=False).past_key_values is None
        embeds = theirs.get_input_embeddings()(ids)
        close(theirs(inputs_embeds=embeds, return_dict=False)[0], whole)


@torch.no_grad()
def test_padding_on_either_side_does_not_change_logits(tmp_path: Path) -> None:
    # without RoPE on r a shift of all positions changes the logits
    ours, theirs = export(tmp_path, VARIANTS["no RoPE on r"])
    prompts = tokens(9, 4)
    left = left_padded(prompts)
    for row, prompt in enumerate(prompts):
        close(theirs(**left).logits[row, -len(prompt) :], ours(torch.tensor([prompt]))[0])
    right = {name: torch.stack([values[0], values[1].roll(-5)]) for name, values in left.items()}
    logits = theirs(**right).logits
    close(logits[1, :4], ours(torch.tensor([prompts[1]]))[0])
    assert logits.isfinite().all()
    assert theirs(**left).logits.isfinite().all()


@torch.no_grad()
def test_beam_search_stops_at_the_end_of_document_token(corpus: Path, tmp_path: Path) -> None:
    config = ModelConfig(size="debug", vocab_size=301, attention=ParallaxConfig(), init_std=0.2)
    save_run(tmp_path / "run", config)
    tables = {"model": to_table(config), "data": {"tokenizer": str(corpus / "tokenizer.json")}}
    (tmp_path / "run" / "config.toml").write_text(to_toml(tables))
    convert_to_hf(tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", padding_side="left")
    batch = tokenizer(["a model of", "the"], return_tensors="pt", padding=True)
    ours = load_model(tmp_path / "run")
    written = theirs.generate(**batch, max_new_tokens=5, do_sample=False)
    width = batch["input_ids"].shape[1]
    for row, text in zip(written, ("a model of", "the"), strict=True):
        assert row[width:].tolist() == greedy(ours, tokenizer(text).input_ids, 5)
    beams = theirs.generate(**batch, max_new_tokens=5, num_beams=3, do_sample=False, num_return_sequences=2)
    assert beams.shape[0] == 4

    # the best beam is at least as probable as the greedy text
    def log_probability(row: torch.Tensor) -> float:
        ids = row[row != tokenizer.eos_token_id].unsqueeze(0)
        steps = ours(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return float(steps[-5:].sum())

    assert log_probability(beams[0]) >= log_probability(written[0]) - 1e-4
    # the end-of-document token ends the text
    theirs.lm_head.weight.zero_()
    theirs.generation_config.suppress_tokens = [i for i in range(301) if i != tokenizer.eos_token_id]
    ended = theirs.generate(**batch, max_new_tokens=5, do_sample=False)
    assert ended.shape[1] == width + 1
    assert (ended[:, -1] == tokenizer.eos_token_id).all()


@torch.no_grad()
def test_bfloat16_is_as_exact_as_ours(tmp_path: Path) -> None:
    exact, _ = export(tmp_path / "exact", VARIANTS["default"])
    ours, theirs = export(tmp_path / "low", VARIANTS["default"], dtype="bfloat16")
    assert theirs.dtype == torch.bfloat16
    ids = torch.tensor(tokens(60, 60))
    error, own = ((m - exact(ids)).norm() / exact(ids).norm() for m in (theirs(ids).logits, ours(ids)))
    assert 0 < error < 1.2 * own


@torch.no_grad()
def test_softmax_is_stock_qwen3_with_the_same_greedy_decoding(tmp_path: Path) -> None:
    for attention in (SoftmaxConfig(), SoftmaxConfig(window_size=5)):
        folder = tmp_path / str(attention.window_size)
        ours, theirs = export(folder, attention, tie_embeddings=False)
        assert type(theirs) is transformers.Qwen3ForCausalLM
        assert not (folder / "hf" / "modeling_parallax.py").exists()
        prompts = tokens(11, 3, 7)
        written = theirs.generate(**left_padded(prompts), max_new_tokens=8, do_sample=False, pad_token_id=PAD)
        assert written[:, 11:].tolist() == [greedy(ours, prompt, 8) for prompt in prompts]


def test_every_parallax_option_is_in_the_config_and_checked(tmp_path: Path) -> None:
    _, theirs = export(tmp_path, VARIANTS["all"])
    table = to_config_json(settings(VARIANTS["all"]), dtype="float32", num_positions=None, eos_token_id=None)
    for field in fields(ParallaxConfig):
        if field.name not in ("kind", "impl"):
            assert table[field.name] == getattr(VARIANTS["all"], field.name)
            assert getattr(theirs.config, field.name) == table[field.name]
    config_class = type(theirs.config)
    for name, value in (
        ("r_heads", "all"),
        ("gate", "layer"),
    ):
        with pytest.raises(ValueError, match=f"{name} is {value!r}, wanted one of"):
            config_class(**{name: value})
    fresh = type(theirs)(config_class(**{**table, "r_gain_init": 0.5, "num_plain_layers": 0}))
    gains = [p for n, p in fresh.named_parameters() if n.endswith("r_norm.weight")]
    assert len(gains) == SIZE.num_layers
    assert all((gain == 0.5).all() for gain in gains)


@torch.no_grad()
def test_bounds_of_documents_alone_tell_them_apart(tmp_path: Path) -> None:
    # positions restart too: without RoPE on r they change the logits
    for name in ("default", "no RoPE on r", "all"):
        ours, theirs = export(tmp_path / name.replace(" ", "_"), VARIANTS[name])
        ids = torch.tensor(tokens(20))
        bounds = torch.tensor([0, 5, 5, 13, 14, 20], dtype=torch.int32)
        expected = ours(ids, cu_seqlens=bounds)
        assert (expected - ours(ids)).abs().max() > 0.05
        for given in (
            {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds.long()},
            {"cu_seq_lens_k": bounds},
            {"cu_seq_lens_q": bounds, "attention_mask": torch.ones_like(ids)},
            {"cu_seq_lens_q": bounds, "position_ids": torch.arange(20).unsqueeze(0)},
        ):
            out = theirs(ids, **given)
            close(out.logits, expected)
            assert out.past_key_values is None


def test_wrong_bounds_of_documents_raise(tmp_path: Path) -> None:
    _, theirs = export(tmp_path, VARIANTS["default"])
    ids = torch.tensor(tokens(6))
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    jumping = torch.tensor([[0, 1, 0, 2, 3, 4]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    for given, message in (
        ({"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds + 1}, "cu_seq_lens_q differs from cu_seq_lens_k"),
        ({"cu_seq_lens_q": bounds[1:]}, r"cu_seq_lens is \[2, 6\] for 1 rows of 6 tokens"),
        ({"cu_seq_lens_q": bounds[:-1]}, r"cu_seq_lens is \[0, 2\] .* rise from 0 to 6"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 2, 6])}, r"bounds that rise"),
        ({"input_ids": ids.repeat(2, 1), "cu_seq_lens_q": bounds}, r"for 2 rows of 6 tokens; wanted one row"),
        ({"cu_seq_lens_q": bounds, "position_ids": jumping}, "position_ids jump inside a document"),
        ({"cu_seq_lens_q": bounds, "attention_mask": mask}, "without padding, but attention_mask has zeros"),
        ({"cu_seq_lens_q": bounds, "past_key_values": transformers.DynamicCache()}, "leave out past_key_val"),
        ({"cu_seq_lens_q": bounds, "use_cache": True}, "use_cache is True, but a row has several documents"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]]), "use_cache": True}, "use_cache is True, but"),
    ):
        with pytest.raises(ValueError, match=message):
            theirs(**{"input_ids": ids, **given})


def test_arguments_that_would_change_the_result_raise(tmp_path: Path) -> None:
    _, theirs = export(tmp_path, VARIANTS["default"])
    ids = torch.tensor(tokens(6))
    for name, value in (
        ("output_attentions", True),
        ("cache", transformers.DynamicCache()),
        ("position_bias", torch.zeros(1)),
        ("softcap", 30.0),
        ("s_aux", torch.zeros(6)),
        ("head_mask", torch.ones(6)),
        ("is_causal", False),
    ):
        with pytest.raises(NotImplementedError, match=f"{name}.* is not supported"):
            theirs(ids, **{name: value})
    assert theirs(ids, output_attentions=False, softcap=None, is_causal=True).logits.isfinite().all()
    theirs.config.is_causal = False
    with pytest.raises(NotImplementedError, match="the correction is causal"):
        theirs(ids)
    theirs.config.is_causal = True
    with pytest.raises(ValueError, match="give exactly one of input_ids and inputs_embeds"):
        theirs()
    config_class = type(theirs.config)
    for name, value in (("attention_dropout", 0.1), ("sliding_window", 5)):
        with pytest.raises(ValueError, match=f"{name} is {value}, wanted"):
            config_class(use_sliding_window=True, **{name: value})
    for name in ("flex_attention", "flash_attention_2"):
        with pytest.raises((ValueError, ImportError), match=r"does not support|not installed"):
            transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "hf", trust_remote_code=True, attn_implementation=name
            )


@torch.no_grad()
def test_masks_of_transformers_own_kinds_give_the_same_logits(tmp_path: Path) -> None:
    _, theirs = export(tmp_path, VARIANTS["all"])
    eager = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, attn_implementation="eager"
    )
    batch = left_padded(tokens(9, 4))
    # what padding sees is arbitrary
    logits = (m(**batch).logits[batch["attention_mask"] == 1] for m in (eager, theirs))
    close(*logits)
    # a 4D mask is complete: without causality only the last query keeps its logits
    ids = torch.tensor(tokens(5))
    for mask in (torch.ones(1, 1, 5, 5, dtype=torch.bool), torch.zeros(1, 6, 5, 5)):
        found, causal = theirs(ids, attention_mask=mask).logits, theirs(ids).logits
        assert (found[:, 0] - causal[:, 0]).abs().max() > 0.05


@torch.no_grad()
def test_a_cast_to_16_bits_and_other_kinds_of_rope(tmp_path: Path) -> None:
    _, theirs = export(tmp_path, VARIANTS["default"])
    ids = torch.tensor(tokens(9))
    positions = torch.arange(3000, 3009).unsqueeze(0)
    low = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, dtype=torch.bfloat16
    )
    expected = low(ids, position_ids=positions).logits
    assert torch.equal(theirs.bfloat16()(ids, position_ids=positions).logits, expected)
    # without probes it is Qwen3, with YaRN too
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    sizes = {name: getattr(theirs.config, name) for name in ("hidden_size", "num_hidden_layers", "head_dim")}
    sizes |= {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 52,
        "vocab_size": VOCAB,
    }
    plain = type(theirs)(type(theirs.config)(num_plain_layers=3, rope_parameters=dict(yarn), **sizes))
    stock = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(rope_parameters=dict(yarn), **sizes))
    stock.load_state_dict(plain.state_dict())
    close(plain(ids, position_ids=positions).logits, stock(ids, position_ids=positions).logits)


def test_the_files_import_torch_and_transformers_only() -> None:
    imported = set()
    for name in PARALLAX_FILES:
        nodes = [*ast.walk(ast.parse((FOLDER / name).read_text()))]
        optional = {id(child) for n in nodes if isinstance(n, ast.Try) for child in ast.walk(n)}
        for node in nodes:
            if id(node) in optional:
                continue
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("." * node.level + (node.module or "").partition(".")[0])
    assert imported == {"collections", "torch", "transformers", "typing", ".attention_parallax"}
