"""Which rank a process is, from the variables of torchrun, SLURM and Open MPI."""

import pytest

from errors import UserError
from training.launcher import complete_environment, first_host, ranks_of

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
# a batch script's own process
BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[003-004]",
}
STEP = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-node1-123@1",
}
ALONE = ("0", "1", "0")


def ranks(environment: dict[str, str]) -> tuple[str, str, str]:
    found = ranks_of(environment)
    return found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]


def test_torchrun_comes_first() -> None:
    for environment in (TORCHRUN, {**STEP, **TORCHRUN}, {**OPEN_MPI, **TORCHRUN}):
        assert ranks_of(environment) == TORCHRUN


def test_the_tasks_of_a_slurm_step_are_ranks_of_one_run() -> None:
    found = ranks_of(STEP)
    assert ranks(STEP) == ("5", "8", "1")
    assert found["MASTER_ADDR"] == "gpu003"
    assert 20000 <= int(found["MASTER_PORT"]) < 30000
    # all processes of a step agree, and steps differ
    assert (
        ranks_of({**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})["MASTER_PORT"] == found["MASTER_PORT"]
    )
    assert ranks_of({**STEP, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != found["MASTER_PORT"]
    # the user's choice is kept
    chosen = ranks_of({**STEP, "MASTER_ADDR": "ib0", "MASTER_PORT": "1234"})
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("ib0", "1234")


def test_a_task_that_sees_one_gpu_uses_it() -> None:
    assert ranks({**STEP, "CUDA_VISIBLE_DEVICES": "0"}) == ("5", "8", "0")
    assert ranks({**STEP, "CUDA_VISIBLE_DEVICES": "0,1"}) == ("5", "8", "1")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**STEP, "SLURM_STEP_ID": str(0xFFFFFFFB), "SLURM_PROCID": "0"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
    ],
    ids=["shell", "batch script", "step of one task", "batch step", "mpirun -n 1", "mpiexec -n 1"],
)
def test_one_process_waits_for_no_others(environment: dict[str, str]) -> None:
    assert ranks(environment) == ALONE
    environment = dict(environment)
    complete_environment(environment)
    assert environment["MASTER_ADDR"] == "localhost"


def test_the_processes_of_open_mpi_are_ranks_of_one_run() -> None:
    assert ranks(OPEN_MPI) == ("2", "4", "2")
    assert ranks_of(OPEN_MPI)["MASTER_ADDR"] == "localhost"
    # its daemons, one per node, are a step of SLURM
    both = {**STEP, "SLURM_STEP_NUM_TASKS": "2", **OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert ranks(both) == ("2", "4", "2")
    assert ranks_of(both)["MASTER_ADDR"] == "gpu003"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "has RANK, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "but not MASTER_PORT"),
        ({**TORCHRUN, "RANK": "4"}, "RANK is '4', WORLD_SIZE is '4', wanted a rank below"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x', wanted a number from 0"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1', wanted a number from 0"),
        ({**TORCHRUN, "LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5', wanted a number from 0"),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "0"}, "wanted a rank below"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999', wanted a number from 0 to 65535"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', wanted a number from 0 to 65535"),
        ({**STEP, "SLURM_PROCID": "x"}, "RANK is 'x', wanted a number from 0"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_PROCID is 1: this is one of several"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_SIZE is 2: this is one of several"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "Open MPI started 4 processes, but MASTER_ADDR is"),
        ({k: v for k, v in OPEN_MPI.items() if k != "PMIX_NAMESPACE"}, "but MASTER_PORT is missing"),
        ({k: v for k, v in STEP.items() if k != "SLURM_LOCALID"}, "but SLURM_LOCALID is missing"),
        ({k: v for k, v in STEP.items() if "NODELIST" not in k}, "but MASTER_ADDR is missing"),
    ],
)
def test_what_does_not_tell_the_rank_is_refused_in_one_line(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        ranks_of(environment)
    assert message in str(error.value)
    assert "torchrun" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[01-03,7]", "node01"),
        ("node[7,9-11],other", "node7"),
        ("a,b", "a"),
        ("gpu-a05.cluster,gpu-[b01-b02]", "gpu-a05.cluster"),
        ("rack[2-3]-node[4,5]", "rack2-node4"),
        ("", ""),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
