"""The [eval] table of a run."""

from dataclasses import dataclass, field

from errors import UserError, check_not_empty, check_range


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training.

    Attributes:
        every: Steps between evaluations of the held-out loss; None for those before the first step and after
            the last, which always take place.
        max_tokens: Held-out tokens per evaluation, rounded up to whole rows, the same for every run and
            number of ranks; None for all. They are evenly spaced rows of documents with 8 times as many
            tokens, which a fixed seed draws from the whole of data.validation. From sources other than shards
            the documents are drawn in one pass before the first evaluation (of a hub source from at most 8 of
            its files, which are downloaded) and kept in the run folder.
        tasks: Downstream tasks of `python -m eval.downstream --tasks`; "paper" for the paper's ten. They are
            evaluated after the last step, and never before the first.
        tasks_every: Steps between evaluations of the tasks; None for the one after the last step.
        tasks_limit: Evaluate only the first documents of each task, this many; None for all.
        tasks_num_fewshot: Few-shot examples of each task, but for tasks that set 0 themselves or score whole
            texts; None for each task's own number.
        tasks_data: Folder with the tasks' documents, as for `python -m eval.downstream --data`; None to
            have the harness download them from the hub.
        sample_prompts: Prompts that the model continues at each evaluation of the held-out loss.
        sample_tokens: Most tokens of such a continuation.
    """

    every: int | None = None
    max_tokens: int | None = None
    tasks: list[str] = field(default_factory=list)
    tasks_every: int | None = None
    tasks_limit: int | None = None
    tasks_num_fewshot: int | None = None
    tasks_data: str | None = None
    sample_prompts: list[str] = field(default_factory=list)
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        check_range(self, 1, 10**15, "every", "max_tokens", "tasks_every", "tasks_limit")
        check_range(self, 1, 1_000_000, "sample_tokens")
        check_range(self, 0, 1000, "tasks_num_fewshot")
        check_not_empty(self, "tasks_data")
        for name in ("tasks", "sample_prompts"):
            if "" in getattr(self, name):
                raise UserError(f'{name} has an empty string ("") in it; leave it out')
