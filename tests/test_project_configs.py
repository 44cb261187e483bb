"""Which configs the rules of the house are for."""

import subprocess
from pathlib import Path

from tests.project_configs import project_configs


def test_a_users_own_config_is_not_judged_by_the_rules_of_the_house(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    ours, mine = (tmp_path / "configs" / name for name in ("debug_softmax_muon.toml", "mine.toml"))
    ours.touch()
    mine.touch()
    assert project_configs(root=tmp_path) == [ours, mine]
    for words in (["init", "--quiet"], ["add", str(ours)]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert project_configs(root=tmp_path) == [ours]
    assert project_configs("60m_*.toml", root=tmp_path) == []
