"""Mutants of training/, config.py and errors.py, with tests that launch no run where there are some."""

from tests.mutate.mutant import Mutant

# those that launch no run
AVERAGE = (
    "tests/training/test_average.py::test_the_average_is_that_of_its_rule_and_an_evaluation_changes_no_bit"
)
BRANCH = " ".join(
    f"tests/training/test_branch.py::{name}"
    for name in (
        "test_a_checkpoint_after_the_start_of_the_decay_or_the_last_step_is_refused",
        "test_a_checkpoint_of_another_model_or_sequence_length_is_refused",
        "test_differing_rates_and_batch_sizes_are_warned_of",
        "test_changed_keys_other_than_rates_are_warned_of",
        "test_another_start_for_a_run_folder_with_checkpoints_is_refused",
    )
)
GRADIENT_NORM = " ".join(
    f"tests/training/test_gradient_norm.py::{name}"
    for name in (
        "test_gradients_are_clipped_as_in_torch_or_not_at_all",
        "test_spikes_follow_the_rule",
        "test_a_norm_of_nan_or_inf_is_skipped_and_leaves_the_running_norm",
        "test_a_saved_running_norm_goes_on_bit_identically",
    )
)
CONFIG = "tests/test_config.py tests/training/test_config_values.py"
DRY_RUN = "tests/training/test_dry_run.py"
METRICS = "tests/training/test_metrics.py"
PLAN = "tests/training/test_plan.py"
PREFLIGHT = "tests/training/test_preflight.py"
RANK_SUMS = "tests/training/test_rank_sums.py"
STATE = "tests/training/test_state.py"
STEP_TIME = "tests/training/test_step_time.py"

MUTANTS = [
    Mutant("training/average.py", "            module.reshard()", "            pass", AVERAGE),
    Mutant("training/average.py", "            average.copy_(kept)", "            pass", AVERAGE),
    Mutant("training/average.py", " * (1.0 - is_skipped)", "", AVERAGE),
    Mutant(
        "training/average.py", "return step > self._start_step", "return step >= self._start_step", AVERAGE
    ),
    Mutant(
        "training/gradient_norm.py",
        "(self._num_steps + 1).clamp(max=WINDOW)",
        "self._num_steps + 1",
        GRADIENT_NORM,
    ),
    Mutant("training/gradient_norm.py", "torch.where(is_spike, limit, norm)", "norm", GRADIENT_NORM),
    Mutant(
        "training/gradient_norm.py",
        "torch.where(is_finite, running, self._running)",
        "running",
        GRADIENT_NORM,
    ),
    Mutant("training/gradient_norm.py", "~is_finite | is_spike if", "is_spike if", GRADIENT_NORM),
    Mutant("training/trainer.py", '        torch.set_rng_state(state_dict["rng"]["cpu"])\n', "", STATE),
    Mutant(
        "training/trainer.py",
        'sums["stop requests"] > 0',
        'sums["stop requests"] == dist.get_world_size()',
        "tests/training/test_stop_of_one_rank.py",
    ),
    Mutant(
        "training/trainer.py",
        "len(launched) > 1 or stopped or",
        "len(launched) > 1 or",
        "tests/training/test_late_reads.py",
    ),
    Mutant(
        "training/rank_sums.py",
        "{name: row.clone() for",
        "{name: row for",
        RANK_SUMS,
    ),
    Mutant(
        "training/signals.py",
        "        if self._first_signal is None:\n            self._first_signal = now\n        elif",
        "        first, self._first_signal = self._first_signal, now\n"
        "        if first is not None and now - first > GRACE_SECONDS:\n"
        "            os._exit(128 + number)\n"
        "        elif",
        STATE,
    ),
    Mutant(
        "training/signals.py",
        "now - self._first_signal > GRACE_SECONDS",
        "now - self._first_signal > 10 * GRACE_SECONDS",
        STATE,
    ),
    Mutant(
        "training/signals.py",
        "for number in (*_INSISTING, *_ASKING):",
        "for number in (signal.SIGTERM, *_ASKING):",
        STATE,
    ),
    Mutant("training/run_config.py", "_MAX_STEPS = 10**9", "_MAX_STEPS = 10**19", CONFIG),
    Mutant("training/run_config.py", 'self.name in ("", ".", "..")', 'self.name in ("", ".")', CONFIG),
    Mutant("training/run_config.py", "has_loss or bool(self.eval.sample_prompts)", "has_loss", CONFIG),
    Mutant(
        "config.py",
        "        if type(value) is int and not -(2**63) <= value < 2**63:",
        "        if type(value) is int and value < -(2**63):",
        CONFIG,
    ),
    Mutant("config.py", "if len(key) > _MAX_DEPTH:", "if len(key) > 10**9:", CONFIG),
    Mutant(
        "config.py", 'return parsed["value"] if len(parsed) == 1 else text', 'return parsed["value"]', CONFIG
    ),
    Mutant(
        "config.py",
        "        if hint is float and type(value) is int:\n            return float(value)\n",
        "",
        CONFIG,
    ),
    Mutant("config.py", "Any and type(value) is not hint:", "Any and not isinstance(value, hint):", CONFIG),
    Mutant("config.py", "if path.resolve() in chain:", "if path in chain:", CONFIG),
    Mutant("config.py", "in reversed(layers) if", "in layers if", CONFIG),
    Mutant(
        "config.py",
        "other = names.get(_dotted((*key, name)), names.get(name))",
        "other = names.get(name)",
        CONFIG,
    ),
    Mutant(
        "config.py",
        '        yield from _all_keys(get_args(hint)[1], f"{prefix}.NAME")\n',
        "        pass\n",
        CONFIG,
    ),
    Mutant(
        "errors.py",
        "    return USER_ERROR_CODE if is_user_error(error) else None",
        "    return USER_ERROR_CODE",
        "tests/test_errors.py",
    ),
    Mutant(
        "errors.py",
        "    while frame is not None and frame.tb_next is not None:\n        frame = frame.tb_next\n",
        "",
        "tests/test_errors.py",
    ),
    Mutant("errors.py", "not low <= value <= high", "(value < low or value > high)", CONFIG),
    Mutant(
        "training/branch.py",
        "    if step >= training.last_step:",
        "    if step > training.last_step:",
        BRANCH,
    ),
    Mutant("training/branch.py", "    if step > start:", "    if step >= start:", BRANCH),
    Mutant(
        "training/branch.py",
        "    if differing and not config.checkpoint.restart_data:",
        "    if False:",
        BRANCH,
    ),
    Mutant(
        "training/config_differences.py",
        "sorted({*saved, *current} - {*ignored})",
        "sorted({*current} - {*ignored})",
        "tests/training/test_resume.py",
    ),
    Mutant(
        "training/saved_config.py",
        "causes = differences_at(config, saved.table, _schedule_keys(config)) if rates else []",
        "causes = differences_at(config, saved.table, _schedule_keys(config))",
        f"{BRANCH} tests/training/test_resume.py",
    ),
    Mutant(
        "training/memory.py",
        "    if not config.parallelism.reshard_after_forward:\n        gathered_blocks = float(blocks)\n",
        "",
        DRY_RUN,
    ),
    Mutant("training/memory.py", "if accumulates else 0.0", "", DRY_RUN),
    Mutant("training/dry_run.py", "mfu / 100 * world_size * gpu", "mfu / 100 * gpu", PLAN),
    Mutant("training/branch_step.py", "range(branch_step(config) + 1, ", "range(1, ", PLAN),
    Mutant("training/branch_step.py", "config.training.last_step + 1)", "config.training.steps + 1)", PLAN),
    Mutant("training/fit.py", "if rows_per_rank % n == 0", "", PLAN),
    Mutant("training/rank_sums.py", "if number}", "}", RANK_SUMS),
    Mutant("scalars.py", "            _totals = None\n", "            pass\n", "tests/test_scalars.py"),
    Mutant("scalars.py", "value = value.detach()", "pass", "tests/test_scalars.py"),
    Mutant("optimizers/build.py", "isinstance(x, torch.Tensor) and x.ndim > 0", "True", DRY_RUN),
    Mutant(
        "training/step_time.py",
        "    if not config.data.mask_documents:\n        return 1.0, 0.0\n",
        "",
        STEP_TIME,
    ),
    Mutant("training/step_time.py", "max(0.0, total - edges - micro_batch)", "total - edges", STEP_TIME),
    Mutant("training/preflight.py", "if epochs <= WORTHWHILE", "if epochs < WORTHWHILE", PREFLIGHT),
]
