"""The driver: plan the tree, submit the stages that are ready, read their records, commit the pick.

It imports no stage's code; it meets the stages through jobs and files. A restarted driver finds
the records, and adopts stage jobs that still run.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bt_ray import planning, strategy
from bt_ray.cluster import DONE, Cluster
from bt_ray.config import EngineConfig
from bt_ray.errors import BtRayError, BudgetError, ConfigError, RunDirError
from bt_ray.lm import serve_app
from bt_ray.lm.types import Weights
from bt_ray.node_check import refuse_local_storage
from bt_ray.report import facts as run_facts
from bt_ray.report import selection
from bt_ray.resources import refusal
from bt_ray.runs.commit import spent_cost
from bt_ray.runs.files import read_json, write_atomic
from bt_ray.runs.identity import content_hash
from bt_ray.runs.lock import RunLock
from bt_ray.runs.opening import is_complete, stage_hashes
from bt_ray.runs.run_dir import RunDir

POLL_S = 0.5
LEASE_S = 120.0
MAX_SUBMISSIONS = 2  # a job lost to the machine is submitted again; one that failed by itself is not
FAILURE_MARK = "bt_ray: stage "
STOP_ASKED = "`bt-ray stop` asked for it"

Observer = Callable[[dict[str, str]], None]  # is told the state of every stage


@dataclass
class StageJob:
    """A stage as the driver sees it. The states are `planning`'s words."""

    state: str = "pending"
    submission_id: str | None = None
    submissions: int = 0
    started_s: float = field(default_factory=time.monotonic)
    error: str | None = None

    @property
    def over_budget(self) -> bool:
        return bool(self.error and BudgetError.__name__ in self.error)


class Driver:
    """Carries one run to its end. `observe` is given the states while it runs."""

    def __init__(self, run: RunDir, observe: Observer):
        self.run = run
        self.config = run.config()
        self.nodes = strategy.tree(self.config.strategy_steps())
        self.jobs = {node.id: StageJob() for node in self.nodes}
        self.app_name = f"bt-ray-{content_hash(str(run.root))}"
        self._observe = observe
        self._pool: Any = None
        self._renewed = 0.0

    def execute(self) -> None:
        """Run what is missing. Raises BtRayError; on KeyboardInterrupt stops its jobs and raises, as where
        `bt-ray stop` asks for it."""
        if is_complete(self.run):
            return
        on_sigterm = signal.getsignal(signal.SIGTERM)
        with RunLock(self.run.root) as self._lock, Cluster(self.config.cluster) as cluster:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own, which ends the process at once
            if reason := refusal(self.config, cluster.resources(), cluster.node_shapes()):
                raise ConfigError(reason)
            refuse_local_storage(self.run.root)
            self._stop_if_asked()
            self._deploy(cluster)
            try:
                self._run_stages(cluster)
                picked = self._commit_pick()
                self._raise_if_over_budget()
                # A stage that failed is mended and run again, and the pick may change: test waits for that.
                if picked and self.config.data.test and "failed" not in self.states().values():
                    self._run_final(cluster)
            finally:
                if self._lock.holds():  # else jobs and engines are those of the driver that took over
                    self._end(cluster)

    def _end(self, cluster: Cluster) -> None:
        try:
            self._stop_jobs(cluster)
        finally:
            serve_app.delete_family(self.app_name)

    def states(self) -> dict[str, str]:
        return {name: job.state for name, job in self.jobs.items()}

    def _deploy(self, cluster: Cluster) -> None:
        import ray.serve

        from bt_ray.lm.pool import app_of, deploy
        from bt_ray.lm.routed import pools_of

        logging.getLogger(ray.serve.__name__).setLevel(logging.ERROR)  # Serve sets its own level when it is imported
        counts = planning.engine_counts(self.config, cluster.resources())

        def make(name: str, engine: EngineConfig) -> Any:
            count = counts[name]
            replicas = engine.replicas.model_copy(update={"min": count, "max": max(count, engine.replicas.max)})
            return deploy(app_of(self.app_name, name), engine.model_copy(update={"replicas": replicas}), lease_s=LEASE_S)

        self._pool = pools_of(self.config, make)
        if self.run.stage_record(strategy.VANILLA) is None:
            # The first stage asks for the base model: the engine starts while that stage's job does.
            self._pool.begin_load(Weights.from_json(self.run.header()["identity"]["weights"]))

    def _run_stages(self, cluster: Cluster) -> None:
        side_by_side = planning.max_parallel(self.config, cluster.resources())
        for node in self.nodes:
            self._find(cluster, node.id)
        while True:
            for node in self.nodes:  # parents first, so that what stands behind a blocked stage is blocked with it
                if planning.blocked([node], self.states()):
                    self._block(node)
            over = any(job.over_budget for job in self.jobs.values())
            for node in [] if over else planning.ready(self.nodes, self.states(), side_by_side):
                self._submit(cluster, node.id, [])
            if not any(job.state == "running" for job in self.jobs.values()):
                break
            self._tick(cluster)

    def _raise_if_over_budget(self) -> None:
        stopped = [job.error for job in self.jobs.values() if job.over_budget]
        if stopped:
            raise BudgetError(f"{stopped[0]} The pick is among the stages that ended; test was not opened.")

    def _find(self, cluster: Cluster, stage_id: str) -> None:
        """Take over what an earlier driver left: a record, or a job that still runs."""
        job = self.jobs[stage_id]
        record = self.run.stage_record(stage_id)
        if record:
            job.state = record["status"]
            return
        submission_id = self._left_over(stage_id)
        if submission_id and cluster.status(submission_id) in ("PENDING", "RUNNING"):
            job.state, job.submission_id, job.submissions = "running", submission_id, 1

    def _left_over(self, stage_id: str) -> str | None:
        marker = self.run.stage(stage_id) / "job.json"
        return str(read_json(marker)["submission_id"]) if marker.is_file() else None

    def _stop_left_over(self, cluster: Cluster, stage_id: str) -> None:
        if submission_id := self._left_over(stage_id):
            cluster.stop(submission_id)

    def _submit(self, cluster: Cluster, stage_id: str, extra: list[str]) -> None:
        job = self.jobs.setdefault(stage_id, StageJob())
        job.submission_id = f"{self.app_name}-{stage_id}-{uuid.uuid4().hex[:8]}"
        job.submissions += 1
        job.started_s = time.monotonic()
        (self.run.stage(stage_id) / "error.json").unlink(missing_ok=True)
        word = {"submission_id": job.submission_id, "since": time.time()}
        write_atomic(self.run.stage(stage_id) / "job.json", json.dumps(word))
        arguments = ["--run-dir", str(self.run.root), "--stage", stage_id, "--app", self.app_name, *extra]
        cluster.submit(arguments, job.submission_id, {"run": self.app_name, "stage": stage_id})
        job.state = "running"

    def _tick(self, cluster: Cluster) -> None:
        """Look at the running jobs once, renew the engines' lease, tell the observer."""
        time.sleep(POLL_S)
        self._stop_if_asked()
        if time.monotonic() - self._renewed > LEASE_S / 4:
            self._pool.renew()
            self._renewed = time.monotonic()
            if not self._lock.holds():
                raise RunDirError(f"{self.run.root} was taken over by another driver; this one stops and leaves the run to it.")
        for stage_id, job in self.jobs.items():
            if job.state == "running":
                self._look(cluster, stage_id, job)
        self._stop_over_time(cluster)
        self._observe(self.states())

    def _stop_over_time(self, cluster: Cluster) -> None:
        """End the running stages in the middle of their steps once budget.max_seconds is reached: their rows are kept."""
        ceiling = self.config.budget.max_seconds
        # A second look: a step that commits between the two halves of one is counted in both.
        if ceiling is None or self._seconds() < ceiling or self._seconds() < ceiling:
            return
        for stage_id, job in self.jobs.items():
            if job.state == "running" and self.run.seconds_in_step(stage_id):
                assert job.submission_id is not None
                cluster.stop(job.submission_id)
                if record := self.run.stage_record(stage_id):  # it came to its end in this very moment
                    job.state = record["status"]
                    continue
                why = f"budget.max_seconds {ceiling:g} is used up. What was written is kept: raise it and run again."
                self._fail(stage_id, job, f"{BudgetError.__name__}: {why}")

    def _seconds(self) -> float:
        """Seconds of all steps, those at work included."""
        at_work = sum(self.run.seconds_in_step(name) for name, job in self.jobs.items() if job.state == "running")
        return at_work + spent_cost(self.run.root).seconds

    def _stop_if_asked(self) -> None:
        """Raise what Ctrl-C raises, so that both ways of stopping are one."""
        if self._lock.is_asked_to_stop():
            raise KeyboardInterrupt(STOP_ASKED)

    def _look(self, cluster: Cluster, stage_id: str, job: StageJob) -> None:
        assert job.submission_id is not None
        status = cluster.status(job.submission_id)
        if status not in (None, *DONE):
            if time.monotonic() - job.started_s > self.config.cluster.stage_timeout_s:
                cluster.stop(job.submission_id)
                self._fail(
                    stage_id, job, f"it took longer than cluster.stage_timeout_s ({self.config.cluster.stage_timeout_s:g} s)"
                )
            return
        record = self.run.stage_record(stage_id)
        if record:  # the marker that the stage committed, whatever the job server says of the job
            job.state = record["status"]
            return
        log = cluster.logs(job.submission_id) if status else ""
        write_atomic(self.run.stage(stage_id) / "job.log", log)
        own = [line for line in log.splitlines() if line.startswith(FAILURE_MARK)]
        if not own and job.submissions < MAX_SUBMISSIONS:
            job.state = "pending"
            return
        last = (log.strip() or "no output").splitlines()[-1][:200]
        self._fail(stage_id, job, own[-1] if own else f"its job ended as {status} ({last}); see stages/{stage_id}/job.log")

    def _fail(self, stage_id: str, job: StageJob, why: str) -> None:
        job.error = why if why.startswith(FAILURE_MARK) else f"{FAILURE_MARK}{stage_id}: {why}"
        job.state = "failed"
        self._note_error(stage_id, "failed", job.error)

    def _block(self, node: strategy.StageNode) -> None:
        parent = node.parent
        assert parent is not None
        self.jobs[node.id].state = "skipped"
        self.jobs[node.id].error = None
        self._note_error(node.id, "skipped", f"not run: {parent.path} was {self.jobs[parent.id].state}")

    def _note_error(self, stage_id: str, status: str, message: str) -> None:
        """What the report says of a stage without a record; a later driver tries it again."""
        write_atomic(self.run.stage(stage_id) / "error.json", json.dumps({"status": status, "message": message}))

    def _commit_pick(self) -> bool:
        """Commit the pick by `select`, before test is opened. False where no stage has an outcome."""
        facts = run_facts.collect(self.run, self.states())
        chosen = selection.pick(selection.from_facts(facts))
        if chosen is None:
            return False
        data = {"id": chosen.id, "best_id": chosen.best_id, "why": chosen.why, "stages": stage_hashes(self.run)}
        old = self.run.pick()
        if old is None or old != data:
            write_atomic(self.run.root / "pick.json", json.dumps(data))
        return True

    def _run_final(self, cluster: Cluster) -> None:
        """Open test, once, for every stage with an outcome."""
        done = [node.id for node in self.nodes if (self.run.stage_record(node.id) or {}).get("status") == "done"]
        if self.run.final_record():
            return
        (self.run.stage("final") / "record.json").unlink(missing_ok=True)
        self._stop_left_over(cluster, "final")  # an earlier driver's may have been told of other stages
        self.jobs["final"] = StageJob()
        while self.jobs["final"].state in ("pending", "running"):
            if self.jobs["final"].state == "pending":
                self._submit(cluster, "final", ["--test-stages", ",".join(done)])
            self._tick(cluster)
        if self.jobs["final"].over_budget:  # the stages' outcomes and the pick stand; test is scored with another budget
            self.jobs["final"].state = "skipped"
            self._note_error("final", "skipped", f"{self.jobs['final'].error} The pick is committed; test was not scored.")
        elif self.jobs["final"].state == "failed":
            raise BtRayError(
                f"the evaluation on test failed: {self.jobs['final'].error} The pick is committed; run again to go on."
            )

    def _stop_jobs(self, cluster: Cluster) -> None:
        for job in self.jobs.values():
            if job.state == "running" and job.submission_id:
                cluster.stop(job.submission_id)
