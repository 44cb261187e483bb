"""Rows are named by what their runs share, and what differs is what was chosen."""

from pathlib import Path

import pytest

import config
from config import to_table
from eval.report.choices import choices, differing_choices, has_key, is_rate
from eval.report.names import name_configs
from eval.report.rows import find_row, make_arms, make_rows, sort_rows
from eval.report.run_records import flatten, read_run
from eval.report.styles import COLORS, MARKERS, row_styles
from optimizers.config import UNREAD_KEYS, ScheduleKind
from tests.eval.report.run_folders import CONFIGS, STEPS, held_out, launch, make_run, seeds, training
from tests.project_configs import project_configs
from training.run_config import RunConfig

RATE = "--optimizer.groups.hidden.lr"


def flat(name: str, *words: str) -> dict[str, object]:
    return flatten(to_table(config.load(RunConfig, CONFIGS / f"{name}.toml", list(words))))


def names(*configs: dict[str, object], **options: bool) -> list[str]:
    return name_configs(configs, [Path(f"runs/{n}") for n in range(len(configs))], **options)


def test_a_row_is_named_by_what_its_seeds_share(tmp_path: Path) -> None:
    folders = [*seeds(tmp_path, "softmax", (2.5, 2.6)), *seeds(tmp_path, "parallax", (2.4, 2.3))]
    rows = make_rows([read_run(folder) for folder in folders])
    assert [(row.name, len(row.runs)) for row in rows] == [("Softmax, Muon", 2), ("Parallax, Muon", 2)]
    # by its name, by the name of one of its runs, by a folder
    for name in ("Parallax, Muon", "parallax_muon_1", str(folders[3]), f"{folders[2]}/"):
        assert find_row(rows, name) is rows[1]
    with pytest.raises(ValueError, match="is not a row"):
        find_row(rows, "parallax")
    second = make_run(
        tmp_path / "b", [launch(), *training(2.0)], RATE, "0.5", "--run.name", "debug_parallax_muon"
    )
    with pytest.raises(ValueError, match="names several rows"):
        find_row(make_rows([read_run(folder) for folder in (*folders, second)]), "debug_parallax_muon")


def test_a_name_has_the_choices_that_tell_rows_apart_and_no_others() -> None:
    softmax, parallax = flat("60m_softmax_muon"), flat("60m_parallax_muon")
    assert names(softmax) == ["Softmax, Muon"]
    assert names(softmax, parallax, flat("60m_parallax_adamw")) == [
        *("Softmax, Muon", "Parallax, Muon", "Parallax, AdamW")
    ]
    rates = [flat("60m_parallax_muon", RATE, rate) for rate in ("0.01", "0.02")]
    assert names(*rates) == ["Parallax, Muon, lr 0.01", "Parallax, Muon, lr 0.02"]
    # the rates of AdamW and Muon need not be told apart
    assert names(rates[1], flat("60m_parallax_adamw")) == ["Parallax, Muon", "Parallax, AdamW"]
    variants = ("gate", "low_rank", "no_rope_on_r", "annealing")
    assert names(parallax, *(flat(f"60m_parallax_{each}_muon") for each in variants)) == [
        "Parallax, Muon",
        "Parallax gate head, Muon",
        "Parallax r_rank 128, Muon",
        "Parallax rope_on_r false, Muon",
        "Parallax, Muon, weight_decay_gamma 2",
    ]
    assert names(softmax, flat("60m_softmax_parameter_matched_muon")) == [
        *("Softmax, Muon", "Softmax parameter matched, Muon")
    ]
    assert names(softmax, flat("0.6b_parallax_compute_matched_muon")) == [
        *("Softmax 60m, Muon", "Parallax 0.6b compute matched, Muon")
    ]
    assert names(parallax, flat("60m_parallax_cosine_adamw"), flat("60m_parallax_adamw")) == [
        *("Parallax, Muon", "Parallax, AdamW, cosine", "Parallax, AdamW")
    ]
    # a size that is named after its attention follows from it
    assert names(softmax, flat("60m_kda_muon")) == ["Softmax, Muon", "KDA, Muon"]
    # of a folder, where nothing else differs; of no kind that was told
    assert names(softmax, softmax) == ["Softmax, Muon (0)", "Softmax, Muon (1)"]
    assert names({}, {}) == ["0", "1"]


def test_every_config_of_the_project_has_a_name_of_its_own() -> None:
    paths = [path for path in project_configs("60m_*.toml") if "_decay_" not in path.stem]
    found = names(*(flat(path.stem) for path in paths))
    assert len(set(found)) == len(paths) > 20
    assert not any("(" in name for name in found)
    assert max(map(len, found)) < 50


def test_what_differs_is_what_was_chosen() -> None:
    kinds = ["model.attention.kind", "optimizer.groups.hidden.kind"]
    rates = ["optimizer.groups.hidden.lr", "optimizer.groups.hidden.weight_decay"]
    found = differing_choices([flat("60m_softmax_muon"), flat("60m_parallax_adamw")])
    # the scale of Muon's update is not its default; its momentum and AdamW's betas follow from the kind
    assert [*found] == [*kinds, rates[0], "optimizer.groups.hidden.scale", rates[1]]
    assert found["optimizer.groups.hidden.scale"] == ["spectral", "-"]
    free = {
        **{"--run.name": "other", "--run.folder": "elsewhere", "--run.seed": "3", "--data.shuffle_seed": "4"},
        **{"--data.tokenizer": "moved.json", "--training.local_batch_size": "2", "--eval.every": "7"},
        **{"--checkpoint.every": "9", "--training.compile": "false", "--model.attention.impl": "reference"},
        **{"--training.cuda_graphs": "false"},
    }
    words = [word for pair in free.items() for word in pair]
    assert differing_choices([flat("60m_parallax_muon"), flat("60m_parallax_muon", *words)]) == {}
    # values that are the default of one and were chosen by the other
    found = differing_choices([flat("60m_parallax_muon"), flat("60m_parallax_no_rope_on_r_muon")])
    assert found == {"model.attention.rope_on_r": [True, False]}
    # a choice among those of one kind is listed beside the other kind
    low_rank = flat("60m_parallax_low_rank_muon")
    found = differing_choices([flat("60m_softmax_muon"), low_rank, flat("60m_kda_muon")])
    assert found["model.attention.r_rank"] == ["-", 128, "-"]
    assert "model.size" not in found


def test_a_run_of_an_earlier_version_without_a_key_chose_its_default() -> None:
    new = flat("60m_parallax_muon")
    old = {key: value for key, value in new.items() if not key.endswith(("r_norm", "tie_embeddings"))}
    assert choices(old) == choices(new)
    assert choices(new)["model.attention.kind"] == "parallax"


def test_a_schedule_s_keys_are_compared_where_it_reads_them() -> None:
    words = ("--schedule.kind", "cosine", "--schedule.decay_ratio", "none")
    found = differing_choices([flat("debug_softmax_muon"), flat("debug_softmax_muon", *words)])
    assert found["schedule.kind"] == ["wsd", "cosine"]
    assert found.get("schedule.decay_ratio", [0.25, "-"]) == [0.25, "-"]


@pytest.mark.parametrize("table", ["schedule", "optimizer.groups.hidden.schedule"])
@pytest.mark.parametrize("kind", UNREAD_KEYS)
def test_a_schedule_has_the_keys_that_its_kind_reads(kind: ScheduleKind, table: str) -> None:
    # a group without a kind has the run's
    for run in ({f"{table}.kind": kind, "schedule.kind": kind}, {"schedule.kind": kind}):
        unread = {key for key in UNREAD_KEYS["constant"] if not has_key(run, f"{table}.{key}")}
        assert unread == {*UNREAD_KEYS[kind]}
        assert not has_key(run, f"{table}.no_such_key")
        assert has_key(run, f"{table}.warmup_steps") == (table == "schedule")
    other = {f"{table}.kind": kind, "optimizer.groups.hidden.kind": "muon"}
    assert has_key({"schedule.kind": "constant"} | other, f"{table}.min_lr_ratio") == (kind != "constant")


def test_options_of_any_optimizer_and_schedules_of_groups_make_names() -> None:
    own = [
        flat("60m_softmax_muon", "--optimizer.groups.hidden.schedule.decay_ratio", x) for x in ("0.5", "0.6")
    ]
    embedding = flat("60m_softmax_muon", "--optimizer.groups.embedding.schedule.kind", "constant")
    assert names(flat("60m_softmax_muon"), *own, embedding) == [
        "Softmax, Muon",
        "Softmax, Muon, decay_ratio 0.5",
        "Softmax, Muon, decay_ratio 0.6",
        "Softmax, Muon, embedding kind constant",
    ]
    kinds = ("soap", "hyperball_soap", "normuon_muon", "orthogonalized-adamw")
    assert names(*(flat(f"60m_softmax_{kind}") for kind in kinds)) == [
        *("Softmax, SOAP", "Softmax, SOAP, fixed_norm true", "Softmax, Muon", "Softmax, Orthogonalized AdamW")
    ]


def test_seeds_of_other_tokenizers_or_choices_are_no_seeds_of_a_row(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "a", [launch(), *training(2.0)])
    other = make_run(
        tmp_path / "b", [launch(tokenizer_fingerprint="e" * 16), *training(2.0)], "--run.seed", "1"
    )
    clipped = make_run(tmp_path / "c", [launch(), *training(2.0)], "--training.max_grad_norm", "2")
    more = make_run(
        tmp_path / "d", [launch(), *training(2.0)], "--parallelism.timeout_seconds", "9", "--run.seed", "2"
    )
    rows = make_rows([read_run(folder) for folder in (plain, other, clipped, more)])
    assert [[run.folder.name for run in row.runs] for row in rows] == [["a", "d"], ["b"], ["c"]]
    words = ("--training.cuda_graphs", "false", "--run.seed", "3")
    launched = make_run(tmp_path / "e", [launch(), *training(2.0)], *words)
    assert len(make_rows([read_run(plain), read_run(launched)])) == 1


def test_an_arm_is_what_differs_in_learning_rates_only(tmp_path: Path) -> None:
    folders = [
        *seeds(tmp_path, "softmax", (2.5,)),
        *(
            seeds(tmp_path, "parallax", (loss,), RATE, rate)[0]
            for rate, loss in (("0.02", 2.3), ("0.04", 2.6))
        ),
        make_run(tmp_path / "x", [launch(), *training(2.0, last=3)], RATE, "0.08"),
    ]
    rows = sort_rows(make_rows([read_run(folder) for folder in folders]), None)
    arms = make_arms(rows)
    assert [arm.name for arm in arms] == ["Parallax, Muon", "Softmax, Muon"]
    assert [row.name for row in arms[0].rows] == [
        f"Parallax, Muon, lr {rate}" for rate in ("0.02", "0.04", "0.08")
    ]
    assert arms[0].best is rows[0]
    # a row without a loss comes last, and is the best only where no row has one
    assert rows[-1].name == "Parallax, Muon, lr 0.08"
    assert make_arms(rows[-1:])[0].best is rows[-1]
    keys = [key for key in flat("60m_parallax_muon") if is_rate(key)]
    assert keys == [f"optimizer.groups.{group}.lr" for group in ("hidden", "embedding", "vectors")]


def test_no_two_arms_look_alike(tmp_path: Path) -> None:
    records = [launch(), *training(2.0), held_out(STEPS, 2.0)]
    paths = [path for path in project_configs("60m_*.toml") if "_decay_" not in path.stem]
    folders = [make_run(tmp_path / path.stem, records, name=path.stem) for path in paths]
    rows = make_rows([read_run(folder) for folder in folders])
    styles = row_styles(rows)
    models = {repr(config.load(RunConfig, path).model) for path in paths}
    assert len({(style.color, style.marker) for style in styles.values()}) == len(models)
    looks = {(style.color, str(style.dash), style.marker) for style in styles.values()}
    assert len(looks) == len(rows) > 20
    assert (styles["Softmax, Muon"].color, styles["Softmax, Muon"].marker) == (COLORS[0], MARKERS[0])
    assert (styles["Parallax, Muon"].color, styles["Parallax, Muon"].marker) == (COLORS[1], MARKERS[0])
    # the order of the rows does not matter to those two, nor the presence of others
    few = row_styles([row for row in rows if row.name in ("Parallax, Muon", "Parallax, AdamW", "KDA, Muon")])
    for name in ("Parallax, Muon", "Parallax, AdamW"):
        assert (few[name].color, few[name].dash) == (styles[name].color, styles[name].dash)
    assert [few["Parallax, Muon"].dash, few["KDA, Muon"].dash] == ["solid", "solid"]
    assert few["Parallax, AdamW"].dash != "solid"
