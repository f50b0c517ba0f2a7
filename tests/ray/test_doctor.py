"""The examination on a real engine with a tiny model."""

import pytest

from bt_ray.cli import main
from tests.support.tiny_run import write_run

pytestmark = pytest.mark.slow


def test_a_config_that_works_is_examined(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BT_RAY_HOME", str(tmp_path / "home"))
    config = write_run(tmp_path)
    assert main(["doctor", str(config), "--set", "steps.w.target_modules=[q_proj, v_proj]"]) == 0
    lines = {line[6:].split(": ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["model"].startswith("ok")
    assert "of 8 runs pass" in lines["passes"]
    assert "8 of 8 answers parse" in lines["module colour"]
    assert lines["adapter of w"].startswith("ok")
