"""A program with two models, on real parts with tiny ones: each answers for its own predictor, and learns from its own rows."""

import json

import pytest

from bt_ray.runs.run_dir import RunDir
from tests.support.driver_runs import bt_ray
from tests.support.tiny_model import make_tiny_model
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_models")
    config = write_run(folder, strategy='"w -> p"')
    make_tiny_model(folder / "other", seed=1)
    engine = "{max_model_len: 512, max_num_seqs: 4, kv_cache_gib: 0.25, num_cpus: 0.5}"
    text = config.read_text().replace("controls: {gold: w, tfidf: side}\n", "")
    config.write_text(text + f"models: {{second: {{model: other, engine: {engine}}}}}\nassign: {{si*: second}}\n")
    bt_ray("run", config, "--run-dir", folder / "run", "--set", "rollout.concurrency=4")
    return RunDir(folder / "run")


def parts(run, stage):
    return {glob: (part.get("model", ""), part["id"], part["kind"]) for glob, part in run.stage_record(stage)["weights"]["parts"]}


def test_each_model_learns_from_the_rows_of_its_own_predictors(run):
    before, after = parts(run, "vanilla"), parts(run, "w")
    assert set(after) == {"si*", "*"} and after["si*"][0] == "second" and after["*"][0] == ""
    assert before["si*"][1] != before["*"][1]
    trained = {}
    for path in run.root.glob("steps/finetune-*"):
        result = json.loads((path / "record.json").read_text())["result"]
        rows = [json.loads(line) for line in next(path.rglob("rows.jsonl")).read_text().splitlines()]
        trained[result["weights"]["id"]] = {row["predictor"] for row in rows}
    assert trained == {after["si*"][1]: {"side"}, after["*"][1]: {"colour"}}
    assert after["si*"][2] == after["*"][2] == "lora"


def test_a_prompt_step_goes_on_with_both_and_the_picked_program_answers(run):
    assert parts(run, "w.p") == parts(run, "w")
    report = json.loads(bt_ray("report", run.root, "--json").stdout)
    assert {stage["status"] for stage in report["stages"]} == {"done"}
    assert "side" in bt_ray("ask", run.root, "an apple on a boat").stdout
