"""Mutants of eval/."""

from tests.mutate.mutant import Mutant

CONTINUATIONS = "tests/eval/test_continuations.py"
HARNESS = "tests/eval/test_harness.py"
HELD_OUT = "tests/eval/test_held_out.py"
MAD_STACK = "tests/eval/mad/test_stack.py"
REPORT_TASKS = "tests/eval/report/test_report_tasks.py"
SCORER = "tests/eval/scoring/test_scorer.py"
TEXT_COUNTS = "tests/eval/test_text_counts.py"
TEXT_LOSS = "tests/eval/test_text_loss.py"

MUTANTS = [
    Mutant("eval/open_model.py", '(("average",) if average else ())', "()", "tests/models/test_average.py"),
    Mutant(
        "eval/scored_text.py",
        'num_words = len(re.split(r"\\s+", text))',
        "num_words = len(text.split())",
        f"{TEXT_LOSS}::test_white_space_around_a_page_counts_as_in_the_harness",
    ),
    Mutant(
        "eval/scored_text.py",
        "text.num_end_tokens if end == len(tokens) else 0",
        "text.num_end_tokens",
        f"{TEXT_LOSS}::test_bits_per_byte_over_several_windows_leave_out_one_end_of_document_token",
    ),
    Mutant(
        "eval/scored_text.py",
        "- tokenizer.num_first_bytes(text, ids[0])",
        "- 1",
        f"{TEXT_LOSS}::test_a_first_token_of_several_bytes_is_not_counted",
    ),
    Mutant(
        "eval/scored_text.py",
        "- tokenizer.num_bytes(tokens[0])",
        "- 2",
        f"{TEXT_COUNTS}::test_bits_per_byte_of_shards_say_that_their_bytes_are_those_of_the_tokens",
    ),
    Mutant(
        "eval/scored_text.py",
        "first = continuation_start(context_ids, ids)",
        "first = len(context_ids)",
        f"{TEXT_COUNTS}::test_a_token_across_the_start_of_the_last_word_is_predicted",
    ),
    Mutant(
        "eval/scored_text.py",
        "[text.rstrip() for text in texts]",
        "texts",
        f"{TEXT_COUNTS}::test_white_space_behind_the_last_word_is_dropped",
    ),
    Mutant(
        "eval/text_loss.py",
        "self.num_cut += len(text.tokens) > self._max_length + 1",
        "self.num_cut += len(text.tokens) >= self._max_length + 1",
        f"{TEXT_COUNTS}::test_skipped_rows_and_documents_that_do_not_fit_are_counted",
    ),
    Mutant(
        "eval/harness.py",
        "value=(own or 0) if num_fewshot is None or is_fixed else num_fewshot",
        "value=(own or 0) if num_fewshot is None else num_fewshot",
        f"{CONTINUATIONS}::test_the_number_of_few_shot_examples_is_chosen_and_written_down",
    ),
    Mutant(
        "eval/harness.py",
        "text = decode_behind(decode, ids, ",
        "text = decode_behind(decode, [], ",
        f"{CONTINUATIONS}::test_an_answer_keeps_the_space_that_its_first_token_begins_with",
    ),
    Mutant(
        "eval/scored_text.py",
        'encode = tokenizer.encode_batch if mode == "documents" else tokenizer.encode_prompts',
        "encode = tokenizer.encode_batch",
        f"{TEXT_LOSS}::test_the_end_of_document_written_out_is_text_in_documents_and_a_token_in_tasks",
    ),
    Mutant(
        "eval/text_loss.py",
        "            self.not_greedy.add(document)",
        "            self.not_greedy.add(len(self.not_greedy))",
        f"{TEXT_LOSS}::test_a_last_word_in_several_windows_counts_once",
    ),
    Mutant(
        "eval/text_loss.py",
        "        first = len(window.group.context)\n",
        "        first = 1\n",
        f"{TEXT_LOSS}::test_sliding_windows_give_each_token_the_stated_context",
    ),
    Mutant(
        "eval/text_loss.py",
        "        done, num_pending = fraction, 0\n",
        "        done = fraction\n",
        f"{TEXT_LOSS}::test_pending_windows_of_a_long_document_are_bounded",
    ),
    Mutant(
        "eval/text_loss.py",
        "        self.document_tokens[document] += len(nats)\n",
        "        self.document_tokens[document] = len(nats)\n",
        f"{TEXT_LOSS}::test_the_standard_error_counts_a_document_of_several_windows_once",
    ),
    Mutant("eval/standard_error.py", "len(tokens) / (len(tokens) - 1) * ", "", HELD_OUT),
    Mutant(
        "eval/standard_error.py", "nats - nats.sum() / tokens.sum() * tokens", "nats - nats.mean()", HELD_OUT
    ),
    Mutant(
        "eval/held_out.py", "num_documents=int((tokens > 0).sum())", "num_documents=len(tokens)", HELD_OUT
    ),
    Mutant(
        "eval/held_out.py",
        "self._id_counts.index_add_(0, ids.clamp(min=0), valid)",
        "self._id_counts.index_add_(0, ids.clamp(min=0), torch.ones_like(valid))",
        HELD_OUT,
    ),
    Mutant("eval/held_out.py", "math.exp(loss) if loss < 700 else math.inf", "math.exp(loss)", HELD_OUT),
    Mutant(
        "eval/harness.py",
        "error * (values[name] if aggregation is perplexity else 1.0)",
        "error",
        f"{HARNESS}::test_the_standard_error_of_a_perplexity_is_that_of_its_logarithm_times_itself",
    ),
    Mutant(
        "eval/harness.py",
        "SavedResults.key(model.identity, model.max_length, tokenizer.fingerprint)",
        "SavedResults.key(model.identity, tokenizer.fingerprint)",
        f"{HARNESS}::test_saved_results_are_of_one_model_one_max_length_and_one_tokenizer",
    ),
    Mutant(
        "eval/harness.py",
        "            pairs.append((context[:at], context[at:] + continuation))",
        "            pairs.append((context, continuation))",
        f"{HARNESS}::test_empty_contexts_and_continuations",
    ),
    Mutant(
        "models/generation/text_stream.py",
        "len(each.encode()) for each in strings",
        "len(each) for each in strings",
        f"{HARNESS}::test_a_stop_string_of_several_bytes_per_character_is_found",
    ),
    Mutant(
        "eval/harness.py",
        "(ids or [self.eot_token_id])[excess:]",
        "(ids or [self.eot_token_id])[:room]",
        f"{HARNESS}::test_a_long_prompt_keeps_its_end_for_generation",
    ),
    Mutant(
        "eval/harness_state.py",
        "        random.setstate(states[0])\n",
        "",
        f"{HARNESS}::test_shuffled_answers_keep_their_order_within_an_evaluation_and_between_processes",
    ),
    Mutant(
        "eval/scoring/requests.py",
        "len(context) + len(continuation) - max_length - 1",
        "len(context) + len(continuation) - max_length",
        SCORER,
    ),
    Mutant(
        "eval/scoring/requests.py",
        "return min(common, len(whole) - 1)",
        "return min(len(context), len(whole) - 1)",
        f"{CONTINUATIONS}::test_a_token_across_the_join_is_predicted_as_a_whole",
    ),
    Mutant(
        "eval/scoring/requests.py",
        "return min(common, len(whole) - 1)",
        "return common",
        f"{CONTINUATIONS}::test_a_continuation_that_the_normalizer_removes_does_not_score_0",
    ),
    Mutant("eval/scoring/scorer.py", "rows * longest if model.is_padded else tokens", "tokens", SCORER),
    Mutant("eval/scoring/scorer.py", "gathered = gathered[: len(batches) - first]\n", "pass\n", SCORER),
    Mutant(
        "eval/scoring/scorer.py",
        "yield max(end - 1 - max_length, 0), predicted, end",
        "yield max(end - max_length, 0), predicted, end",
        SCORER,
    ),
    Mutant("eval/scoring/scorer.py", "all(each.greedy))", "each.greedy[0])", SCORER),
    Mutant(
        "eval/scoring/groups.py",
        "rows.tails[-1][: len(tails[index])] != tails[index]",
        "rows.tails[-1] != tails[index]",
        SCORER,
    ),
    Mutant(
        "eval/scoring/saved_results.py",
        "    complete = lines[:-1]\n",
        "    complete = [line for line in lines if line]\n",
        f"{SCORER}::test_an_interrupted_evaluation_resumes",
    ),
    Mutant(
        "eval/task_results.py",
        '"acc_norm" if normalized and task in NORMALIZED else "acc"',
        '"acc_norm" if normalized else "acc"',
        f"{HARNESS}::test_the_mean_of_the_paper_s_accuracies_and_standard_errors",
    ),
    Mutant(
        "eval/report/task_records.py",
        "if num < most.get((step, task), 0):",
        "if num <= most.get((step, task), 0):",
        REPORT_TASKS,
    ),
    Mutant(
        "eval/report/task_records.py",
        "            for key in _by_task(found).get(task, ()):\n                del found[key]\n",
        "",
        REPORT_TASKS,
    ),
    Mutant(
        "eval/mad/stack.py",
        "[:, 0, 0].flatten(0, 1) if isinstance",
        "[:1, 0, 0].expand(self.num_members, *x.shape[2:]).flatten(0, 1) if isinstance",
        f"{MAD_STACK}::test_a_stack_computes_what_its_members_do",
    ),
    Mutant(
        "eval/mad/optimizers.py",
        "momentum.copy_(old_momentum[list(members)])",
        "pass",
        f"{MAD_STACK}::test_a_smaller_stack_goes_on_as_the_larger_would",
    ),
    Mutant(
        "eval/mad/optimizers.py",
        "value.copy_(old_optimizer.state[old_p][key])",
        "pass",
        f"{MAD_STACK}::test_a_smaller_stack_goes_on_as_the_larger_would",
    ),
    Mutant(
        "eval/mad/optimizers.py",
        "run.recipe.epoch_rate(run.lr, epoch) if active else 0.0",
        "run.recipe.epoch_rate(run.lr, epoch)",
        f"{MAD_STACK}::test_a_member_that_is_not_active_keeps_its_weights",
    ),
    Mutant(
        "eval/mad/train.py",
        "data.of_run[run] for run in runs",
        "0 for run in runs",
        f"{MAD_STACK}::test_50_steps_are_those_of_single_runs",
    ),
    Mutant(
        "eval/mad/train.py",
        "if 2 * len(open_runs) <= len(stack.runs):",
        "if False:",
        f"{MAD_STACK}::test_solved_members_end_and_the_others_go_on_as_if_alone",
    ),
    Mutant(
        "eval/mad/packs.py",
        "_cost(each)))",
        "0))",
        f"{MAD_STACK}::test_packs_have_one_shape_whole_grids_and_fit",
    ),
    Mutant("eval/mad/replay.py", "self._graph.replay()", "pass", "tests/eval/mad/test_replay.py"),
]
