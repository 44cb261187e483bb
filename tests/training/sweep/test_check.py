"""A plan whose members cannot be trained is refused before any of them starts."""

from pathlib import Path

import pytest

from errors import UserError
from tests.training.sweep.plans import CONFIGS, RATE, write_plan
from training.sweep import check
from training.sweep.__main__ import main

SOFTMAX = str(CONFIGS / "debug_softmax_muon.toml")


def stage(name: str, more: str = "") -> str:
    return f'\n[[stages]]\nname = "{name}"\nconfigs = ["{SOFTMAX}"]\n{more}\n'


def axis(key: str, values: str) -> str:
    return f'[[stages.axes]]\nkeys = ["{key}"]\nvalues = {values}\n'


STABLE = stage("stable", "set.training.stop_at_step = 8")
DECAY = stage("decay", 'start_from = "stable"')


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (stage("one", axis("schedule.warmup_steps", "[2, 13]")), ["stage one, member 1", "warmup_steps"]),
        (stage("one", axis("schedule.warmup_steps", "[13, 2]")), ["stage one, member 0", "warmup_steps"]),
        (stage("one", axis("model.custom_size.num_kv_heads", "[1, 3]")), ["member 1", "num_kv_heads"]),
        (
            stage("one", "set.training.local_batch_size = 4")
            + stage("later", axis("training.local_batch_size", "[4, 8]")),
            ["stage later, member 2", "local_batch_size (8) * ranks (2)"],
        ),
        (stage("one", axis("parallelism.shard", "[1, 2]")), ["member 1", "parallelism.shard"]),
        (STABLE + DECAY + "set.training.steps = 8", ["stage decay, member 1", "this run ends at step 8"]),
        (STABLE + DECAY + "set.schedule.decay_ratio = 0.5", ["the decay of this run begins after step 6"]),
        (STABLE + DECAY + "set.model.tie_embeddings = false", ["another architecture"]),
        (STABLE + DECAY + "set.training.seq_len = 64", ["other sequences", "restart_data"]),
        (
            STABLE + DECAY + "set.training.stop_at_tokens = 5000\nset.training.global_batch_size = 16",
            ["the 8 steps of", "have 2048 in all"],
        ),
    ],
)
@pytest.mark.parametrize("mode", ["--dry-run", "--sbatch", None])
def test_a_member_that_fails_at_its_start_is_refused_before(
    stages: str, said: list[str], mode: str | None, tmp_path: Path
) -> None:
    head = "gpus_per_member = 2" if "local_batch_size" in stages else ""
    path = write_plan(tmp_path, stages, head=head)
    with pytest.raises(UserError) as error:
        main([str(path), *([mode] if mode else [])])
    assert [word for word in said if word not in str(error.value)] == [], str(error.value)
    assert not (tmp_path / "plan").exists()


def test_the_models_of_members_that_differ_in_rates_are_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = []
    build = check.build_meta_model
    monkeypatch.setattr(check, "build_meta_model", lambda run: built.append(run) or build(run))
    rates = axis(RATE, str([0.001 * (n + 1) for n in range(20)])) + axis("schedule.warmup_steps", "[1, 2, 3]")
    path = write_plan(tmp_path, stage("one", f"seeds = [0, 1]\n{rates}"))
    main([str(path), "--dry-run"])
    assert "plan: 120 runs" in capsys.readouterr().out
    assert len(built) == 1
