"""Parallax in transformers: Qwen3 with a learned covariance correction of its softmax attention.

`python -m models.convert to-hf` copies this file and attention_parallax.py to the folder that it writes. They
import only torch and transformers (5.6 or later). Load it by
AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True). All but the attention is transformers' own
Qwen3: masks, caches, gradient checkpointing, packed rows and the loss.

    o_i = vbar_i - Sigma_KV,i rho_i = sum_j p_ij (1 + tbar_i - t_ij) v_j
    p = softmax(q.k / sqrt(K)),  t_ij = k_j.rho_i,  tbar_i = sum_j p_ij t_ij,  rho = the probe, W_R x

Source: Parallax, arXiv 2605.29157. Letters: B batch, T new tokens, S tokens in the cache and new, D width, H
query heads, G key/value heads, K head width, N documents. On a GPU attention without padding runs on this
project's kernels where its package `parallax` is installed; everywhere else it is eager, in blocks of queries
and in at least fp32.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3RotaryEmbedding,
)

# in an export the files have no package that they could name
from .attention_parallax import eager_attention, has_kernels, kernel_attention

_OPTIONS: dict[str, Any] = {
    **{"window_size": None, "r_heads": "query", "r_rank": None, "r_norm": True, "r_gain_init": 0.25},
    **{"r_scale": 1.0, "rope_on_r": True, "gate": None, "num_plain_layers": 0},
}
_CHOICES = {"r_heads": ("query", "kv"), "gate": (None, "token", "head")}
# arguments of other attentions, and why this one would return another result than the caller wants
_REFUSED = {
    "output_attentions": "the attention keeps no weights; use hooks on model.layers",
    "cache": "there is no paged attention; use generate without continuous batching",
    "position_bias": "scores take no bias; give a 4D attention_mask",
    "softcap": "scores are not capped",
    "s_aux": "there are no attention sinks",
    "head_mask": "heads cannot be masked",
}


class ParallaxQwen3Config(Qwen3Config):
    """Qwen3's config and Parallax's options; an option without such a value raises a ValueError.

    Attributes:
        window_size: Number of keys that a query sees, its own included; None for no window.
        r_heads: "query" for a probe per query head, "kv" for one per key/value head.
        r_rank: Rank of W_R as a product of two matrices; None for one matrix.
        r_norm: RMSNorm on each head of the probe.
        r_gain_init: Initial gain of that norm.
        r_scale: Fixed factor of the normalized probe.
        rope_on_r: RoPE on the probe, with the query's positions.
        gate: A sigmoid gate on the probe: "token" for one per token, "head" for one per query head, or None.
        num_plain_layers: Number of first layers without correction.
    """

    model_type = "parallax_qwen3"
    # Qwen3's plans do not know W_R
    base_model_tp_plan = None
    base_model_pp_plan = None

    def __init__(self, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name, default) for name, default in _OPTIONS.items()}
        for name, allowed in _CHOICES.items():
            if own[name] not in allowed:
                raise ValueError(f"{name} is {own[name]!r}, wanted one of {', '.join(map(repr, allowed))}")
        if kwargs.get("attention_dropout"):
            raise ValueError(f"attention_dropout is {kwargs['attention_dropout']}, wanted 0: there is none")
        window_size = own["window_size"]
        if kwargs.get("use_sliding_window") and kwargs.get("sliding_window") != window_size:
            raise ValueError(
                f"sliding_window is {kwargs.get('sliding_window')}, wanted window_size, {window_size}"
            )
        # masks and caches know a window by Qwen3's names
        kwargs |= {"use_sliding_window": window_size is not None, "sliding_window": window_size}
        kwargs |= {"max_window_layers": 0, "layer_types": None}
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)


def _rotate(x_BNTK: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply RoPE to heads in at least fp32."""
    cos, sin = (angles_BTK.unsqueeze(1) for angles_BTK in rope)
    left, right = x_BNTK.chunk(2, dim=-1)
    return (x_BNTK * cos + torch.cat((-right, left), dim=-1) * sin).to(x_BNTK.dtype)


class _ProbeNorm(nn.RMSNorm):
    """RMSNorm with an initial gain; transformers sets gains to one where "RMSNorm" is in the class's name."""

    def __init__(self, width: int, eps: float, gain: float) -> None:
        super().__init__(width, eps=eps)
        nn.init.constant_(self.weight, gain)


class ParallaxAttention(Qwen3Attention):
    """Qwen3's attention, with a probe in layers from num_plain_layers on."""

    def __init__(self, config: ParallaxQwen3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.has_probe = layer_idx >= config.num_plain_layers
        if not self.has_probe:
            return
        width, num_heads = config.hidden_size, config.num_attention_heads
        width_r = self.head_dim * num_heads
        if config.r_heads == "kv":
            width_r //= self.num_key_value_groups
        if config.r_rank is None:
            self.r_proj = nn.Linear(width, width_r, bias=False)
        else:
            self.r_in_proj = nn.Linear(width, config.r_rank, bias=False)
            self.r_out_proj = nn.Linear(config.r_rank, width_r, bias=False)
        if config.r_norm:
            self.r_norm = _ProbeNorm(self.head_dim, config.rms_norm_eps, config.r_gain_init)
        if config.gate is not None:
            self.g_proj = nn.Linear(width, num_heads if config.gate == "head" else 1, bias=False)

    def _heads(self, x_BTF: torch.Tensor) -> torch.Tensor:
        return x_BTF.unflatten(-1, (-1, self.head_dim))

    def _probe(self, x_BTD: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Compute the probe g * r_scale * rope(norm(W_R x)), `[B, H, T, K]`."""
        config = self.config
        r_BTF = self.r_proj(x_BTD) if config.r_rank is None else self.r_out_proj(self.r_in_proj(x_BTD))
        r_BTHK = self._heads(r_BTF)
        if config.r_norm:
            r_BTHK = self.r_norm(r_BTHK)
        if config.r_scale != 1.0:
            r_BTHK = r_BTHK * config.r_scale
        r_BHTK = r_BTHK.transpose(1, 2)
        if config.rope_on_r:
            r_BHTK = _rotate(r_BHTK, rope)
        if config.r_heads == "kv":
            r_BHTK = r_BHTK.repeat_interleave(self.num_key_value_groups, dim=1)
        if config.gate is not None:
            r_BHTK = r_BHTK * torch.sigmoid(self.g_proj(x_BTD)).transpose(1, 2).unsqueeze(-1)
        return r_BHTK

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        document_bounds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Mix T new tokens with their past.

        Args:
            hidden_states: `[B, T, D]`.
            position_embeddings: Cosines and sines of the rotary angles, `[B, T, K]`.
            attention_mask: As in eager_attention.
            past_key_values: KV cache, to which the new tokens are appended.
            document_bounds: As in kernel_attention; the mask, if there is one, knows the documents too.
            **kwargs: Ignored.

        Returns:
            `[B, T, D]`, and None for the weights.
        """
        x_BTD, rope = hidden_states, position_embeddings
        q_BHTK = _rotate(self.q_norm(self._heads(self.q_proj(x_BTD))).transpose(1, 2), rope)
        k_BGSK = _rotate(self.k_norm(self._heads(self.k_proj(x_BTD))).transpose(1, 2), rope)
        v_BGSK = self._heads(self.v_proj(x_BTD)).transpose(1, 2)
        if past_key_values is not None:
            k_BGSK, v_BGSK = past_key_values.update(k_BGSK, v_BGSK, self.layer_idx)
        r_BHTK = self._probe(x_BTD, rope) if self.has_probe else None
        # the kernel of one new token has no gradient
        needs_own = q_BHTK.shape[2] == 1 and torch.is_grad_enabled() and q_BHTK.requires_grad
        if attention_mask is None and has_kernels(x_BTD.device) and not needs_own:
            window_size = self.config.window_size
            o_BHTK = kernel_attention(q_BHTK, r_BHTK, k_BGSK, v_BGSK, window_size, document_bounds)
        else:
            o_BHTK = eager_attention(q_BHTK, r_BHTK, k_BGSK, v_BGSK, attention_mask)
        return self.o_proj(o_BHTK.transpose(1, 2).flatten(2).to(v_BGSK.dtype)), None


class ParallaxRotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's RoPE with angles in at least fp32, also in a model that was cast to 16 bits."""

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute cosines and sines, `[B, T, K]`, of positions `[B, T]`."""
        # the dtype of x is that of the angles
        x = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        return super().forward(x, position_ids, layer_type)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        inv_freq = self.inv_freq
        super()._apply(fn, recurse)
        if not inv_freq.is_meta:
            self._buffers["inv_freq"] = inv_freq.to(self.inv_freq.device)
        return self


def _document_bounds(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Return the bounds of documents in flattened rows, `[N + 1]` int32; None if each row is one document.

    As in transformers, a document starts where a position is not the one before it plus 1.
    """
    starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True)
    if int(starts.sum()) == starts.shape[0]:
        return None
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel()).to(torch.int32)


def _restarted_positions(
    bounds: torch.Tensor, batch: int, num_tokens: int, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return each token's position in its document, `[1, T]`.

    Args:
        bounds: cu_seq_lens, `[N + 1]`.
        batch: B.
        num_tokens: T.
        position_ids: As given with the bounds, or None.

    Raises:
        ValueError: The bounds are not those of one row, or the positions jump inside a document.
    """
    slots = torch.arange(num_tokens, device=bounds.device)
    first = bounds[(torch.searchsorted(bounds, slots, right=True) - 1).clamp(max=bounds.shape[0] - 2)]
    restarted = (slots - first).unsqueeze(0)
    if torch.compiler.is_compiling():
        return restarted
    if batch != 1 or int(bounds[0]) != 0 or int(bounds[-1]) != num_tokens or bool((bounds.diff() < 0).any()):
        raise ValueError(
            f"cu_seq_lens is {bounds.tolist()} for {batch} rows of {num_tokens} tokens; wanted one row, and "
            f"bounds that rise from 0 to {num_tokens}, padding as its own document"
        )
    if position_ids is not None:
        jumps = (position_ids.to(bounds.device) - restarted).diff(dim=-1) != 0
        if bool((jumps & (restarted[:, 1:] != 0)).any()):
            raise ValueError("position_ids jump inside a document of cu_seq_lens; give one of them")
    return restarted


def _cu_seq_lens(
    kwargs: dict[str, Any], attention_mask: Any, past_key_values: Cache | None
) -> torch.Tensor | None:
    """Take the bounds of packed documents out of the keyword arguments.

    Raises:
        ValueError: Queries and keys have different bounds, or there is padding or a cache.
    """
    queries, keys = (kwargs.pop(f"cu_seq_lens_{name}", None) for name in "qk")
    if queries is None or keys is None:
        bounds = keys if queries is None else queries
    elif queries.shape != keys.shape or bool((queries != keys).any()):
        raise ValueError("cu_seq_lens_q differs from cu_seq_lens_k; wanted documents that see themselves")
    else:
        bounds = queries
    if bounds is None:
        return None
    if past_key_values is not None:
        raise ValueError("cu_seq_lens packs documents, which have no cache; leave out past_key_values")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("cu_seq_lens packs documents without padding, but attention_mask has zeros")
    return bounds


def _is_unmasked(attention_mask: Any, past_key_values: Cache | None, num_tokens: int) -> bool:
    """Return whether T > 1 new tokens have neither padding, nor a mask, nor a past."""
    if num_tokens == 1 or (past_key_values is not None and int(past_key_values.get_seq_length()) > 0):
        return False
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return bool(attention_mask.all())
    return attention_mask is None


class ParallaxQwen3Model(Qwen3Model):
    """Embedding, blocks, final norm."""

    config_class = ParallaxQwen3Config
    _supports_flash_attn = False
    _supports_flex_attn = False
    # other backends would leave out the correction
    _supports_attention_backend = False

    def __init__(self, config: ParallaxQwen3Config) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            layer.self_attn = ParallaxAttention(config, number)
        self.rotary_emb = ParallaxRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of T new tokens.

        Args:
            input_ids: Token ids `[B, T]`.
            attention_mask: 1 for tokens, 0 for padding, `[B, S]`; or transformers' 4D masks.
            position_ids: Positions `[B, T]`; None to derive them from mask and cache. Without a mask and a
                cache, a row that restarts its positions contains several documents, which do not see each
                other.
            past_key_values: KV cache of the past tokens; extended in place.
            inputs_embeds: Embeddings `[B, T, D]` instead of input_ids.
            use_cache: Return the KV cache; None for the config's value, packed documents have none.
            **kwargs: cu_seq_lens_q and cu_seq_lens_k, bounds `[N + 1]` of documents packed in one row; the
                rest as in Qwen3Model.

        Returns:
            Hidden states `[B, T, D]` after the final norm, and the cache.

        Raises:
            ValueError: Packed documents with a cache or padding, or with bounds that do not fit.
            NotImplementedError: An argument that this attention does not have.
        """
        self._refuse(kwargs)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        batch, num_tokens = inputs.shape[:2]
        bounds = _cu_seq_lens(kwargs, attention_mask, past_key_values)
        if bounds is not None:
            bounds = bounds.to(inputs.device, torch.int32)
            position_ids = _restarted_positions(bounds, batch, num_tokens, position_ids)
            attention_mask = None
        elif position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            # padding does not count: a probe without RoPE depends on absolute positions
            counted = attention_mask.to(inputs.device).long().cumsum(dim=-1)
            position_ids = (counted - 1).clamp(min=0)[:, -num_tokens:]
        elif position_ids is not None and attention_mask is None and past_key_values is None:
            bounds = _document_bounds(position_ids.expand(batch, -1))
        if bounds is not None and use_cache:
            raise ValueError("use_cache is True, but a row has several documents, of which none has a cache")
        if has_kernels(inputs.device) and _is_unmasked(attention_mask, past_key_values, num_tokens):
            attention_mask = dict.fromkeys(self.config.layer_types or ())
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache if bounds is None else False,
            document_bounds=bounds,
            **kwargs,
        )

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        """Raise for arguments of other attentions that would change the result; the rest has no effect."""
        for name, reason in _REFUSED.items():
            value = kwargs.get(name, getattr(self.config, name, None))
            if value is not None and value is not False:
                raise NotImplementedError(f"{name} is not supported: {reason}")
        if not kwargs.get("is_causal", getattr(self.config, "is_causal", True)):
            raise NotImplementedError("is_causal=False is not supported: the correction is causal")


class ParallaxHead(nn.Linear):
    """The output projection, with logits in at least fp32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute logits; 16-bit products on CUDA are rounded only if they need gradients."""
        x, weight = input, self.weight
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if x.is_cuda and x.dtype == weight.dtype in (torch.bfloat16, torch.float16) and not needs_grad:
            return torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32).unflatten(0, x.shape[:-1])
        logits = super().forward(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class ParallaxQwen3ForCausalLM(Qwen3ForCausalLM):
    """The language model; its forward is Qwen3ForCausalLM's, with logits in at least fp32."""

    config_class = ParallaxQwen3Config
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __init__(self, config: ParallaxQwen3Config) -> None:
        # past Qwen3ForCausalLM's own, which would build a Qwen3Model
        super(Qwen3ForCausalLM, self).__init__(config)
        self.vocab_size = config.vocab_size
        self.model = ParallaxQwen3Model(config)
        self.lm_head = ParallaxHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
