"""The same calls of transformers on the stock export and the Parallax export, each beside our own model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from config import to_table, to_toml
from models.checkpoint.load import load_model
from models.config import ModelConfig, ParallaxConfig, SoftmaxConfig
from models.convert.format import to_hugging_face
from models.convert.from_hf import convert_from_hf
from models.convert.to_hf import convert_to_hf
from models.qwen3 import Qwen3
from models.sizes import ModelSize
from tests.models.test_checkpoint import save_run
from tokens import IGNORE_INDEX

transformers = pytest.importorskip("transformers")
SIZE = ModelSize(width=36, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10, mlp_width=52)
ATTENTIONS = {
    "softmax": SoftmaxConfig(),
    "parallax": ParallaxConfig(),
    # a probe without RoPE depends on absolute positions
    "parallax, all options": ParallaxConfig(
        window_size=6, r_heads="kv", r_rank=7, r_scale=0.5, gate="head", num_plain_layers=1, rope_on_r=False
    ),
}
PROMPTS = ("a model of", "the", "past tokens while gradients flow")


class Export(NamedTuple):
    """A random model of this project, and its export as loaded by transformers."""

    ours: Qwen3
    theirs: Any
    tokenizer: Any
    folder: Path


@pytest.fixture(scope="module", params=ATTENTIONS.values(), ids=list(ATTENTIONS))
def folder(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its export with the corpus' 300 tokens; the last ids of the model are free."""
    config = ModelConfig(
        size="custom", custom_size=SIZE, vocab_size=304, attention=request.param, init_std=0.2
    )
    folder = tmp_path_factory.mktemp("export")
    save_run(folder / "run", config)
    tables = {"model": to_table(config), "data": {"tokenizer": str(corpus / "tokenizer.json")}}
    (folder / "run" / "config.toml").write_text(to_toml(tables))
    convert_to_hf(folder / "run", folder / "hf")
    return folder


@pytest.fixture
def export(folder: Path) -> Export:
    theirs = load_theirs(folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf", padding_side="left")
    return Export(load_model(folder / "run"), theirs, tokenizer, folder)


def load_theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(1, 300, (n,), generator=generator).tolist() for n in lengths]


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance * float(b.detach().abs().max()), rtol=0)


def greedy(model: Qwen3, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy decoding by full forwards without a cache."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def our_gradients(ours: Qwen3, *rows: list[int]) -> dict[str, torch.Tensor]:
    """The gradients of the mean loss over the tokens of all rows, by Hugging Face's names."""
    ours.requires_grad_(True)
    losses = [ours(torch.tensor([row[:-1]]), labels_BT=torch.tensor([row[1:]])) for row in rows]
    (torch.stack(losses).sum() / sum(len(row) - 1 for row in rows)).backward()
    return to_hugging_face({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})


def assert_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=2e-6, rtol=1e-4, msg=name)


def gradients(theirs: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in theirs.named_parameters()}


def trainer_accumulates(export: Export, tmp_path: Path) -> None:
    rows = documents(60, 3, 5, 4)
    before = {name: p.detach().clone() for name, p in export.theirs.named_parameters()}
    sgd = torch.optim.SGD(export.theirs.parameters(), lr=1.0)
    settings = transformers.TrainingArguments(
        tmp_path / "trainer",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(rows),
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        export.theirs,
        settings,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=transformers.DataCollatorForSeq2Seq(export.tokenizer),
        optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)),
    )
    result = trainer.train()
    after = dict(export.theirs.named_parameters())
    assert_gradients(
        {name: before[name] - after[name].detach() for name in before}, our_gradients(export.ours, *rows)
    )
    assert result.training_loss > 0


def packed_rows_by_positions(export: Export, tmp_path: Path) -> None:
    lengths = (4, 1, 9, 140)
    rows = documents(*lengths)
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": row} for row in rows])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    out = export.theirs(**batch, use_cache=False)
    close(out.logits, export.ours(batch["input_ids"], cu_seqlens=bounds(*lengths)))
    for row, logits in zip(rows, out.logits[0].split(lengths), strict=True):
        close(logits, export.ours(torch.tensor([row]))[0])
    out.loss.backward()
    expected = our_gradients(export.ours, *(row for row in rows if len(row) > 1))
    assert_gradients(gradients(export.theirs), expected)


def packed_rows_by_cu_seq_lens(export: Export, tmp_path: Path) -> None:
    lengths = (4, 9, 2, 3)
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": row} for row in documents(*lengths)])
    assert batch["cu_seq_lens_q"].tolist() == bounds(*lengths).tolist()
    logits = export.theirs(**batch, use_cache=False).logits
    close(logits, export.ours(batch["input_ids"], cu_seqlens=bounds(*lengths)))


def several_packed_rows(export: Export, tmp_path: Path) -> None:
    first, second = documents(7, 7)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
    logits = export.theirs(torch.tensor([first, second]), position_ids=positions, use_cache=False).logits
    close(logits[0], export.ours(torch.tensor([first]), cu_seqlens=bounds(3, 4))[0])
    close(logits[1], export.ours(torch.tensor([second]), cu_seqlens=bounds(5, 2))[0])


def gradient_checkpointing(export: Export, tmp_path: Path) -> None:
    rows = documents(12, 12)
    expected = our_gradients(export.ours, *rows)
    mlp = export.theirs.model.layers[0].mlp
    for use_reentrant in (False, True):
        export.theirs.zero_grad()
        export.theirs.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        export.theirs.enable_input_require_grads()
        ids = torch.tensor(rows)
        with patch.object(type(mlp), "forward", autospec=True, side_effect=type(mlp).forward) as forward:
            export.theirs.train()(ids, labels=ids).loss.backward()
        # in the backward once more
        assert forward.call_count == 2 * SIZE.num_layers
        assert_gradients(gradients(export.theirs), expected)


def left_padding(export: Export, tmp_path: Path, **options: Any) -> None:
    batch = export.tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    assert (batch["attention_mask"] == 0).any()
    written = export.theirs.generate(**batch, max_new_tokens=9, do_sample=False, **options)
    width = batch["input_ids"].shape[1]
    for row, prompt in zip(written, PROMPTS, strict=True):
        ids = export.tokenizer(prompt).input_ids
        assert row[:width].tolist()[-len(ids) :] == ids
        assert row[width:].tolist() == greedy(export.ours, ids, 9)


def static_cache(export: Export, tmp_path: Path) -> None:
    left_padding(export, tmp_path, cache_implementation="static")


def compiled_static_cache(export: Export, tmp_path: Path) -> None:
    # on a GPU transformers compiles by itself
    compilation = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    compilation._compile_all_devices = True
    left_padding(export, tmp_path, cache_implementation="static", compile_config=compilation)


def no_cache(export: Export, tmp_path: Path) -> None:
    left_padding(export, tmp_path, use_cache=False)


def stop_strings(export: Export, tmp_path: Path) -> None:
    ids = export.tokenizer(PROMPTS[0]).input_ids
    text = export.tokenizer.decode(greedy(export.ours, ids, 9))
    stop = next(text[i : i + 2] for i in range(4, len(text)) if text.find(text[i : i + 2]) == i)
    written = export.theirs.generate(
        torch.tensor([ids]),
        max_new_tokens=9,
        do_sample=False,
        stop_strings=[stop],
        tokenizer=export.tokenizer,
    )
    found = export.tokenizer.decode(written[0, len(ids) :])
    assert text.startswith(found)
    assert stop in found
    assert len(found) < len(text)


def beam_search(export: Export, tmp_path: Path) -> None:
    prompt, num_beams, num_tokens = export.tokenizer(PROMPTS[0]).input_ids, 4, 6
    beams: list[tuple[float, list[int]]] = [(0.0, prompt)]
    for _ in range(num_tokens):
        grown = []
        for score, ids in beams:
            steps = export.ours(torch.tensor([ids]))[0, -1].log_softmax(-1)
            steps[export.tokenizer.eos_token_id] = -torch.inf
            best = steps.topk(num_beams)
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            grown += [(score + value, [*ids, token]) for value, token in pairs]
        beams = sorted(grown, reverse=True)[:num_beams]
    found = export.theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
    )
    assert found.tolist() == [ids for _, ids in beams]


def without_prompt(export: Export, tmp_path: Path) -> None:
    eos = export.tokenizer.eos_token_id
    written = export.theirs.generate(max_new_tokens=5, do_sample=False)
    assert written.tolist() == [[eos, *greedy(export.ours, [eos], 5)]]


def lora(export: Export, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.tensor(documents(20, 20))
    adapted = peft.get_peft_model(export.theirs, peft.LoraConfig(r=3, target_modules="all-linear"))
    close(adapted(ids).logits, export.ours(ids))
    sgd = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.3)
    losses = []
    for _ in range(4):
        sgd.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        sgd.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    # with the adapters in its weights it is a model of ours again
    expected = adapted.eval()(ids).logits.detach()
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    convert_from_hf(tmp_path / "merged", tmp_path / "again")
    close(load_model(tmp_path / "again")(ids), expected, 1e-4)


def save_and_reload(export: Export, tmp_path: Path) -> None:
    ids = torch.tensor(documents(20, 20))
    export.theirs.save_pretrained(tmp_path / "saved")
    export.tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_theirs(tmp_path / "saved")(ids).logits, export.theirs(ids).logits)
    close(export.theirs(ids).logits, export.ours(ids))
    for folder in (export.folder / "hf", tmp_path / "saved"):
        base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
        out = base(ids, output_hidden_states=True)
        assert len(out.hidden_states) == SIZE.num_layers + 1
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        close(export.theirs.lm_head(out.last_hidden_state), export.ours(ids))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 300)
    convert_from_hf(tmp_path / "saved", tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == export.ours.config
    assert torch.equal(again(ids), export.ours(ids))


def pipeline(export: Export, tmp_path: Path) -> None:
    generate = transformers.pipeline(
        "text-generation", model=str(export.folder / "hf"), trust_remote_code=True, device="cpu"
    )
    for batch_size in (1, 3):
        options = {"max_new_tokens": 7, "do_sample": False, "return_full_text": False}
        found = generate(list(PROMPTS), batch_size=batch_size, **options)
        for (answer,), prompt in zip(found, PROMPTS, strict=True):
            ids = greedy(export.ours, export.tokenizer(prompt).input_ids, 7)
            assert answer["generated_text"] == export.tokenizer.decode(ids)


def keywords_without_effect(export: Export, tmp_path: Path) -> None:
    ids = torch.tensor(documents(20, 20))
    logits = export.theirs(ids, max_length_q=20, token_type_ids=torch.zeros_like(ids), return_dict=False)[0]
    close(logits, export.ours(ids))


def collator_keeps_the_label_of_the_end_of_a_document(export: Export, tmp_path: Path) -> None:
    collator = transformers.DataCollatorForLanguageModeling(export.tokenizer, mlm=False)
    eos = export.tokenizer.eos_token_id
    batch = collator([{"input_ids": [*row, eos]} for row in documents(5, 3)])
    assert (batch["labels"] == eos).sum() == 2
    assert batch["labels"][1].tolist().count(IGNORE_INDEX) == 2


CALLS: tuple[Callable[[Export, Path], None], ...] = (
    trainer_accumulates,
    packed_rows_by_positions,
    packed_rows_by_cu_seq_lens,
    several_packed_rows,
    gradient_checkpointing,
    left_padding,
    static_cache,
    compiled_static_cache,
    no_cache,
    stop_strings,
    beam_search,
    without_prompt,
    lora,
    save_and_reload,
    pipeline,
    keywords_without_effect,
    collator_keeps_the_label_of_the_end_of_a_document,
)


@pytest.mark.parametrize("call", CALLS, ids=[call.__name__ for call in CALLS])
def test_a_call_of_transformers_gives_what_our_model_gives(
    call: Callable[[Export, Path], None], export: Export, tmp_path: Path
) -> None:
    call(export, tmp_path)
