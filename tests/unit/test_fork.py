"""A fork keeps what its change does not touch."""

import json

import pytest

from bt_ray import config_file
from bt_ray.cli import main
from bt_ray.driver import open_run
from bt_ray.errors import ConfigError, RunDirError
from bt_ray.fork import fork, touched
from bt_ray.preflight import prepare
from bt_ray.runs.commit import Cost, Step, StepKey
from bt_ray.runs.run_dir import RunDir, changed_keys
from bt_ray.strategy import StageNode
from tests.support.tiny_run import write_run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run whose stages `vanilla`, `p` and `w` are done, with one committed step."""
    folder = tmp_path_factory.mktemp("source")
    patch = pytest.MonkeyPatch()
    patch.setenv("BT_RAY_HOME", str(folder / "home"))
    run = open_run(folder / "run", prepare(config_file.load(write_run(folder, strategy='["p", "w"]'))))
    patch.undo()
    step = Step(run.root, StepKey("rollout", {"a": 1}))
    step.begin()
    (step.files / "file").write_text("kept")
    step.commit("p", {"passed": 1}, Cost())
    for name in ("vanilla", "p", "w"):
        run.stage(name).mkdir(parents=True)
        (run.stage(name) / "record.json").write_text(json.dumps({"id": name, "status": "done", "hash": name}))
    return run


@pytest.fixture(autouse=True)
def home(source, monkeypatch):
    monkeypatch.setenv("BT_RAY_HOME", str(source.root.parent / "home"))


def test_a_changed_step_is_run_anew_and_the_rest_is_kept(source, tmp_path, capsys):
    assert main(["fork", str(source.root), str(tmp_path / "new"), "--set", "steps.w.epochs=7"]) == 0
    printed = capsys.readouterr().out
    assert "changed: steps.w.epochs" in printed
    assert "kept: vanilla, p\n" in printed
    assert "to run: w\n" in printed
    new = RunDir(tmp_path / "new")
    assert new.config().steps["w"].epochs == 7
    assert new.stage_record("p") == source.stage_record("p")
    assert new.stage_record("w") is None
    assert Step(new.root, StepKey("rollout", {"a": 1})).record() is not None
    # The written config is that of the new run: `bt-ray run` goes on with it.
    again = config_file.load(tmp_path / "new" / "config.yaml")
    assert not changed_keys(again.model_dump(mode="json"), new.config().model_dump(mode="json"))


def test_another_strategy_keeps_everything(source, tmp_path):
    made = fork(source, tmp_path / "new", ('strategy=["p", "w", "p -> w"]',))
    assert (made.kept, made.anew) == (("vanilla", "p", "w"), ("p -> w",))


def test_what_all_stages_share_keeps_none(source, tmp_path):
    made = fork(source, tmp_path / "new", ("rollout.temperature=0.5",))
    assert made.kept == ()
    assert Step(tmp_path / "new", StepKey("rollout", {"a": 1})).record() is not None  # found, if it is asked for again


def test_refusals(source, tmp_path):
    with pytest.raises(ConfigError, match=r"steps\.w\.epoch"):
        fork(source, tmp_path / "new", ("steps.w.epoch=7",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(RunDirError, match="not empty"):
        fork(source, tmp_path / "full", ("seed=1",))


def test_which_stages_a_key_touches():
    assert touched(StageNode(("p", "w")), ["steps.w.epochs"])
    assert not touched(StageNode(("p", "p")), ["steps.w.epochs"])
    assert not touched(StageNode(("p",)), ["controls.gold"])
    assert touched(StageNode(()), ["seed"])


def test_a_new_step_changes_no_old_stage():
    assert changed_keys({"steps": {"p": {"a": 1}}}, {"steps": {"p": {"a": 1}, "w": {"b": 1}}}) == []
    assert changed_keys({"steps": {"p": {"a": 1}}}, {"steps": {"p": {"a": 2}}}) == ["steps.p.a"]
