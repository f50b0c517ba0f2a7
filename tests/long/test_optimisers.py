"""Every prompt optimiser and both weight methods in one run, on real parts with the tiny model."""

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from bt_ray.runs.run_dir import RunDir
from tests.support.driver_runs import bt_ray
from tests.support.endpoint_server import Endpoint, endpoint
from tests.support.tiny_model import make_tiny_model
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SAMPLES = ("--set", "rollout.samples=4")  # so many that some pass and others do not, which makes pairs
KEY, SECRET, WRITTEN = "BT_RAY_TEST_KEY", "sk-canary-8d1f40c2", "Say which of the two it is, and nothing else."
OF_ALL_ROWS = "on the shelf"  # stands in each input
SMALL = "num_candidates: 2, max_bootstrapped_demos: 1, max_labeled_demos: 1, proposer_max_tokens: 24, max_parallel: 2"
ENGINE = "{max_model_len: 512, max_num_seqs: 4, kv_cache_gib: 0.25, num_cpus: 0.5}"
STEPS = f"""
steps:
  labeled: {{optimizer: labeled, {SMALL}}}
  mipro: {{optimizer: mipro, num_instructions: 2, {SMALL}}}
  opro: {{optimizer: opro, proposals_per_round: 2, {SMALL}}}
  gpo: {{optimizer: gpo, proposals_per_round: 1, {SMALL}}}
  gepa: {{optimizer: gepa, {SMALL}}}
  copro: {{optimizer: dspy.COPRO, options: {{breadth: 2, depth: 1}}, {SMALL}}}
  simba: {{optimizer: dspy.SIMBA, options: {{bsize: 4, num_candidates: 2, max_steps: 1, max_demos: 1}}, {SMALL}}}
  boot: {{optimizer: dspy.BootstrapFewShot, options: {{max_bootstrapped_demos: 1, max_labeled_demos: 2}}, {SMALL}}}
  mine: {{optimizer: "grow.py:GrowDemos", {SMALL}}}
  asking: {{optimizer: opro, proposals_per_round: 2, proposer: {{model: other, engine: {ENGINE}}}, {SMALL}}}
  remote: {{optimizer: opro, proposals_per_round: 2, proposer: {{model: openai/writer, base_url: URL, api_key_env: {KEY}}}, {SMALL}}}
  taught: {{optimizer: random_fewshot, teacher: {{model: other, engine: {ENGINE}}}, {SMALL}}}
  w: {{method: sft, lora_rank: 8, epochs: 1, learning_rate: 1.0e-4, global_batch_size: 4}}
  dpo: {{method: dpo, lora_rank: 8, epochs: 2, learning_rate: 1.0e-4, global_batch_size: 2}}
"""
SEARCHES = ("labeled", "mipro", "opro", "gpo", "gepa", "copro", "simba", "boot", "mine", "asking", "remote", "taught")
COMPILING = {"copro": "dspy.COPRO", "simba": "dspy.SIMBA", "boot": "dspy.BootstrapFewShot"}
GUIDE = Path(__file__).resolve().parents[2] / "bt_ray" / "search" / "README.md"
ASKING = ("mipro", "opro", "gpo", "gepa", "asking", "remote")


@dataclass
class Finished:
    """A finished run of all steps, each alone: what the endpoint was asked, what was said, and where Ray's own files are."""

    run: RunDir
    served: Endpoint
    said: str
    ray_files: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimisers")
    config = write_run(folder, strategy=json.dumps([*SEARCHES, "dpo", "w -> dpo"]))
    (source,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    (folder / "grow.py").write_text(source)
    make_tiny_model(folder / "other", seed=1)
    text = config.read_text()
    before, after = text.index("steps:"), text.index("engine:")
    # Ray's own files go to a short path, as sockets lie below it.
    with (
        endpoint(lambda text: WRITTEN) as served,
        tempfile.TemporaryDirectory(prefix="ray-") as ray_files,
        pytest.MonkeyPatch.context() as patch,
    ):
        steps = STEPS.lstrip().replace("URL", served.url)
        config.write_text(text[:before] + steps + text[after:].replace("controls: {gold: w, tfidf: side}\n", ""))
        patch.setenv(KEY, SECRET)
        patch.setenv("RAY_TMPDIR", ray_files)
        done = bt_ray("run", config, "--run-dir", folder / "run", "--set", "rollout.concurrency=8", *SAMPLES, timeout_s=1000)
        yield Finished(RunDir(folder / "run"), served, done.stdout + done.stderr, Path(ray_files))


@pytest.fixture(scope="module")
def run(finished):
    return finished.run


def searched(run, name):
    record = run.stage_record(name)
    assert record["status"] == "done"
    folder = run.root / "steps" / record["search"]
    return folder, json.loads((folder / "record.json").read_text())["result"]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_scores_candidates_and_ends_with_the_best(run, name):
    _, result = searched(run, name)
    complete = [trial for trial in result["trials"] if trial["complete"]]
    assert len(complete) >= 1
    assert result["score"] == pytest.approx(max(trial["score"] for trial in complete))
    assert set(result["best"]["predictors"]) == {"colour", "side"}


@pytest.mark.parametrize("name", ASKING)
def test_what_the_lm_proposed_is_kept_and_paid_for(run, name):
    folder, _ = searched(run, name)
    asked = (folder / "proposer_calls.jsonl").read_text().splitlines()
    assert asked
    rows = [json.loads(line) for path in (folder / "rows").rglob("*.jsonl") for line in path.read_text().splitlines()]
    cost = json.loads((folder / "record.json").read_text())["cost"]
    assert cost["lm_calls"] == len(asked) + sum(len(row["calls"]) for row in rows if not row.get("reused"))


def test_a_candidate_that_an_earlier_search_scored_costs_nothing(run):
    """All searches have the program as written among their candidates, on the same weights and examples."""
    rows = {}
    for name in SEARCHES:
        folder, _ = searched(run, name)
        rows[name] = [json.loads(line) for path in (folder / "rows").glob("*/*.jsonl") for line in path.read_text().splitlines()]
    asked = [(row["candidate_id"], row["example_id"]) for found in rows.values() for row in found if not row.get("reused")]
    failed = {(row["candidate_id"], row["example_id"]) for found in rows.values() for row in found if row["error"]}
    assert any(row.get("reused") for row in rows[SEARCHES[-1]])
    assert len([one for one in asked if one not in failed]) == len({one for one in asked if one not in failed})


def test_gepa_runs_training_rows_and_keeps_its_lineage(run):
    folder, result = searched(run, "gepa")
    assert list((folder / "rows" / "train").rglob("*.jsonl"))
    assert result["lineage"]


@pytest.mark.parametrize("name", COMPILING)
def test_an_optimiser_of_dspy_runs_inside_the_stage_with_its_weights(run, name):
    folder, result = searched(run, name)
    answers = [json.loads(line)["answer"] for line in (folder / "compile_calls.jsonl").read_text().splitlines()]
    assert {answer["weights_id"] for answer in answers} == {run.header()["identity"]["model"]}
    assert COMPILING[name] in [trial["label"] for trial in result["trials"]] or any(
        COMPILING[name] in note for note in result["notes"]
    )


def test_what_an_optimiser_of_dspy_compiled_is_scored(run):
    """COPRO and SIMBA may give up on a random model, or return the prompts that they were given; this one finds demos."""
    _, result = searched(run, "boot")
    (compiled,) = [trial for trial in result["trials"] if trial["label"] == COMPILING["boot"]]
    assert compiled["num_examples"] > 0 and compiled["num_demos"] > 0 and not compiled["refused"]


def test_the_searcher_of_the_guide_runs_from_its_file(run):
    _, result = searched(run, "mine")
    labels = [trial["label"] for trial in result["trials"]]
    assert labels[:2] == ["incoming", "1 demos"] and result["trials"][1]["num_demos"] == 1
    assert any(note.startswith("Demos stopped helping at") for note in result["notes"])


def proposers_weights(run, name):
    """Ids of the weights that answered the search's proposer."""
    folder, _ = searched(run, name)
    answers = [json.loads(line)["answer"] for line in (folder / "proposer_calls.jsonl").read_text().splitlines()]
    return {answer["weights_id"] for answer in answers}


def test_a_proposer_on_engines_of_its_own_writes_the_instructions(run):
    assert proposers_weights(run, "opro") == {run.header()["identity"]["model"]}
    assert len(proposers_weights(run, "asking")) == 1 and proposers_weights(run, "asking") != proposers_weights(run, "opro")


def test_a_proposer_behind_an_endpoint_writes_the_instructions_and_its_key_is_nowhere(finished):
    folder, result = searched(finished.run, "remote")
    assert [trial["label"] for trial in result["trials"] if trial["label"].startswith("instruction")]
    asked = [json.loads(line)["answer"] for line in (folder / "proposer_calls.jsonl").read_text().splitlines()]
    assert {answer["text"] for answer in asked} == {WRITTEN} and len(finished.served.requests) == len(asked)
    assert set(finished.served.keys) == {f"Bearer {SECRET}"}
    bt_ray("report", finished.run.root, "--html", finished.run.root / "report.html")
    logs = list(finished.ray_files.rglob("*.log"))
    assert logs, "Ray's logs are to be looked at too"
    for path in [*finished.run.root.rglob("*"), *finished.ray_files.rglob("*")]:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in finished.said


def test_no_log_holds_what_was_asked_or_answered(finished):
    logs = [
        path
        for root in (finished.run.root, finished.ray_files)
        for path in root.rglob("*")
        if path.suffix in (".log", ".out", ".err") and path.is_file()
    ]
    assert {path.is_relative_to(finished.ray_files) for path in logs} == {True, False}, "Ray's, and those of the training workers"
    data = [row["inputs"]["text"] for split in ("train", "search", "select", "test") for row in finished.run.examples(split)]
    assert data and all(OF_ALL_ROWS in text for text in data)
    for path in logs:
        text = path.read_text(errors="replace")
        assert OF_ALL_ROWS not in text and WRITTEN not in text, path


def test_a_teacher_with_other_weights_runs_the_program_and_the_student_keeps_its_own(run):
    def rollouts_of(name):
        return {step for step in run.stage_record(name)["steps"] if step.startswith("rollout-")}

    assert len(rollouts_of("taught")) == 1 and not rollouts_of("taught") & rollouts_of("labeled")
    assert run.stage_record("taught")["weights"]["id"] == run.header()["identity"]["model"]
    (name,) = rollouts_of("taught")
    rows = [json.loads(line) for path in run.step(name).glob("rows/*.jsonl") for line in path.read_text().splitlines()]
    assert rows and {row["weights_id"] for row in rows} == proposers_weights(run, "asking")  # the other model's
    result = json.loads((run.step(name) / "record.json").read_text())["result"]
    folder, found = searched(run, "taught")
    assert begun_with(folder)["teacher"] == result["rows_hash"]
    assert result["passed"] and f"come from {result['examples_passed']} of" in " ".join(found["notes"])
    assert [trial for trial in found["trials"] if trial["label"] == "first" and trial["num_demos"]]


def begun_with(folder):
    """What a step's result follows from."""
    return json.loads((folder / "attempt-0001.json").read_text())["inputs"]


def test_dpo_learns_from_pairs(run):
    record = run.stage_record("dpo")
    assert record["status"] == "done" and "preference pairs to learn from" in record["note"]
    assert record["weights"]["kind"] == "lora"


def test_dpo_after_sft_goes_on_from_its_adapter(run):
    before, after, alone = (run.stage_record(name) for name in ("w", "w.dpo", "dpo"))
    assert after["status"] == "done" and after["weights"]["kind"] == before["weights"]["kind"] == "lora"
    inputs = {name: begun_with(run.step(record["finetune"])) for name, record in (("after", after), ("alone", alone))}
    assert inputs["after"]["step"]["method"] == "dpo" and inputs["after"]["start"] == before["weights"]["id"]
    base = run.header()["identity"]["model"]
    assert inputs["alone"]["start"] == inputs["alone"]["model"] == inputs["after"]["model"] == base
    assert len({record["weights"]["id"] for record in (before, after, alone)} | {base}) == 4
