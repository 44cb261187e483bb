"""Mutants of models/."""

from tests.mutate.mutant import Mutant

CACHE = "tests/models/generation/test_cache.py"
CHECKPOINT = "tests/models/test_checkpoint.py"
CONVERT = "tests/models/convert/test_convert.py"
FORMAT = "tests/models/convert/test_format.py"
HOSTILE = "tests/models/convert/test_hostile_folders.py"
CROSS_ENTROPY = "tests/models/kernels/test_cross_entropy.py"
NORM_ROPE = "tests/models/kernels/test_norm_rope.py"
GENERATION = "tests/models/generation/test_generation.py"
LOSS = "tests/models/test_loss.py"
AVERAGE = "tests/models/test_average.py"
CAST_WEIGHTS = "tests/models/test_cast_weights.py"
QWEN3 = "tests/models/test_qwen3.py"
SIZES = "tests/models/test_sizes.py"
TOKENIZER = "tests/models/convert/test_tokenizer.py"

MUTANTS = [
    Mutant(
        "models/kernels/scale.py",
        "(x.to(factor.dtype) * factor.reshape(())).to(dtype)",
        "(x * factor.reshape(()).to(x.dtype)).to(dtype)",
        "tests/models/kernels/test_scale.py",
    ),
    Mutant(
        "models/loss.py",
        "part = (dlogits_TV.T @ x_TD).to(accumulator)",
        "part = dlogits_TV.T @ x_TD",
        LOSS,
    ),
    Mutant(
        "models/loss.py",
        "target = torch.where(valid, labels_T.unsqueeze(1), 0)",
        "target = labels_T.unsqueeze(1).clamp(min=0)",
        LOSS,
    ),
    Mutant(
        "models/loss.py",
        "logits_TV.double() if logits_TV.dtype == torch.float64 else logits_TV.float()",
        "logits_TV",
        LOSS,
    ),
    Mutant("models/cast_weights.py", "accumulate_(parameter.grad, gradient)", "pass", CAST_WEIGHTS),
    Mutant("models/cast_weights.py", "ctx.mark_non_differentiable(*frozen)", "pass", CAST_WEIGHTS),
    Mutant("models/cast_weights.py", ", remove_duplicate=False", "", CAST_WEIGHTS),
    Mutant("models/cast_weights.py", ", updated=()", "", CAST_WEIGHTS),
    Mutant("models/titan.py", "is_alone and precision != torch.float32", "is_alone", CAST_WEIGHTS),
    Mutant("models/cast_weights.py", "return saved.detach()", "return saved", CAST_WEIGHTS),
    Mutant(
        "models/cast_weights.py",
        "sources.get(saved.untyped_storage().data_ptr())",
        "sources.get(saved.data_ptr() + 1)",
        CAST_WEIGHTS,
    ),
    Mutant("models/cast_weights.py", ".as_strided(*view)", ".reshape(view[0])", CAST_WEIGHTS),
    Mutant(
        "models/titan.py",
        "reshard_after_forward and not is_recomputed",
        "reshard_after_forward",
        CAST_WEIGHTS,
    ),
    Mutant(
        "models/titan.py",
        "next(m for m in block.modules() if isinstance(m, Block)) if is_recomputed else block",
        "block",
        CAST_WEIGHTS,
    ),
    Mutant("models/titan.py", "        self._tie_weights()", "        pass", CAST_WEIGHTS),
    Mutant("models/init.py", "init_std / (2 * self", "init_std / (1 * self", QWEN3),
    Mutant(
        "models/attention/parallax.py",
        "normal_(0.0, shape[1] ** -0.5",
        "normal_(0.0, shape[0] ** -0.5",
        "tests/models/attention/test_parallax_variants.py",
    ),
    Mutant("models/init.py", 'f"{seed}/{name}".encode()', 'f"{seed}/{name[:8]}".encode()', QWEN3),
    Mutant(
        "models/attention/parallax.py",
        "rope if config.rope_on_r else None",
        "None",
        QWEN3,
    ),
    Mutant("models/attention/base.py", "positions.to(torch.float32)", "positions.to(torch.bfloat16)", QWEN3),
    Mutant(
        "models/attention/base.py",
        "window * (2 * seq_len - window + 1) / (2 * seq_len)",
        "window * (2 * seq_len - window) / (2 * seq_len)",
        QWEN3,
    ),
    Mutant("models/qwen3.py", "positions = positions - cu_seqlens[document]", "pass", QWEN3),
    Mutant("models/qwen3.py", "            x = x.to(self.weight.dtype)\n", "", QWEN3),
    Mutant(
        "models/qwen3.py",
        "        self.to_empty(device=device)\n        self._tie_weights()\n",
        "        self.to_empty(device=device)\n",
        QWEN3,
    ),
    Mutant(
        "models/convert/format.py",
        'table.get("tie_word_embeddings", False)',
        'table.get("tie_word_embeddings", True)',
        FORMAT,
    ),
    Mutant("models/convert/format.py", "(eos or [None])[0]", "(eos or [None])[-1]", FORMAT),
    Mutant(
        "models/convert/format.py",
        "min(max(limit, 0), num_layers)",
        "min(max(limit, 1), num_layers)",
        FORMAT,
    ),
    Mutant(
        "models/convert/hf_folder.py",
        "if PurePath(name).is_absolute() or",
        "if",
        f"{HOSTILE}::test_shards_outside_the_folder_are_refused",
    ),
    Mutant(
        "models/convert/hf_folder.py",
        " or not is_inside",
        "",
        f"{HOSTILE}::test_no_file_of_the_folder_may_be_a_link_that_leads_out",
    ),
    Mutant(
        "models/convert/hf_folder.py",
        "read_tensor(saved[name].file, name).to(dtype)",
        "read_tensor(saved[name].file, name)",
        f"{HOSTILE}::test_weights_beyond_the_chosen_dtype_are_named",
    ),
    Mutant("models/convert/format.py", "if found is not None and theta != found:", "if False:", FORMAT),
    Mutant(
        "models/convert/format.py",
        'if rope_type != "default" or values:',
        'if rope_type != "default":',
        FORMAT,
    ),
    Mutant(
        "models/convert/from_hf.py",
        "r_gain_init=0.0, window_size=softmax.window_size",
        "r_gain_init=0.0",
        f"{CONVERT} {FORMAT}",
    ),
    Mutant(
        "models/convert/tokenizer.py",
        "if token is None or token == end_of_document or",
        "if token is None or",
        TOKENIZER,
    ),
    Mutant(
        "models/checkpoint/load.py",
        "        if wrong:\n            raise",
        "        if False:\n            raise",
        CHECKPOINT,
    ),
    Mutant(
        "models/checkpoint/load.py",
        ".eval().requires_grad_(False)",
        ".requires_grad_(False)",
        CHECKPOINT,
    ),
    Mutant("models/checkpoint/load.py", 'f"{AVERAGE}." if average else ""', '""', AVERAGE),
    Mutant("models/average.py", "dtype=torch.float64)", "dtype=torch.bfloat16)", AVERAGE),
    Mutant("models/average.py", "sorted(whole)[-number:]", "sorted(whole)[:number]", AVERAGE),
    Mutant("models/loss.py", "(1.0 + 2.0 * z_loss * lse)", "(1.0 + z_loss * lse)", LOSS),
    Mutant("models/loss.py", "torch.where(valid, z_loss * lse.square(), 0.0)", "z_loss * lse.square()", LOSS),
    Mutant("models/run_folder.py", "whole[max(whole)] if whole", "whole[min(whole)] if whole", CHECKPOINT),
    Mutant(
        "models/run_folder.py",
        "name = _STEP.fullmatch(checkpoint.name)",
        "name = _STEP.match(checkpoint.name)",
        f"{CHECKPOINT} tests/training/test_branch.py",
    ),
    Mutant(
        "models/generation/sampling.py",
        "sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p",
        "sorted_BV.cumsum(-1) >= sampling.top_p",
        GENERATION,
    ),
    Mutant(
        "models/generation/sampling.py", "scaled_BV < smallest_B1", "scaled_BV <= smallest_B1", GENERATION
    ),
    Mutant(
        "models/generation/sampling.py",
        "logits_BV.gather(1, tokens_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)",
        "(logits_BV / (sampling.temperature or 1.0)).log_softmax(-1).gather(1, tokens_B[:, None]).squeeze(1)",
        GENERATION,
    ),
    Mutant(
        "models/generation/generate.py",
        "    if first == 0:\n        return sampling\n    return",
        "    return sampling\n    return",
        GENERATION,
    ),
    Mutant(
        "models/generation/generate.py",
        "                del unfinished[row]\n",
        "                pass\n",
        GENERATION,
    ),
    Mutant(
        "models/kernels/norm_rope.py",
        "b_dright * b_cos - b_dleft * b_sin",
        "b_dright * b_cos + b_dleft * b_sin",
        NORM_ROPE,
    ),
    Mutant("models/kernels/norm_rope.py", "b_dleft - b_left * b_mean", "b_dleft", NORM_ROPE),
    Mutant("models/kernels/norm_rope.py", "i_b * s_table + i_t * HALF", "i_t * HALF", NORM_ROPE),
    Mutant("models/kernels/cross_entropy.py", "1.0 + 2.0 * z_loss", "1.0 + z_loss", CROSS_ENTROPY),
    Mutant(
        "models/kernels/cross_entropy.py",
        "    b_sum *= tl.exp2((b_max - b_new) * _LOG2_E)\n",
        "",
        CROSS_ENTROPY,
    ),
    Mutant(
        "models/kernels/cross_entropy.py",
        "i_last = (V - 1) // BV * BV",
        "i_last = V // BV * BV - BV",
        CROSS_ENTROPY,
    ),
]
