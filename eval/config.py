"""The [eval] table of a run."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training; before the first step and after the last it always takes place.

    Attributes:
        every: Steps between two evaluations of the held-out loss; None for the first and the last only.
        max_tokens: Held-out tokens that one evaluation reads; None for all.
        tasks: Downstream tasks, as of `python -m eval.downstream --tasks`; "paper" for the paper's ten. After
            the last step they are always evaluated, before the first never.
        tasks_every: Steps between two evaluations of the tasks; None for the end only.
        tasks_limit: Documents of each task; None for all.
        tasks_data: Folder with the tasks' documents, as of `python -m eval.downstream --data`; None to have
            the harness fetch them from the hub.
        sample_prompts: Texts that the model continues with each evaluation of the held-out loss.
        sample_tokens: The most tokens of such a continuation.
    """

    every: int | None = None
    max_tokens: int | None = None
    tasks: list[str] = field(default_factory=list)
    tasks_every: int | None = None
    tasks_limit: int | None = None
    tasks_data: str | None = None
    sample_prompts: list[str] = field(default_factory=list)
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("every", "max_tokens", "tasks_every", "tasks_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or none; got {value}")
        if self.sample_tokens < 1:
            raise ValueError(
                f"sample_tokens must be at least 1, got {self.sample_tokens}; for no samples leave "
                "sample_prompts empty"
            )
        for name in ("tasks", "sample_prompts"):
            if "" in getattr(self, name):
                raise ValueError(f'{name} has an empty text (""); leave it out')
