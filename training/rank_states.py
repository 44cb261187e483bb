"""What each rank writes about itself, and which ranks a hung run waits for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# in a message
_MAX_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What a rank writes to the store, every few seconds.

    Attributes:
        process: Host and process id, such as "node7, process 4242".
        num_writes: Number of writes so far; a rank whose number stands still is stopped or dead.
        num_phases: Number of phases entered so far; ranks at the same place of the program have the same.
        phase: The phase, such as "step 12: micro-batch 1 of 4".
        seconds: Time in the phase so far.
        limit: Time that the phase may take, in seconds.
        place: File and line of this project that the main thread is at; "" where it is elsewhere.
    """

    process: str
    num_writes: int = 0
    num_phases: int = 0
    phase: str = "start"
    seconds: float = 0.0
    limit: float = 0.0
    place: str = ""


def find_missing(
    before: Mapping[int, RankState], now: Mapping[int, RankState], rank: int
) -> tuple[set[int], set[int]]:
    """Find the ranks that the others wait for.

    Args:
        before: The states some writes ago, by rank.
        now: The states, by rank.
        rank: The rank that looks, which is neither stopped nor dead.

    Returns:
        The ranks that have stopped writing, and those of the others that are behind and past the limit of the
        phase that they are in.
    """
    silent = {each for each in now if each != rank and now[each].num_writes == before[each].num_writes}
    last = max(state.num_phases for state in now.values())
    late = {each for each, state in now.items() if state.num_phases < last and state.seconds >= state.limit}
    return silent, late - silent


def describe_hang(
    before: Mapping[int, RankState], now: Mapping[int, RankState], rank: int, checkpoints: Path
) -> str | None:
    """Describe a hang in one line: who is missing, where, and what to do.

    Args:
        before: The states some writes ago, by rank.
        now: The states, by rank.
        rank: The rank that is past the limit of its phase.
        checkpoints: The folder of the run's checkpoints.

    Returns:
        The line; None while the ranks that are behind are within the limits of their own phases.
    """
    silent, late = find_missing(before, now, rank)
    state = now[rank]
    resume = f"The same command resumes from the newest checkpoint in {checkpoints}"
    if silent or late:
        parts = [f"{name_ranks(now, silent)} stopped answering"] if silent else []
        parts += [f"{name_ranks(now, late)} did not arrive"] if late else []
        waiting = (
            f"rank {rank} has waited for {state.seconds:.0f} s in {state.phase} (limit {state.limit:.0f} s)"
        )
        return (
            f"{' and '.join(parts)}{'' if rank in late else f'; {waiting}'}. Look there for a stopped or "
            "killed process, a failed GPU or a file system that does not answer. "
            f"{resume}; if these ranks were only slow, raise parallelism.timeout_seconds"
        )
    if len({each.num_phases for each in now.values()}) > 1:
        return None
    return (
        f"rank {rank} has been in {state.phase} for {state.seconds:.0f} s (limit {state.limit:.0f} s), as "
        f"all {len(now)} ranks are: {_name_places(now)}. Look for a failed GPU or link there (nvidia-smi, "
        f"dmesg). {resume}; if the step was only slow, raise parallelism.timeout_seconds"
    )


def name_ranks(states: Mapping[int, RankState], ranks: set[int]) -> str:
    """Name ranks with process, phase and place; at most eight of them."""
    named = [
        f"rank {rank} ({states[rank].process}, last seen in {states[rank].phase}{_at(states[rank])})"
        for rank in sorted(ranks)[:_MAX_NAMED]
    ]
    num_more = len(ranks) - len(named)
    return ", ".join(named) + (f" and {num_more} more" if num_more else "")


def _name_places(states: Mapping[int, RankState]) -> str:
    """Name the places that ranks are at, the rarest first: where few are, these may be the cause."""
    ranks: dict[str, list[int]] = {}
    for rank, state in states.items():
        ranks.setdefault(state.place, []).append(rank)
    rarest = sorted(ranks.items(), key=lambda item: len(item[1]))[:_MAX_NAMED]
    return ", ".join(
        f"{f'rank {each[0]}' if len(each) == 1 else f'{len(each)} ranks'} at {place or 'an unknown place'}"
        for place, each in rarest
    )


def _at(state: RankState) -> str:
    return f" at {state.place}" if state.place else ""
