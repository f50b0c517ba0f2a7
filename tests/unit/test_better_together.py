"""`BetterTogether`: what it refuses, that it is the YAML's run, and how it runs and ends. No engine."""

import json
import sys

import dspy
import pytest
import yaml

from bt_ray import better_together, config_file, running
from bt_ray.better_together import BetterTogether, Splits, as_recorded
from bt_ray.config import PromptStep
from bt_ray.errors import ConfigError, StageFailedError
from bt_ray.preflight import prepare
from bt_ray.runs.files import write_atomic
from bt_ray.runs.opening import open_run
from bt_ray.runs.run_dir import IDENTITY_PARTS, IN_MEMORY, RunDir, differences
from tests.support.programs import exact
from tests.support.tiny_run import write_run

P = {"optimizer": "random_fewshot"}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"adaptor": "compact"}, "'adaptor' is no section of the config; did you mean 'adapter'"),
        ({"rollouts": {"samples": 2}, "p": P}, "did you mean 'rollout'"),
        ({"q": {"optimiser": "mipro"}}, "a dict with `optimizer` or `method` .got ..'optimiser': 'mipro'"),
        ({"zzz": 1}, "sections are adapter, assign, base_dir"),
        ({"strategy": "p"}, "'strategy' is no section of the config; that is given to compile"),
        ({"steps": {"p": P}}, "give each step as a keyword of its own"),
    ],
)
def test_a_keyword_that_is_neither_section_nor_step_is_refused(parts, words):
    with pytest.raises(ConfigError, match=words):
        BetterTogether(metric=exact, **parts)


def test_a_step_is_a_dict_or_an_object():
    steps = {"p": P, "w": {"method": "sft"}, "q": PromptStep.model_validate(P)}
    assert BetterTogether(metric=exact, seed=1, **steps).steps == steps
    assert BetterTogether(metric=exact, seed=1).steps.keys() == {"p", "w"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a run, whose program.py is importable as `program`."""
    folder = tmp_path_factory.mktemp("python")
    write_run(folder)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    patch.delitem(sys.modules, "program", raising=False)
    yield folder
    patch.undo()
    sys.modules.pop("program", None)


@pytest.fixture(autouse=True)
def home(folder, monkeypatch):
    monkeypatch.setenv("BT_RAY_HOME", str(folder / "home"))


def from_python(folder, run_dir, **changes):
    """The run of the YAML as a script writes it: (optimiser, program, splits, strategy)."""
    import program

    config = yaml.safe_load((folder / "config.yaml").read_text())
    rows = {
        name: [dspy.Example(**json.loads(line)).with_inputs("text") for line in (folder / f"{name}.jsonl").open()]
        for name in ("train", "val", "test")
    }
    parts = {key: config[key] for key in ("adapter", "rollout", "engine", "controls", "seed")}
    optimiser = BetterTogether(metric=program.exact, model=config["model"], **config["steps"], **{**parts, **changes})
    return optimiser, program.Program(), Splits(rows["train"], rows["val"], rows["test"]), config["strategy"]


def prepared_from_python(folder, run_dir):
    optimiser, *given = from_python(folder, run_dir)
    return optimiser.prepare(*given, str(run_dir))


def test_a_run_from_python_begins_as_that_of_the_yaml(folder, tmp_path):
    """What the steps' hashes follow from is the same: config, program, metric, model, rows, prompts."""
    python, written = prepared_from_python(folder, tmp_path), prepare(config_file.load(folder / "config.yaml"))
    assert python.config.program == "program:Program" and python.config.data.train == IN_MEMORY
    plain = [each.config.model_dump(mode="json") for each in (python, written)]
    assert differences(*plain) == []
    assert [key for key in plain[0] if plain[0][key] != plain[1][key]] == ["program", "metric", "data", "base_dir"]
    for part in (*IDENTITY_PARTS, "weights", "signatures", "code", "follow"):
        assert python.identity[part] == written.identity[part], part
    assert python.splits == written.splits


def test_compile_leaves_the_header_of_a_yaml_run_as_it_is(folder, tmp_path):
    run = open_run(tmp_path, prepare(config_file.load(folder / "config.yaml")))
    before = (run.root / "run.json").read_bytes()
    open_run(tmp_path, as_recorded(run, prepared_from_python(folder, tmp_path)))
    assert (run.root / "run.json").read_bytes() == before


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_references_that_no_longer_give_the_same_program_are_replaced(what, folder, tmp_path):
    if what == "changed":
        (tmp_path / "moved").mkdir()
        (tmp_path / "moved" / "program.py").write_text((folder / "program.py").read_text() + "# another version\n")
    run = open_run(tmp_path / "run", prepare(config_file.load(folder / "config.yaml")))
    header = run.header()
    header["config"]["base_dir"] = str(tmp_path / "moved")
    write_atomic(run.root / "run.json", json.dumps(header))
    open_run(run.root, as_recorded(run, prepared_from_python(folder, run.root)))
    assert run.config().program == "program:Program" and run.config().data.train == "train.jsonl"


def test_changed_rows_are_still_refused(folder, tmp_path):
    run = open_run(tmp_path / "run", prepare(config_file.load(folder / "config.yaml")))
    optimiser, program, splits, strategy = from_python(folder, tmp_path)
    prepared = optimiser.prepare(program, Splits(splits.train[1:], splits.val, splits.test), strategy, str(tmp_path))
    with pytest.raises(ConfigError, match="splits: its content changed"):
        open_run(run.root, as_recorded(run, prepared))


@pytest.fixture
def compiling(folder, tmp_path, monkeypatch):
    """compiling(driver's work, **keywords) -> (run, compile): a driver that does only that work."""

    def begin(work):
        monkeypatch.setattr(running.Driver, "execute", lambda driver: work(driver))
        monkeypatch.setattr(better_together.bundle, "load", lambda run: dspy.Predict("text -> side"))
        optimiser, program, splits, strategy = from_python(folder, tmp_path)

        def compile(**more):
            named = {"trainset": splits.train, "valset": splits.val, "testset": splits.test, "strategy": strategy}
            return optimiser.compile(program, **named, run_dir=str(tmp_path / "run"), **more)

        return RunDir(tmp_path / "run"), compile

    return begin


def test_compile_keeps_the_plan_and_shows_what_runs_unless_told_not_to(compiling, capsys):
    def work(driver):
        assert driver.run.plan() is not None
        driver._observe({**driver.states(), "vanilla": "running"})

    run, compile = compiling(work)
    compile()
    shown = capsys.readouterr().out
    assert "Together" in shown and "vanilla: running" in shown
    (run.root / "plan.json").unlink()
    better = compile(progress=False)
    assert capsys.readouterr().out == ""
    assert {row["id"] for row in better.report["plan"]} >= {"vanilla", "p", "final"}


def test_compile_raises_where_a_stage_failed(compiling):
    def work(driver):
        write_atomic(driver.run.stage("p") / "error.json", json.dumps({"status": "failed", "message": "the loss is NaN."}))

    _, compile = compiling(work)
    with pytest.raises(StageFailedError, match=r"1 of 5 stages failed: the loss is NaN\. Mend the cause"):
        compile(progress=False)


def test_an_unknown_key_of_a_step_names_the_nearest():
    optimiser = BetterTogether(metric=exact, p=P, w={"method": "sft", "epoch": 3})
    parts = {"program": "a:b", "metric": "a:c", "data": {"train": "t", "val": "v", "inputs": ("x",)}, "strategy": "p"}
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        optimiser._config(parts)
