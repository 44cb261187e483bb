"""Parallax in transformers: Qwen3 with a learned covariance correction of its softmax attention.

`python -m models.convert to-hf` copies this file to the folder that it writes. It imports only torch and
transformers (5 or later). Load it by AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True);
generate supports left-padded batches.

    o_i = vbar_i - Sigma_KV,i rho_i = sum_j p_ij (1 + tbar_i - t_ij) v_j
    p = softmax(q.k / sqrt(K)),  t_ij = k_j.rho_i,  tbar_i = sum_j p_ij t_ij,  rho = the probe, W_R x

Source: Parallax, arXiv 2605.29157. Letters: B batch, T new tokens, S tokens in the cache and new, D width, H
query heads, G key/value heads, K head width, V vocabulary. Attention is eager, in blocks of queries and in at
least fp32; the KV cache keeps keys and values outside a window.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

_QUERY_BLOCK = 128
_DEFAULTS: dict[str, Any] = {
    **{"vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072},
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    **{"rope_theta": 1e6, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "max_position_embeddings": 4096},
    **{"tie_word_embeddings": True, "use_cache": True},
    **{"window_size": None, "r_heads": "query", "r_rank": None, "r_norm": True, "r_gain_init": 0.25},
    **{"r_scale": 1.0, "rope_on_r": True, "gate": None, "num_plain_layers": 0},
}
_CHOICES = {"r_heads": ("query", "kv"), "gate": (None, "token", "head")}


class ParallaxQwen3Config(PretrainedConfig):
    """Qwen3's dimensions and Parallax's options; an option without such a value raises a ValueError.

    Attributes:
        max_position_embeddings: Length of the rows in training, in tokens; not a limit.
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
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own protocol)

    def __init__(self, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name, default) for name, default in _DEFAULTS.items()}
        for name, allowed in _CHOICES.items():
            if own[name] not in allowed:
                raise ValueError(f"{name} is {own[name]!r}, wanted one of {', '.join(map(repr, allowed))}")
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)


class Step(NamedTuple):
    """The inputs of a forward that all layers share.

    Attributes:
        cos: Cosines of the rotary angles of the T new tokens, `[B, 1, T, K / 2]`, fp32.
        sin: Their sines.
        mask_BS: True for tokens, False for padding; None without padding.
        num_past: Tokens in the cache.
        cache: KV cache, to which layers append the new tokens; None without one.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    mask_BS: torch.Tensor | None
    num_past: int
    cache: Cache | None

    def rotate(self, x_BNTK: torch.Tensor) -> torch.Tensor:
        """Apply RoPE to heads in at least fp32."""
        left, right = x_BNTK.chunk(2, dim=-1)
        rotated = (left * self.cos - right * self.sin, right * self.cos + left * self.sin)
        return torch.cat(rotated, dim=-1).to(x_BNTK.dtype)


def _attend(
    q_BGRTK: torch.Tensor,
    r_BGRTK: torch.Tensor | None,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    visible_BTS: torch.Tensor,
) -> torch.Tensor:
    """Compute the formula above for a block of queries, R per key/value head; without r softmax attention."""
    shape = q_BGRTK.shape
    k, v = k_BGSK.to(q_BGRTK.dtype), v_BGSK.to(q_BGRTK.dtype)

    def scores(x_BGRTK: torch.Tensor) -> torch.Tensor:
        return (x_BGRTK.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, shape[2:4])

    logits = scores(q_BGRTK) * shape[-1] ** -0.5
    # not -inf: a padding query sees no key, and its softmax must not be NaN
    logits = logits.masked_fill(~visible_BTS[:, None, None], torch.finfo(logits.dtype).min)
    weights = logits.softmax(dim=-1)
    if r_BGRTK is not None:
        t = scores(r_BGRTK)
        weights = weights * (1 + (weights * t).sum(dim=-1, keepdim=True) - t)
    return (weights.flatten(2, 3) @ v).unflatten(2, shape[2:4])


def _attention(
    q_BHTK: torch.Tensor,
    r_BHTK: torch.Tensor | None,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    step: Step,
    window_size: int | None,
) -> torch.Tensor:
    """Compute causal attention of the last T of S tokens, `[B, H, T, K]`, in blocks of queries."""
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    groups = (k_BGSK.shape[1], -1)
    blocks = []
    for start in range(0, q_BHTK.shape[2], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        q = q_BHTK[:, :, rows].to(wide).unflatten(1, groups)
        r = None if r_BHTK is None else r_BHTK[:, :, rows].to(wide).unflatten(1, groups)
        own = step.num_past + start  # cache slot of the block's first query
        first, end = 0 if window_size is None else max(0, own + 1 - window_size), own + q.shape[3]
        slots = torch.arange(first, end, device=q.device)
        distance = slots[own - first :, None] - slots
        visible = distance >= 0 if window_size is None else (distance >= 0) & (distance < window_size)
        visible = visible[None] if step.mask_BS is None else visible & step.mask_BS[:, None, first:end]
        block = _attend(q, r, k_BGSK[:, :, first:end], v_BGSK[:, :, first:end], visible)
        blocks.append(block.flatten(1, 2).to(q_BHTK.dtype))
    return torch.cat(blocks, dim=2)


class _ProbeNorm(nn.RMSNorm):
    """RMSNorm with an initial gain."""

    def __init__(self, width: int, eps: float, gain: float) -> None:
        super().__init__(width, eps=eps)
        nn.init.constant_(self.weight, gain)


class ParallaxAttention(nn.Module):
    """Qwen3's attention, with a probe in layers from num_plain_layers on."""

    def __init__(self, config: ParallaxQwen3Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.has_probe = layer >= config.num_plain_layers
        width, head_dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        num_heads = config.num_attention_heads
        width_q, width_kv = num_heads * head_dim, config.num_key_value_heads * head_dim
        self.q_proj = nn.Linear(width, width_q, bias=False)
        self.k_proj = nn.Linear(width, width_kv, bias=False)
        self.v_proj = nn.Linear(width, width_kv, bias=False)
        self.o_proj = nn.Linear(width_q, width, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=eps)
        if not self.has_probe:
            return
        width_r = width_kv if config.r_heads == "kv" else width_q
        if config.r_rank is None:
            self.r_proj = nn.Linear(width, width_r, bias=False)
        else:
            self.r_in_proj = nn.Linear(width, config.r_rank, bias=False)
            self.r_out_proj = nn.Linear(config.r_rank, width_r, bias=False)
        if config.r_norm:
            self.r_norm = _ProbeNorm(head_dim, eps, config.r_gain_init)
        if config.gate is not None:
            self.g_proj = nn.Linear(width, num_heads if config.gate == "head" else 1, bias=False)

    def _heads(self, x_BTF: torch.Tensor) -> torch.Tensor:
        return x_BTF.unflatten(-1, (-1, self.config.head_dim))

    def _probe(self, x_BTD: torch.Tensor, step: Step) -> torch.Tensor:
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
            r_BHTK = step.rotate(r_BHTK)
        if config.r_heads == "kv":
            r_BHTK = r_BHTK.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=1)
        if config.gate is not None:
            r_BHTK = r_BHTK * torch.sigmoid(self.g_proj(x_BTD)).transpose(1, 2).unsqueeze(-1)
        return r_BHTK

    def forward(self, x_BTD: torch.Tensor, step: Step) -> torch.Tensor:
        """Mix T new tokens with their past, `[B, T, D]` to `[B, T, D]`."""
        q_BHTK = step.rotate(self.q_norm(self._heads(self.q_proj(x_BTD))).transpose(1, 2))
        k_BGSK = step.rotate(self.k_norm(self._heads(self.k_proj(x_BTD))).transpose(1, 2))
        v_BGSK = self._heads(self.v_proj(x_BTD)).transpose(1, 2)
        if step.cache is not None:
            k_BGSK, v_BGSK = step.cache.update(k_BGSK, v_BGSK, self.layer)
        r_BHTK = self._probe(x_BTD, step) if self.has_probe else None
        o_BHTK = _attention(q_BHTK, r_BHTK, k_BGSK, v_BGSK, step, self.config.window_size)
        return self.o_proj(o_BHTK.transpose(1, 2).flatten(2))


class ParallaxMLP(nn.Module):
    """The MLP, down(silu(gate x) * up x)."""

    def __init__(self, config: ParallaxQwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Apply the MLP, `[B, T, D]` to `[B, T, D]`."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class ParallaxDecoderLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ParallaxQwen3Config, layer: int) -> None:
        super().__init__()
        self.self_attn = ParallaxAttention(config, layer)
        self.mlp = ParallaxMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BTD: torch.Tensor, step: Step) -> torch.Tensor:
        """Apply the block, `[B, T, D]` to `[B, T, D]`."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), step)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class ParallaxQwen3PreTrainedModel(PreTrainedModel):
    """The base class of both models, with transformers' class attributes."""

    config_class = ParallaxQwen3Config
    base_model_prefix = "model"
    _no_split_modules = ["ParallaxDecoderLayer"]  # noqa: RUF012  (transformers' own protocol)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012


class ParallaxQwen3Model(ParallaxQwen3PreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ParallaxQwen3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ParallaxDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def _rope(self, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        head_dim, theta = self.config.head_dim, self.config.rope_theta
        exponents = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32) / head_dim
        angles = positions_BT.to(torch.float32).unsqueeze(-1) * theta**-exponents
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of T new tokens.

        Args:
            input_ids: Token ids `[B, T]`.
            attention_mask: 1 for tokens, 0 for padding, `[B, S]`; None without padding.
            position_ids: Positions `[B, T]`; None to derive them from the mask.
            past_key_values: KV cache of the past tokens; extended in place.
            inputs_embeds: Embeddings `[B, T, D]` instead of input_ids.
            use_cache: Return the KV cache; None for the config's value.

        Returns:
            Hidden states `[B, T, D]` after the final norm, and the cache.

        Raises:
            ValueError: Both or none of input_ids and inputs_embeds are given, or the mask is not `[B, S]`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        num_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        batch, num_tokens = x_BTD.shape[:2]
        wanted = (batch, num_past + num_tokens)
        if attention_mask is not None and attention_mask.shape != wanted:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, wanted {list(wanted)}, tokens in the cache "
                "included; static caches are not supported: do not set cache_implementation"
            )
        mask_BS = None if attention_mask is None else attention_mask.to(device=x_BTD.device, dtype=torch.bool)
        if position_ids is None:
            seen = torch.ones(wanted, device=x_BTD.device) if mask_BS is None else mask_BS
            position_ids = (seen.long().cumsum(dim=-1) - 1).clamp(min=0)[:, num_past:]
        step = Step(*self._rope(position_ids), mask_BS, num_past, past_key_values)
        for layer in self.layers:
            x_BTD = layer(x_BTD, step)
        return BaseModelOutputWithPast(self.norm(x_BTD), past_key_values if use_cache else None)


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


class ParallaxQwen3ForCausalLM(ParallaxQwen3PreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ParallaxQwen3Config) -> None:
        super().__init__(config)
        self.model = ParallaxQwen3Model(config)
        self.lm_head = ParallaxHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute the logits, and the loss if labels are given.

        Args:
            input_ids: As ParallaxQwen3Model.forward.
            attention_mask: As ParallaxQwen3Model.forward.
            position_ids: As ParallaxQwen3Model.forward.
            past_key_values: As ParallaxQwen3Model.forward.
            inputs_embeds: As ParallaxQwen3Model.forward.
            labels: Token ids `[B, T]`, not shifted yet; -100 is skipped.
            use_cache: As ParallaxQwen3Model.forward.
            logits_to_keep: Number of last positions to compute logits at, or their indices; 0 for all.
            num_items_in_batch: Divisor of the summed loss; None for the number of labels.
            output_attentions: Not supported.
            output_hidden_states: Not supported.
            return_dict: False to return a tuple.

        Returns:
            Loss in nats/token, logits `[B, T, V]` in at least fp32, and the cache.

        Raises:
            NotImplementedError: output_attentions or output_hidden_states is set.
        """
        if output_attentions or output_hidden_states:
            raise NotImplementedError(
                "output_attentions and output_hidden_states are not supported; use hooks on model.layers"
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
        return result.to_tuple() if return_dict is False else result
