"""A whole run as a Ray job of its own: what `ray job submit --working-dir . -- python jobs/better_together.py` starts, and
`bt-ray submit` of the same run."""

import json
import shutil
import tempfile
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bt_ray.cluster import DONE, Cluster
from bt_ray.config import ClusterConfig
from tests.support.driver_runs import bt_ray
from tests.support.leftovers import assert_nothing_is_left
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CANARY = "hf_canary_3b9e61d7"
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


def succeeds(jobs: Any, name: str) -> None:
    """Wait for a job's end, which is to be a good one."""
    deadline = time.monotonic() + 600
    while jobs.get_job_status(name).value not in DONE:
        assert time.monotonic() < deadline, jobs.get_job_logs(name)
        time.sleep(1)
    assert jobs.get_job_status(name).value == "SUCCEEDED", jobs.get_job_logs(name)


def write_work(folder: Path) -> Path:
    """What is submitted; its program needs a package of its user's, whose folder, elsewhere, is returned."""
    write_run(folder, strategy='"vanilla"', train=4)
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    program = folder / "program.py"
    program.write_text(f"import mine\n{program.read_text()}")
    package = folder.parent / "elsewhere" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""The user\'s own."""\n')
    return package


def run_one_stage_again(jobs: Any, folder: Path, run_dir: Path) -> None:
    """As a job that anybody submits: the stage's steps are there, so that no engine starts."""
    vanilla = run_dir / "stages" / "vanilla" / "record.json"
    before = json.loads(vanilla.read_text())
    vanilla.unlink()
    stage = f"python jobs/stage.py --run-dir {run_dir} --stage vanilla --app alone"
    succeeds(jobs, jobs.submit_job(entrypoint=stage, runtime_env={"working_dir": str(folder)}))
    assert json.loads(vanilla.read_text())["hash"] == before["hash"]


def stages_of(jobs: Any, but: Container[str] = ()) -> dict[str, Any]:
    """Stage jobs that drivers submitted, by submission id, without those that are known already."""
    found = {job.submission_id: job for job in jobs.list_jobs() if "stage" in (job.metadata or {})}
    return {name: job for name, job in found.items() if name not in but}


def files_that_hold(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_the_driver_runs_as_a_job_and_its_stages_take_over_its_working_directory_and_packages_and_no_secret(tmp_path):
    from ray.job_submission import JobSubmissionClient

    folder, run_dir = tmp_path / "work", tmp_path / "run"
    package = write_work(folder)
    with known_cluster() as url:
        jobs, other = JobSubmissionClient(url), neighbour()
        variables = {"MINE": "1", "HF_TOKEN": CANARY}
        driver = jobs.submit_job(
            entrypoint=f"python jobs/better_together.py --config config.yaml --run-dir {run_dir}",
            runtime_env={"working_dir": str(folder), "py_modules": [str(package)], "env_vars": variables},
        )
        succeeds(jobs, driver)
        own, stages = jobs.get_job_info(driver).runtime_env, stages_of(jobs)
        shutil.copytree(package, folder / "mine")  # the jobs that follow name no packages
        run_one_stage_again(jobs, folder, run_dir)
        (run_dir / "stages" / "final" / "record.json").unlink()  # so that there is a stage to submit, whose steps are there
        again = bt_ray("submit", folder / "config.yaml", "--address", url, "--run-dir", run_dir, "--follow", timeout_s=300)
        sent = [job for job in jobs.list_jobs() if (job.submission_id or "").startswith("bt-ray-run-")]
        later = stages_of(jobs, but=stages)
        assert_nothing_is_left(beside="neighbour")
        assert other.remote().result(timeout_s=30) == "still here"
    assert sorted(job.metadata["stage"] for job in stages.values()) == ["final", "vanilla"]
    assert own["working_dir"].startswith("gcs://") and own["env_vars"]["HF_TOKEN"] == CANARY
    for job in stages.values():
        assert job.runtime_env["working_dir"] == own["working_dir"] and job.runtime_env["env_vars"]["MINE"] == "1"
        assert CANARY not in f"{job.entrypoint} {job.metadata} {job.runtime_env} {job.message}"
    assert not files_that_hold(CANARY, run_dir)
    # What the submitted run prints, with the table.
    assert "Submitted bt-ray-run-" in again.stdout and "vanilla" in again.stdout.partition("Submitted")[2]
    assert [job.status.value for job in sent] == ["SUCCEEDED"] and sent[0].entrypoint.startswith("python jobs/better_together.py")
    assert [(job.metadata["stage"], job.status.value) for job in later.values()] == [("final", "SUCCEEDED")]
    working_dirs = [job.runtime_env["working_dir"] for job in [*sent, *later.values()]]
    assert working_dirs[0] == working_dirs[1] != own["working_dir"] and working_dirs[0].startswith("gcs://")
    assert bt_ray("stop", run_dir).returncode == 0
    record = json.loads((run_dir / "stages" / "vanilla" / "record.json").read_text())
    assert record["status"] == "done" and record["select_scores"]
