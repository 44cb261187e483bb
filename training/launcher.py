"""The ranks of a launch: torchrun's environment variables, or those made of SLURM's or Open MPI's.

SLURM's and Open MPI's variables count inside a step of several tasks only: a batch script that starts one
process has SLURM_NTASKS = 8, too, and would wait for seven others.
"""

import re
import zlib
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from errors import UserError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_ONE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}
_REMEDY = "start it with torchrun, with srun, or with Open MPI's mpirun (docs/training.md)"
# SLURM numbers the batch script, the interactive step and others from here on
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# below the ports that Linux gives to outgoing connections
_FIRST_PORT, _NUM_PORTS = 20000, 10000
_LAST_PORT, _MOST_RANKS = 65535, 1_000_000


class _Launcher(NamedTuple):
    """Names of a launcher's variables."""

    name: str
    num_tasks: str
    rank: str
    local_rank: str


_SLURM = _Launcher("SLURM", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = _Launcher(
    "Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"
)


def complete_environment(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where torchrun has not.

    Args:
        environment: os.environ; MASTER_ADDR and MASTER_PORT are kept where they are set.

    Raises:
        UserError: The variables are those of several processes, but do not tell which of them this is, or
            where the main rank is; or one of them is no number, or out of range.
    """
    environment.update(ranks_of(environment))


def ranks_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the five variables of torchrun for a process.

    Raises:
        UserError: See complete_environment.
    """
    found = _find_ranks(environment)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        most = _LAST_PORT if name == "MASTER_PORT" else _MOST_RANKS
        if not found[name].isdecimal() or int(found[name]) > most:
            raise UserError(f"{name} is {found[name]!r}, wanted a number from 0 to {most}: {_REMEDY}")
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        given = ", ".join(f"{name} is {found[name]!r}" for name in _TORCHRUN[:2])
        raise UserError(f"{given}, wanted a rank below the number of ranks: {_REMEDY}, or unset them")
    return found


def _find_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    if "RANK" in environment or "WORLD_SIZE" in environment:
        missing = [name for name in _TORCHRUN if not environment.get(name)]
        if missing:
            present = ", ".join(name for name in _TORCHRUN if name not in missing)
            raise UserError(
                f"the environment has {present}, but not {', '.join(missing)}: {_REMEDY}, or unset them"
            )
        return {name: environment[name] for name in _TORCHRUN}
    # Open MPI first: its daemons, one per node, are the tasks of a SLURM step
    if _number(environment, _OPEN_MPI.num_tasks) > 1:
        return _of_tasks(environment, _OPEN_MPI, _open_mpi_address(environment))
    if _number(environment, _SLURM.num_tasks) > 1 and _is_ordinary_step(environment):
        return _of_tasks(environment, _SLURM, _slurm_address(environment))
    _refuse_other_tasks(environment)
    return _ONE_PROCESS | {name: environment[name] for name in _TORCHRUN if environment.get(name)}


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list, such as node01 of "node[01-03,7],other"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else "")


def _refuse_other_tasks(environment: Mapping[str, str]) -> None:
    """Raise if this is one of several processes of a launcher that is not served."""
    several = {
        "SLURM_PROCID": _SLURM.num_tasks not in environment and _number(environment, _SLURM.rank) > 0,
        "PMI_SIZE": _number(environment, "PMI_SIZE") > 1,
    }
    for name in (name for name, is_several in several.items() if is_several):
        raise UserError(
            f"{name} is {environment[name]}: this is one of several processes, each of which would train the "
            f"whole run; {_REMEDY}"
        )


def _of_tasks(
    environment: Mapping[str, str], launcher: _Launcher, address: Mapping[str, str]
) -> dict[str, str]:
    named = {
        "RANK": environment.get(launcher.rank, ""),
        "WORLD_SIZE": environment[launcher.num_tasks],
        "LOCAL_RANK": _local_rank(environment, launcher),
        **address,
    }
    found = {name: environment.get(name) or value for name, value in named.items()}
    sources = {"RANK": launcher.rank, "LOCAL_RANK": launcher.local_rank}
    missing = [sources.get(name, name) for name, value in found.items() if not value]
    if missing:
        raise UserError(
            f"{launcher.name} started {environment[launcher.num_tasks]} processes, but {', '.join(missing)} "
            "is missing: set it for all of them, or start the run with torchrun"
        )
    return found


def _local_rank(environment: Mapping[str, str], launcher: _Launcher) -> str:
    # with --gpus-per-task each process sees its own GPU only, as number 0
    local_rank, gpus = environment.get(launcher.local_rank, ""), environment.get("CUDA_VISIBLE_DEVICES")
    return "0" if local_rank and gpus and "," not in gpus else local_rank


def _slurm_address(environment: Mapping[str, str]) -> dict[str, str]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job = environment.get("SLURM_JOB_ID")
    step = f"{job}.{environment.get('SLURM_STEP_ID')}" if job else None
    return {"MASTER_ADDR": first_host(nodes), "MASTER_PORT": _port(step)}


def _open_mpi_address(environment: Mapping[str, str]) -> dict[str, str]:
    # Open MPI does not tell the host of rank 0
    is_one_host = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environment[_OPEN_MPI.num_tasks]
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
    return {
        "MASTER_ADDR": "localhost" if is_one_host else first_host(nodes),
        "MASTER_PORT": _port(job),
    }


def _port(job: str | None) -> str:
    """Return a port that all processes of a job agree on; empty without a job's id."""
    return "" if job is None else str(_FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS)


def _is_ordinary_step(environment: Mapping[str, str]) -> bool:
    return _number(environment, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0
