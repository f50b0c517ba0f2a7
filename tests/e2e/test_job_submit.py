"""A whole run as a Ray job of its own: what `ray job submit --working-dir . -- python jobs/better_together.py` starts, and
`bt-ray submit` of the same run."""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bt_ray.cluster import DONE, Cluster
from bt_ray.config import ClusterConfig
from tests.support.driver_runs import bt_ray
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RAYS_OWN = ("ActorLocationTracker", "_AutoscalingCoordinatorActor", "_StatsActor")  # Ray Data's, one of each on a cluster
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def known_cluster() -> Iterator[str]:
    """A cluster of our own that its jobs find beside others on this machine, as one of `ray start`: the address of its job server."""
    import ray

    # Short, as sockets lie below it; a folder of its own, as the note in it names one cluster.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        with Cluster(ClusterConfig()):
            (Path(folder) / "ray" / "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
            yield f"http://{ray._private.worker.get_dashboard_url()}"


def neighbour() -> Any:
    """A handle to somebody else's Serve application on the cluster."""
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    class Neighbour:
        def __call__(self) -> str:
            return "still here"

    serve.start(proxy_location="Disabled")
    return serve.run(Neighbour.bind(), name="neighbour", route_prefix=None)


def what_is_left() -> dict[str, set[str]]:
    """Applications, actors and placement groups on the cluster that are not the neighbour's, or Serve's own."""
    import ray
    from ray import serve
    from ray.util.state import list_actors

    actors = {actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")], limit=1000)}
    groups = {name for name, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}
    apps = set(serve.status().applications)
    assert "neighbour" in apps, "it was taken down"
    return {
        "apps": apps - {"neighbour"},
        "actors": actors - {"ServeController", "ServeReplica:neighbour:Neighbour", *RAYS_OWN},
        "groups": groups,
    }


def succeeds(jobs: Any, name: str) -> None:
    """Wait for a job's end, which is to be a good one."""
    deadline = time.monotonic() + 600
    while jobs.get_job_status(name).value not in DONE:
        assert time.monotonic() < deadline, jobs.get_job_logs(name)
        time.sleep(1)
    assert jobs.get_job_status(name).value == "SUCCEEDED", jobs.get_job_logs(name)


def test_the_driver_runs_as_a_job_and_its_stages_take_over_its_working_directory(tmp_path):
    from ray.job_submission import JobSubmissionClient

    folder, run_dir = tmp_path / "work", tmp_path / "run"
    write_run(folder, strategy='"vanilla"', train=4)
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    with known_cluster() as url:
        jobs, other = JobSubmissionClient(url), neighbour()
        driver = jobs.submit_job(
            entrypoint=f"python jobs/better_together.py --config config.yaml --run-dir {run_dir}",
            runtime_env={"working_dir": str(folder), "env_vars": {"MINE": "1"}},
        )
        succeeds(jobs, driver)
        found = jobs.list_jobs()
        vanilla = run_dir / "stages" / "vanilla" / "record.json"
        before = json.loads(vanilla.read_text())
        vanilla.unlink()  # one stage alone, as a job that anybody submits: its steps are there, so that no engine starts
        stage = f"python jobs/stage.py --run-dir {run_dir} --stage vanilla --app alone"
        succeeds(jobs, jobs.submit_job(entrypoint=stage, runtime_env={"working_dir": str(folder)}))
        assert json.loads(vanilla.read_text())["hash"] == before["hash"]
        again = bt_ray("submit", folder / "config.yaml", "--address", url, "--run-dir", run_dir, "--follow", timeout_s=200)
        deadline = time.monotonic() + 60.0
        while any((left := what_is_left()).values()) and time.monotonic() < deadline:
            time.sleep(1.0)
        assert not any(left.values()), left
        assert other.remote().result(timeout_s=30) == "still here"
        sent = [job for job in jobs.list_jobs() if job.submission_id and job.submission_id.startswith("bt-ray-run-")]
    env = {job.submission_id: job.runtime_env for job in found if job.submission_id}
    stages = [name for name in env if name != driver]
    assert len(stages) == 2  # vanilla, and the test at the end
    for name in stages:
        assert env[name]["working_dir"] == env[driver]["working_dir"] and env[name]["working_dir"].startswith("gcs://")
        assert env[name]["env_vars"]["MINE"] == "1"
    assert (
        "Submitted bt-ray-run-" in again.stdout and "vanilla" in again.stdout.partition("Submitted")[2]
    )  # its log, with the table
    assert [job.status.value for job in sent] == ["SUCCEEDED"] and sent[0].entrypoint.startswith("python jobs/better_together.py")
    assert bt_ray("stop", run_dir).returncode == 0
    record = json.loads((run_dir / "stages" / "vanilla" / "record.json").read_text())
    assert record["status"] == "done" and record["select_scores"]
