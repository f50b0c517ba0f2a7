"""A run that grows to longer strategies, and one that is forked with another weight step: what is there is not run again."""

import json
import re
from dataclasses import dataclass

import pytest

from bt_ray.report.build import EQUAL_COST
from bt_ray.runs.run_dir import RunDir
from bt_ray.stages.lent import lenders
from bt_ray.strategy import StageNode
from tests.support.driver_runs import bt_ray
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SIDES = '["left", "right", "up", "down"]'
# All labels are one of four words and the fine-tune is long: it learns to say that word, which makes `w` the pick.
WANTED = '"side": "right"'
LEARNS = (
    "steps.w.epochs=6",
    "steps.w.learning_rate=1.0e-2",
    "rollout.concurrency=4",
    "rollout.samples=4",
    "steps.p.max_train_examples=5",
)
OLD = ("vanilla", "p", "w")
LONGER = ["p", "w", "p -> p", "w -> w"]


@dataclass(frozen=True)
class Begun:
    """What lay in the run directory, and was said, when the first two strategies had ended."""

    run: RunDir
    report: dict
    final: dict
    steps: dict
    stages: dict


def report(root):
    return json.loads(bt_ray("report", root, "--json").stdout)


def kept_steps(root):
    """Every step's record, by the step's name."""
    return {path.parent.name: path.read_bytes() for path in (root / "steps").glob("*/record.json")}


def kept_stages(root):
    """Records and submissions of the first two strategies' stages."""
    names = [f"{stage}/{file}.json" for stage in OLD for file in ("record", "job")]
    return {name: (root / "stages" / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    config = write_run(folder, strategy='["p", "w"]')
    program = folder / "program.py"
    assert 'Literal["left", "right"]' in program.read_text()
    program.write_text(program.read_text().replace('["left", "right"]', SIDES))
    for name in ("train", "val", "test"):
        path = folder / f"{name}.jsonl"
        path.write_text(re.sub('"side": "(left|right)"', WANTED, path.read_text()))
    config.write_text(config.read_text().replace("controls: {gold: w, tfidf: side}", "controls: {equal_cost: p}"))
    bt_ray("run", config, "--run-dir", folder / "run", "--set", *LEARNS, timeout_s=400)
    run = RunDir(folder / "run")
    final = run.stage_record("final")
    return Begun(run, report(run.root), final, kept_steps(run.root), kept_stages(run.root))


@pytest.fixture(scope="module")
def forked(begun):
    """A fork of the first two strategies with another fine-tune, run to its end; without the control, to save time."""
    new = begun.run.root.with_name("new")
    said = bt_ray("fork", begun.run.root, new, "--set", "steps.w.epochs=2", "controls.equal_cost=null").stdout
    assert "kept: vanilla, p\n" in said and "to run: w\n" in said
    bt_ray("run", new / "config.yaml", "--run-dir", new, timeout_s=400)
    return RunDir(new)


@pytest.fixture(scope="module")
def grown(begun, forked):
    """The run with two longer strategies. After the fork, which takes what the first two left."""
    config = begun.run.root.with_name("config.yaml")
    bt_ray("run", config, "--run-dir", begun.run.root, "--set", *LEARNS, f"strategy={json.dumps(LONGER)}", timeout_s=600)
    return begun.run


def step(run, name):
    return json.loads((run.step(name) / "record.json").read_text())


def seconds_of_path(run, stage_id):
    """Seconds of the steps of a stage and of those before it, each step once, and of those whose rows these took over."""
    node, names = StageNode.of(stage_id), set()
    while node is not None:
        names.update(run.stage_record(node.id)["steps"])
        node = node.parent
    names.update(name for taker in list(names) for name in lenders(run.step(taker)))
    return sum(step(run, name)["cost"]["seconds"] for name in names)


def test_prompt_search_alone_is_given_what_the_pick_cost(begun):
    """Of the first two strategies, whose final record is a copy: by now the run may have grown."""
    (control,) = begun.final["controls"]
    assert (control["name"], control["kind"], control["step"]) == ("p at equal cost", EQUAL_COST, "p")
    assert begun.report["best"]["path"] == "w", "the fine-tune is to win, else the search at equal cost gets no more than p"
    found = re.fullmatch(
        r"(\d+) candidates(?:, the most that are tried)? in place of 2: (\d+) s, where the pick took (\d+) s", control["note"]
    )
    assert found, control["note"]
    number, spent, paid = map(int, found.groups())
    assert number > 2
    (name,) = [name for name in begun.final["steps"] if name.startswith("search-")]
    searched, own = step(begun.run, name), step(begun.run, begun.run.stage_record("p")["search"])
    assert searched["stage"] == "final" and searched["name"] != own["name"]
    inputs = json.loads((begun.run.step(name) / "attempt-0001.json").read_text())["inputs"]
    assert inputs["step"]["num_candidates"] == number
    assert len(searched["result"]["trials"]) > len(own["result"]["trials"])
    beside = seconds_of_path(begun.run, "p") - own["cost"]["seconds"]
    assert spent == pytest.approx(beside + searched["cost"]["seconds"], abs=1)
    assert paid == pytest.approx(seconds_of_path(begun.run, "w"), abs=1)
    (shown,) = begun.report["controls"]
    assert shown["name"] == control["name"] and shown["note"] == control["note"]
    assert shown["test"]["n"] == len(control["test_scores"]) == 6
    assert "equal-cost p" in [contrast["against"] for contrast in begun.report["contrasts"]]


def test_rollouts_of_the_prompt_steps_draw_are_taken_over_by_the_weight_step(begun):
    """Five of the eight training examples, four times each: the fine-tune runs the others."""
    drawn, every = (
        next(step(begun.run, name) for name in begun.run.stage_record(stage)["steps"] if name.startswith("rollout-"))
        for stage in ("p", "w")
    )
    assert (drawn["result"]["rows"], every["result"]["rows"]) == (20, 32)
    assert lenders(begun.run.step(every["name"])) == {drawn["name"]: 20} and every["cost"]["lm_calls"] == 2 * 12
    assert f"20 of them were run by {drawn['name']}" in begun.run.stage_record("w")["note"]


def test_a_fork_with_another_fine_tune_runs_that_and_what_follows_from_it_alone(begun, forked):
    assert not (forked.stage("p") / "job.json").exists() and (forked.stage("w") / "job.json").is_file()
    for name in ("vanilla", "p"):
        assert (forked.stage(name) / "record.json").read_bytes() == begun.stages[f"{name}/record.json"]
    steps = kept_steps(forked.root)
    assert {name: steps[name] for name in begun.steps} == begun.steps
    new = steps.keys() - begun.steps.keys()
    assert {name.split("-")[0] for name in new} == {"finetune", "evaluate"}
    record = forked.stage_record("w")
    before = json.loads(begun.stages["w/record.json"])
    assert record["status"] == "done" and record["finetune"] in new and record["evaluate"] in new
    assert record["weights"]["id"] != before["weights"]["id"]
    rollouts = [[name for name in one["steps"] if name.startswith("rollout-")] for one in (record, before)]
    assert rollouts[0] == rollouts[1] and len(rollouts[0]) == 1
    assert set(forked.final_record()["test"]) == set(OLD)


def test_a_longer_list_of_strategies_adds_its_stages_and_leaves_the_others_as_they_were(begun, grown):
    assert kept_stages(grown.root) == begun.stages
    steps = kept_steps(grown.root)
    assert {name: steps[name] for name in begun.steps} == begun.steps
    found = report(grown.root)
    assert [stage["path"] for stage in found["stages"]] == ["vanilla", *LONGER]
    assert {stage["status"] for stage in found["stages"]} == {"done"}
    added = {stage["id"] for stage in found["stages"]} - set(OLD)
    assert {step(grown, name)["stage"] for name in steps.keys() - begun.steps.keys()} <= {*added, "final"}
    assert all((grown.stage(name) / "job.json").is_file() for name in added)


def test_a_second_step_of_the_same_name_is_a_step_of_its_own(grown):
    once, twice = (grown.stage_record(name) for name in ("p", "p.p"))
    assert once["search"] != twice["search"] and twice["search"] in kept_steps(grown.root)
    once, twice = (grown.stage_record(name) for name in ("w", "w.w"))
    assert once["finetune"] != twice["finetune"] and once["weights"]["id"] != twice["weights"]["id"]


def test_test_was_opened_once_more_for_the_stages_that_were_added(begun, grown):
    looks = [json.loads(line)["stages"] for line in (grown.root / "test_looks.jsonl").read_text().splitlines()]
    assert [set(look) for look in looks] == [set(OLD), {stage["id"] for stage in report(grown.root)["stages"]}]
    assert begun.report["test_looks"] == 1 and report(grown.root)["test_looks"] == 2
    assert looks[0].items() <= looks[1].items()
    assert set(grown.final_record()["test"]) == set(looks[1])
