"""The driver's loop over a cluster that runs nothing: its jobs end as the test says."""

import json
import time
from dataclasses import dataclass, field

import pytest

from bt_ray import driver as drivers
from bt_ray import running
from bt_ray.driver import Driver
from bt_ray.errors import BudgetError, ConfigError, RunDirError, StageFailedError, TrainingError
from bt_ray.report.build import build_report
from bt_ray.report.facts import collect
from bt_ray.runs.files import append_line, read_json, write_atomic
from bt_ray.runs.lock import ask_to_stop, owner_of
from bt_ray.runs.opening import is_complete, stage_hashes
from bt_ray.runs.run_dir import RunDir
from bt_ray.stages.__main__ import main as stage_main
from tests.support.plans import config
from tests.support.spending import plant

ROW = {"id": "a", "inputs": {"x": 1}, "labels": {"y": 1}}
COST = {"lm_calls": 1, "prompt_tokens": 1, "completion_tokens": 1, "train_tokens": 0, "seconds": 1.0}


@dataclass
class FakeCluster:
    """Each job runs for one look, then ends as `endings` has it for its stage, one entry a try; else it is done.

    An ending is "done", "skipped", "done late" (it committed, and its job failed all the same), "lost" (no record, no words), "hangs", or what the stage prints as it fails.
    """

    run: RunDir
    endings: dict[str, list[str]] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    jobs: dict[str, list[str]] = field(default_factory=dict)  # by submission id: stage, state, log
    meanwhile: object = None  # called at each look
    has: dict[str, float] = field(default_factory=lambda: {"CPU": 64.0})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def resources(self):
        return self.has

    def node_shapes(self):
        return [self.has]

    def submit(self, arguments, submission_id, metadata):
        stage = metadata["stage"]
        self.submitted.append(stage)
        self.jobs[submission_id] = [stage, "PENDING", ""]
        if stage == "final":
            stages = arguments[arguments.index("--test-stages") + 1].split(",")
            append_line(self.run.root / "test_looks.jsonl", {"stages": stages})

    def status(self, submission_id):
        if self.meanwhile:
            self.meanwhile()
        job = self.jobs.get(submission_id)
        if job is None:
            return None
        before, job[1] = job[1], self._next(job)
        return before

    def _next(self, job):
        stage, state, _ = job
        if state == "PENDING":
            return "RUNNING"
        if state != "RUNNING":
            return state
        left = self.endings.get(stage, [])
        ending = left[0] if left == ["hangs"] else left.pop(0) if left else "done"
        if ending in ("done", "skipped", "done late"):
            publish(self.run, stage, ending.split()[0])
            return "FAILED" if ending == "done late" else "SUCCEEDED"
        if ending == "hangs":
            return "RUNNING"
        job[2] = "Killed" if ending == "lost" else f"{drivers.FAILURE_MARK}{stage}: {ending}"
        return "FAILED"

    def logs(self, submission_id):
        return self.jobs[submission_id][2]

    def stop(self, submission_id):
        if submission_id in self.jobs:
            self.jobs[submission_id][1] = "STOPPED"
        self.stopped.append(submission_id)


def publish(run, stage, status="done"):
    record = {"id": stage, "status": status, "note": None, "hash": f"hash of {stage}", "cost": COST, "select_scores": {"a": 1.0}}
    if stage == "final":
        record |= {"opened": run.opened(), "test": {}}
    if status == "skipped":
        record["select_scores"] = {}
    write_atomic(run.stage(stage) / "record.json", json.dumps(record))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(strategy, **config) -> (run, cluster); a Driver of that run meets that cluster."""
    renewed = []
    monkeypatch.setattr(drivers, "POLL_S", 0.0)
    monkeypatch.setattr(drivers, "refuse_local_storage", lambda root: None)
    monkeypatch.setattr(drivers.serve_app, "delete_family", lambda name: renewed.append("deleted"))
    monkeypatch.setattr(Driver, "_deploy", lambda self, cluster: setattr(self, "_pool", Pool(renewed)))

    def begin(strategy, **changes):
        data = {"train": "t", "val": "v", "test": "t", "inputs": ["x"]}
        identity = {
            "follow": "a",
            "weights": {"model_dir": str(tmp_path)},
            "signatures": {"one": {"inputs": ["x"], "outputs": ["z"]}},
        }
        run = RunDir(tmp_path / "run")
        splits = {name: [ROW] for name in ("train", "search", "select", "test")}
        run.create(config(strategy=strategy, data=data, **changes), identity, splits)
        cluster = FakeCluster(run)
        cluster.pool_calls = renewed
        monkeypatch.setattr(drivers, "Cluster", lambda config: cluster)
        return run, cluster

    return begin


@dataclass
class Pool:
    calls: list

    def renew(self):
        self.calls.append("renewed")


def execute(run):
    driver = Driver(run, lambda seen: None)
    driver.execute()
    return driver


def looks(run):
    return build_report(collect(run))["test_looks"]


def test_a_stage_that_committed_is_done_whatever_its_job_ended_as(start):
    run, cluster = start(["p -> w"])
    cluster.endings = {"p": ["done late"]}
    execute(run)
    assert cluster.submitted == ["vanilla", "p", "p.w", "final"] and is_complete(run)


def test_a_run_goes_down_its_tree_then_opens_test_once(start):
    run, cluster = start(["p -> w", "w"])
    execute(run)
    assert cluster.submitted == ["vanilla", "p", "w", "p.w", "final"]
    assert is_complete(run) and looks(run) == 1 and collect(run)["status"] == "done"
    assert run.pick()["stages"] == stage_hashes(run)
    assert cluster.pool_calls[-1] == "deleted" and cluster.stopped == []
    execute(run)
    assert len(cluster.submitted) == 5, "nothing is left to do"


def test_branches_run_side_by_side_where_the_gpus_carry_them(start):
    run, cluster = start(["p", "w"], engine={"replicas": {"min": 1, "max": 1}})
    cluster.has, cluster.endings = {"CPU": 64.0, "GPU": 3.0}, {"p": ["hangs"]}

    def end_p():  # once its neighbour has been submitted
        if "w" in cluster.submitted:
            cluster.endings = {}

    cluster.meanwhile = end_p
    execute(run)
    assert cluster.submitted == ["vanilla", "p", "w", "final"]


def test_no_branch_runs_beside_a_fine_tune_that_sends_the_engines_away(start):
    run, cluster = start(["p", "w"], engine={"replicas": {"min": 0, "max": 1}})
    cluster.has, together = {"CPU": 64.0, "GPU": 4.0}, []
    cluster.meanwhile = lambda: together.append(sum(job[1] in ("PENDING", "RUNNING") for job in cluster.jobs.values()))
    execute(run)
    assert cluster.submitted == ["vanilla", "p", "w", "final"] and max(together) == 1


def test_a_restarted_driver_adopts_the_job_that_still_runs(start):
    run, cluster = start("p")
    publish(run, "vanilla")
    write_atomic(run.stage("p") / "job.json", json.dumps({"submission_id": "of the first driver"}))
    cluster.jobs["of the first driver"] = ["p", "RUNNING", ""]
    driver = execute(run)
    assert driver.jobs["p"].submission_id == "of the first driver"
    assert cluster.submitted == ["final"]


def test_a_job_that_ended_with_its_driver_is_submitted_anew(start):
    run, cluster = start("p")
    publish(run, "vanilla")
    write_atomic(run.stage("p") / "job.json", json.dumps({"submission_id": "of another cluster"}))
    execute(run)
    assert cluster.submitted == ["p", "final"]


def test_a_job_lost_to_the_machine_is_submitted_once_more(start):
    run, cluster = start("p")
    cluster.endings = {"vanilla": ["lost"]}
    execute(run)
    assert cluster.submitted == ["vanilla", "vanilla", "p", "final"] and is_complete(run)


def test_a_job_lost_twice_is_a_failure_that_names_its_log(start):
    run, cluster = start("p")
    cluster.endings = {"vanilla": ["lost", "lost"]}
    execute(run)
    assert cluster.submitted == ["vanilla", "vanilla"]
    message = read_json(run.stage("vanilla") / "error.json")["message"]
    assert "ended as FAILED (Killed); see stages/vanilla/job.log" in message
    assert (run.stage("vanilla") / "job.log").read_text() == "Killed"


def test_a_failed_stage_blocks_what_follows_and_the_other_branches_go_on(start):
    run, cluster = start(["p -> w -> p", "w"])
    cluster.endings = {"p": ["TrainingError: the loss is NaN."]}
    driver = execute(run)
    assert cluster.submitted == ["vanilla", "p", "w"], "one that failed by itself is not tried again"
    assert driver.states() == {"vanilla": "done", "p": "failed", "w": "done", "p.w": "skipped", "p.w.p": "skipped"}
    facts = {stage["id"]: stage for stage in collect(run)["stages"]}
    assert facts["p"]["error"] == "bt_ray: stage p: TrainingError: the loss is NaN."
    assert facts["p.w"]["error"] == "not run: p was failed" and facts["p.w.p"]["error"] == "not run: p -> w was skipped"


def test_weights_that_their_canary_refuses_are_never_picked_and_the_other_branches_go_on(start):
    run, cluster = start(["w -> p", "p"])
    cluster.endings = {"w": ["CanaryError: canary: the engine (float32) disagrees with transformers on weights 1a2b."]}
    driver = execute(run)
    assert driver.states() == {"vanilla": "done", "p": "done", "w": "failed", "w.p": "skipped"}
    assert cluster.submitted == ["vanilla", "p", "w"] or cluster.submitted == ["vanilla", "w", "p"]
    assert run.pick()["id"] in ("vanilla", "p") and "w" not in run.pick()["stages"] and looks(run) == 0
    assert "disagrees with transformers" in next(one["error"] for one in collect(run)["stages"] if one["id"] == "w")


def test_test_stays_closed_while_a_stage_is_failed(start):
    run, cluster = start(["p", "w"])
    cluster.endings = {"w": ["TrainingError: the loss is NaN."]}
    execute(run)
    assert looks(run) == 0 and "final" not in cluster.submitted
    assert run.pick() is not None and collect(run)["status"] == "failed"
    execute(run)  # mended
    assert cluster.submitted == ["vanilla", "p", "w", "w", "final"]
    assert looks(run) == 1 and collect(run)["status"] == "done" and is_complete(run)


def test_without_a_test_split_a_failed_run_is_not_done(start):
    run, cluster = start("p")
    run.write_header(
        run.config().model_copy(update={"data": run.config().data.model_copy(update={"test": None})}), run.header()["identity"]
    )
    cluster.endings = {"p": ["TrainingError: no."]}
    execute(run)
    assert run.pick() is not None and collect(run)["status"] == "failed"


def test_a_longer_strategy_makes_a_run_unfinished_again(start):
    run, cluster = start("p")
    execute(run)
    run.write_header(run.config().model_copy(update={"strategy": ("p", "w")}), run.header()["identity"])
    assert collect(run)["status"] == "unfinished" and not is_complete(run)
    before = list(cluster.submitted)
    execute(run)
    assert cluster.submitted == [*before, "w", "final"] and is_complete(run), "only what is missing"


def test_what_a_skipped_stage_leaves_out_is_complete(start):
    run, cluster = start(["w -> p", "p"])
    cluster.endings = {"w": ["skipped"]}
    driver = execute(run)
    assert driver.states() == {"vanilla": "done", "w": "skipped", "p": "done", "w.p": "skipped", "final": "done"}
    assert is_complete(run) and collect(run)["status"] == "done"


def test_the_budget_stops_the_run_and_keeps_what_is_committed(start):
    run, cluster = start(["p -> w", "w"])
    cluster.endings = {"p": ["BudgetError: budget.max_lm_calls 5 is used up (6 calls). Raise it and run again."]}
    with pytest.raises(BudgetError, match=r"max_lm_calls 5 is used up.*test was not opened"):
        execute(run)
    assert cluster.submitted == ["vanilla", "p"], "nothing is begun after it"
    assert run.pick()["id"] == "vanilla" and looks(run) == 0
    assert cluster.pool_calls[-1] == "deleted" and not (run.root / "lock.json").exists()


def test_seconds_of_the_budget_end_a_step_in_its_middle(start):
    run, cluster = start(["p -> w", "w"], budget={"max_seconds": 60.0})
    cluster.endings = {"p": ["hangs"]}
    for name in ("evaluate-a", "rollout-b"):
        plant(run.root, name, "vanilla", {**COST, "seconds": 20.0})
    seen = []

    def meanwhile():
        if "p" not in cluster.submitted:
            return
        seen.append(cluster.submitted[-1])
        # What an earlier job left; a step that is committed already; then one that began 10 s ago, and 21 s ago.
        name, ago, submitted = [("search-c", 99.0, 1.0), ("rollout-b", 99.0, 200.0), ("search-c", 10.0, 200.0)][
            min(len(seen) // 4, 2)
        ]
        ago = 21.0 if len(seen) > 12 else ago
        write_atomic(run.stage("p") / "progress.json", json.dumps({"since": time.time() - ago, "name": name}))
        word = run.stage("p") / "job.json"
        write_atomic(word, json.dumps({**json.loads(word.read_text()), "since": time.time() - submitted}))

    cluster.meanwhile = meanwhile
    driver = Driver(run, lambda seen: None)
    with pytest.raises(BudgetError, match=r"max_seconds 60 is used up\. What was written is kept.*test was not opened"):
        driver.execute()
    assert len(seen) > 12, "up to 50 seconds are not too many"
    assert [cluster.jobs[name][0] for name in cluster.stopped] == ["p"] and "w" not in cluster.submitted
    assert run.pick()["id"] == "vanilla"


def test_a_budget_that_ends_in_the_evaluation_on_test_is_no_failure(start):
    run, cluster = start("p")
    cluster.endings = {"final": ["BudgetError: budget.max_lm_calls 5 is used up (6 calls). Raise it and run again."]}
    driver = execute(run)
    assert driver.jobs["final"].state == "skipped" and run.pick() is not None
    assert "max_lm_calls 5 is used up" in read_json(run.stage("final") / "error.json")["message"]
    assert collect(run)["status"] == "unfinished" and not is_complete(run)
    execute(run)  # the budget was raised
    assert is_complete(run)


def test_who_lost_the_lock_stops_and_leaves_the_run_to_its_new_driver(start):
    run, cluster = start("p")
    cluster.endings = {"vanilla": ["hangs"]}
    taken = json.dumps({"host": "elsewhere", "pid": 1, "token": "of the new driver", "heartbeat": 4e9})
    cluster.meanwhile = lambda: write_atomic(run.root / "lock.json", taken)
    driver = Driver(run, lambda seen: setattr(driver, "_renewed", -1e9))  # the lock is looked at when the lease is renewed
    with pytest.raises(RunDirError, match="taken over by another driver"):
        driver.execute()
    assert cluster.stopped == [] and "deleted" not in cluster.pool_calls, "jobs and engines are the other's now"
    assert read_json(run.root / "lock.json")["token"] == "of the new driver"


def test_a_stage_that_takes_too_long_is_stopped(start):
    run, cluster = start("p -> w", cluster={"stage_timeout_s": 0.001})
    cluster.endings = {"vanilla": ["hangs"]}
    driver = execute(run)
    assert driver.states() == {"vanilla": "failed", "p": "skipped", "p.w": "skipped"}, "nothing behind it is left pending"
    assert [cluster.jobs[name][0] for name in cluster.stopped] == ["vanilla"]
    assert "longer than cluster.stage_timeout_s (0.001 s)" in read_json(run.stage("vanilla") / "error.json")["message"]
    assert run.pick() is None and looks(run) == 0


def test_a_run_that_is_interrupted_stops_its_jobs(start):
    run, cluster = start("p")
    cluster.endings = {"vanilla": ["hangs"]}

    def interrupt():
        raise KeyboardInterrupt

    driver = Driver(run, lambda seen: interrupt())
    with pytest.raises(KeyboardInterrupt):
        driver.execute()
    assert cluster.stopped == [driver.jobs["vanilla"].submission_id] and cluster.pool_calls[-1] == "deleted"
    assert not (run.root / "lock.json").exists()


def test_a_run_that_is_asked_to_stop_ends_as_an_interrupted_one_and_the_next_driver_goes_on(start):
    run, cluster = start("p")
    cluster.endings = {"vanilla": ["hangs"]}
    cluster.meanwhile = lambda: ask_to_stop(run.root, owner_of(run.root))
    driver = Driver(run, lambda seen: None)
    with pytest.raises(KeyboardInterrupt, match="`bt-ray stop` asked for it"):
        driver.execute()
    assert cluster.stopped == [driver.jobs["vanilla"].submission_id] and cluster.pool_calls[-1] == "deleted"
    assert not (run.root / "lock.json").exists() and not (run.root / "stop.json").exists()
    write_atomic(run.root / "stop.json", json.dumps({"token": "of the driver before"}))
    cluster.endings, cluster.meanwhile = {}, None
    execute(run)
    assert is_complete(run)


def test_a_request_from_the_time_before_the_engines_start_is_heeded_before_they_do(start, monkeypatch):
    run, cluster = start("p")
    deployed = []
    monkeypatch.setattr(Driver, "_deploy", lambda self, cluster: deployed.append(True))
    monkeypatch.setattr(type(cluster), "__enter__", lambda self: ask_to_stop(run.root, owner_of(run.root)) or self)
    with pytest.raises(KeyboardInterrupt, match="bt-ray stop"):
        execute(run)
    assert not deployed and not (run.root / "lock.json").exists()


def test_storage_that_a_node_does_not_see_is_refused_before_the_engines_start(start, monkeypatch):
    run, cluster = start("p")
    deployed = []
    monkeypatch.setattr(Driver, "_deploy", lambda self, cluster: deployed.append(True))

    def refuse(root):
        raise ConfigError(f"{root} is not the same folder on every node")

    monkeypatch.setattr(drivers, "refuse_local_storage", refuse)
    with pytest.raises(ConfigError, match=str(run.root)):
        execute(run)
    assert not deployed and not cluster.submitted


def test_what_a_failing_stage_prints_is_what_the_driver_takes_for_its_own_words(start, monkeypatch, capsys):
    run, cluster = start("p")

    def fail(*_):
        raise TrainingError("the loss is nan at step 3 of 8.")

    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("bt_ray.stages.__main__.end_with_parent", lambda: None)
    monkeypatch.setattr("bt_ray.stages.__main__.run_stage", fail)
    assert stage_main(["--run-dir", str(run.root), "--stage", "vanilla", "--app", "a"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{drivers.FAILURE_MARK}vanilla: TrainingError: the loss is nan")
    cluster.endings = {"vanilla": [said.splitlines()[0].removeprefix(f"{drivers.FAILURE_MARK}vanilla: ")]}
    execute(run)
    assert cluster.submitted == ["vanilla"], "it is not tried again"
    assert "TrainingError: the loss is nan at step 3 of 8." in read_json(run.stage("vanilla") / "error.json")["message"]


def test_the_view_says_who_asked_for_the_stop(start, monkeypatch, capsys):
    from bt_ray import console

    run, cluster = start("p")
    cluster.endings = {"vanilla": ["hangs"]}
    cluster.meanwhile = lambda: ask_to_stop(run.root, owner_of(run.root))
    monkeypatch.setattr(console, "prepare_in", lambda config, run: None)
    monkeypatch.setattr(console, "open_run", lambda root, prepared: run)
    assert console.run_with_view(run.config(), run.root, plain=True, command="bt-ray run c.yaml") == 130
    said = capsys.readouterr().out
    assert "Stopped: `bt-ray stop` asked for it. What was committed is kept; go on with:\n  bt-ray run c.yaml" in said


def test_what_the_verb_and_compile_share_shows_the_run_and_raises_for_failed_stages(start, capsys):
    run, cluster = start("p")
    cluster.endings = {"p": ["TrainingError: the loss is NaN."]}
    running.carry_out(run, running.make_console())
    shown = capsys.readouterr().out
    assert "vanilla: done" in shown and "p: failed" in shown and "Together" in shown
    assert run.plan().keys() == {"vanilla", "p", "final", "in all"}
    with pytest.raises(StageFailedError, match="1 of 2 stages failed: bt_ray: stage p: TrainingError"):
        running.raise_if_failed(collect(run))
    running.carry_out(run, None)
    assert capsys.readouterr().out == "" and is_complete(run)
    running.raise_if_failed(collect(run))
