"""The runs of a scaling table."""

from benchmarks.scaling import Member, members


def test_members_have_the_same_rows_per_gpu_or_the_same_batch() -> None:
    listed = members("x.toml", 8, 6)
    pairs = [(each.num_gpus, each.rows, each.replicas) for each in listed]
    assert pairs == [(1, 8, 1), (2, 16, 1), (4, 32, 1), (1, 32, 1), (2, 32, 1), (4, 32, 2)]
    assert members("x.toml", 8, 1) == [Member(config="x.toml", num_gpus=1, rows=8)]
