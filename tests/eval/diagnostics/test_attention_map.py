"""Attention maps: the weights of a head over a prompt, and what is refused."""

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from data.tokenizer import Tokenizer
from errors import UserError
from eval import figure
from eval.diagnostics.attention_map import map_of, plot_map, prompt_map, token_labels
from models.attention.key_values import KeyValueAttention
from models.config import GatedDeltaNetConfig, ParallaxConfig, SoftmaxConfig
from parallax.reference import parallax_reference_stats
from tests.eval.conftest import build

TOKENS = [5, 9, 200, 41, 9, 17]


@pytest.mark.parametrize("window", [None, 3])
def test_the_combined_weights_give_the_output_of_the_reference(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, r, k, v = (torch.randn(7, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    found = map_of(q, r, k, window_size=window)
    wanted = parallax_reference_stats(*(x[None, :, None] for x in (q, r, k, v)), window_size=window)
    torch.testing.assert_close(found.combined_TT @ v, wanted.o[0, :, 0])
    torch.testing.assert_close(found.softmax_TT @ v, wanted.vbar[0, :, 0])
    assert found.correction_TT is not None
    torch.testing.assert_close(found.softmax_TT + found.correction_TT, found.combined_TT)
    torch.testing.assert_close(found.correction_TT.sum(-1), torch.zeros(7).double(), atol=1e-12, rtol=0)
    plain = map_of(q, None, k, window_size=window)
    assert plain.correction_TT is None
    assert plain.combined_TT is plain.softmax_TT


def test_the_map_of_a_prompt_is_that_of_the_chosen_head() -> None:
    model = build(ParallaxConfig(r_gain_init=1.0))
    found = prompt_map(model, TOKENS, layer=2, head=3)
    inputs: list[tuple[torch.Tensor, ...]] = []
    module = list(model.attention_modules())[2]
    assert isinstance(module, KeyValueAttention)
    module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))
    model(torch.tensor([TOKENS]))
    x, rope = inputs[0][0], inputs[0][1]
    q, k, _ = module.project(x, rope)  # pyrefly: ignore [bad-argument-type]
    r = module.probe(x, rope)  # pyrefly: ignore [bad-argument-type]
    assert r is not None
    shared = 3 // (q.shape[2] // k.shape[2])
    wanted = map_of(q[0, :, 3], r[0, :, 3], k[0, :, shared])
    torch.testing.assert_close(found.combined_TT, wanted.combined_TT)
    other = prompt_map(model, TOKENS, layer=2, head=0)
    assert not torch.allclose(found.combined_TT, other.combined_TT)


def test_what_cannot_be_drawn_is_refused() -> None:
    model = build(SoftmaxConfig())
    with pytest.raises(UserError, match="--layer is 4, but the model has layers 0 to 3"):
        prompt_map(model, TOKENS, layer=4, head=0)
    with pytest.raises(UserError, match="--head is -1, but"):
        prompt_map(model, TOKENS, layer=0, head=-1)
    with pytest.raises(UserError, match="--prompt has 65 tokens, must have 1 to 64"):
        prompt_map(model, [1] * 65, layer=0, head=0)
    with pytest.raises(UserError, match="GatedDeltaNet has no weights over keys to draw; softmax, Parallax"):
        prompt_map(build(GatedDeltaNetConfig()), TOKENS, layer=0, head=0)


def test_a_picture_is_written_with_a_label_for_each_token(corpus: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(corpus)
    (tokens,) = tokenizer.encode_prompts(["the model\n of $x$"])
    labels = token_labels(tokens, tokenizer)
    assert len(labels) == len(tokens)
    assert not any(" " in label or "\n" in label for label in labels)
    found = prompt_map(build(ParallaxConfig()), tokens, layer=0, head=0)
    plot_map(found, labels, "a head", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "map.pdf").exists()


def test_the_scale_of_colors_is_that_of_most_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figure, "save", lambda found, _: drawn.append(found))
    for attention, num_panels in ((ParallaxConfig(), 3), (SoftmaxConfig(), 1)):
        found = prompt_map(build(attention), TOKENS, layer=1, head=2)
        plot_map(found, [str(token) for token in TOKENS], "a head", tmp_path / "map.png")
        maps = [axes for axes in drawn[-1].axes if axes.images]
        shown = [found.softmax_TT, found.correction_TT, found.combined_TT][:num_panels]
        assert len(maps) == num_panels
        size = len(TOKENS)
        flat = [
            abs(float(w[i, j])) for w in shown if w is not None for i in range(size) for j in range(i + 1)
        ]
        top = float(torch.tensor(flat).quantile(0.99))
        for axes in maps:
            assert axes.images[0].get_clim() == (pytest.approx(-top), pytest.approx(top))
            assert [label.get_text() for label in axes.get_xticklabels()] == [str(token) for token in TOKENS]
        drawn[-1].draw_without_rendering()
