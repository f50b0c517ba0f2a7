"""Each process of a run is killed once while it works: the run ends by itself, as if nothing had happened."""

import pytest

from tests.support.driver_runs import bt_ray, our_processes, wait_until
from tests.support.injecting import RunAtWork, assert_as_undisturbed, write_undisturbed_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_run_survives_the_loss_of_each_of_its_processes(undisturbed, tmp_path):
    """The engine alone, a program worker, a trial, the stage's job, the replica with its engine, and the training worker; and
    an engine that hangs. A second driver is refused meanwhile."""
    config = write_undisturbed_run(tmp_path)
    config.write_text(config.read_text().replace("engine: {", "engine: {stall_timeout_s: 10, "))
    run = RunAtWork(config, tmp_path / "run")
    run.wait_for_rows("evaluate")
    run.kill("VLLM::EngineCore")
    second = bt_ray("run", config, "--run-dir", tmp_path / "run", check=False)
    assert second.returncode == 2 and "a run has one driver" in second.stderr
    run.wait_for_rows("rollout", 3)
    run.kill("ray::ProgramWorker")
    run.suspend("VLLM::EngineCore")
    run.wait_for_rows("search", 2)
    run.kill("ray::CandidateTrial")
    run.wait_for_rows("search", 4)
    run.kill("-m bt_ray.stages")
    run.wait_for_rows("search", 8)
    run.kill("ray::ServeReplica")
    name = run.wait_for_step("finetune")
    run.wait_for_text(f"scratch/train/logs/{name}-worker-0.log", "batches as trees")
    run.kill("ray::RayTrainWorker")
    code, output = run.end(1000)
    assert code == 0, output[-3000:]
    assert_as_undisturbed(tmp_path / "run", undisturbed)
    wait_until(lambda: not our_processes(), 60.0)
