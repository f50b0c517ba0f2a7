"""A fork keeps what its change does not touch."""

import json
import shutil

import dspy
import pytest

from bt_ray import config_file, running
from bt_ray.better_together import BetterTogether, Splits
from bt_ray.cli import main
from bt_ray.errors import ConfigError, RunDirError
from bt_ray.fork import fork, touched
from bt_ray.preflight import prepare
from bt_ray.rollout.program import load_program, spec_of
from bt_ray.runs.commit import Cost, Step, StepKey
from bt_ray.runs.files import write_atomic
from bt_ray.runs.opening import open_run
from bt_ray.runs.run_dir import RunDir, changed_keys
from bt_ray.strategy import StageNode
from tests.support.programs import TwoModules, exact
from tests.support.tiny_run import write_run


def python_optimiser(source, metric=exact):
    """As in a notebook, with the model of `source`; a metric without a name has program and metric pickled."""
    parts = {"adapter": "compact", "rollout": {"max_tokens": 8}, "engine": {"max_model_len": 2048}}
    steps = {"p": {"optimizer": "random_fewshot"}, "w": {"method": "sft", "epochs": 2}}
    return BetterTogether(metric=metric, model=str(source.root.parent / "model"), **steps, **parts)


def python_splits():
    rows = [dspy.Example(message=f"my card {number} is gone", intent="card_lost").with_inputs("message") for number in range(12)]
    return Splits(rows[:6], rows[6:], None)


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


@pytest.mark.parametrize("kind", ["named", "pickled"])
def test_a_run_from_python_is_forked_with_its_rows_prompts_and_program(kind, source, tmp_path, monkeypatch):
    """Its rows are in no file, and its program perhaps in none either: the fork has them from the source."""
    optimiser = python_optimiser(source, metric=exact if kind == "named" else (lambda example, prediction, trace=None: True))
    program = TwoModules()
    program.route.signature = program.route.signature.with_instructions("Say who shall answer.")
    origin = open_run(tmp_path / "run", optimiser.prepare(program, python_splits(), "p -> w", str(tmp_path / "run")))
    assert origin.config().program.startswith("pickled:") == (kind == "pickled")
    if kind == "pickled":  # a script's class is known by the script, which is not what `bt-ray` finds as its source
        header = origin.header()
        header["identity"] |= {"program": "by the script", "metric": "by the script", "code": "of the script"}
        write_atomic(origin.root / "run.json", json.dumps(header))
    for name in ("vanilla", "p"):
        write_atomic(origin.stage(name) / "record.json", json.dumps({"id": name, "status": "done", "hash": name}))
    made = fork(origin, tmp_path / "new", ("steps.w.epochs=7",))
    assert (made.changed, made.kept) == (("steps.w.epochs",), ("vanilla", "p"))
    new, identity = RunDir(tmp_path / "new"), origin.header()["identity"]
    assert new.examples("select") == origin.examples("select") and new.examples("test") == []
    assert {**new.header()["identity"], "pickle_path": None} == {**identity, "pickle_path": None}
    # The command that the fork names goes on with it, without the origin.
    shutil.rmtree(origin.root)
    monkeypatch.setattr(running.Driver, "execute", lambda driver: None)
    assert main(["run", str(made.config_path), "--run-dir", str(new.root), "--plain"]) == 0
    program = load_program(spec_of(new.config(), new.header()["identity"]["pickle_path"]))
    assert [name for name, _ in program.named_predictors()] == ["route", "classify"]


def test_rows_from_python_stay_as_they_are(source, tmp_path):
    prepared = python_optimiser(source).prepare(TwoModules(), python_splits(), "p", str(tmp_path / "run"))
    origin = open_run(tmp_path / "run", prepared)
    with pytest.raises(ConfigError, match="rows of this run came from Python"):
        fork(origin, tmp_path / "new", ("data.search_share=0.3",))
    with pytest.raises(ConfigError, match="does not hold them"):
        running.prepare_in(origin.config(), RunDir(tmp_path / "nowhere"))


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
