"""A run in an S3 bucket, on real parts: its machine is lost, and the bucket answers with errors for a minute."""

import json
import shutil
import time

import pytest

from bt_ray.running import copy_home
from bt_ray.runs.bucket import Bucket, place_of
from bt_ray.runs.objects import fetch
from tests.support.bucket_server import BUCKET, ENVIRONMENT, bucket_server
from tests.support.driver_runs import bt_ray, our_processes, wait_until
from tests.support.injecting import RunAtWork, assert_as_undisturbed, write_undisturbed_run
from tests.support.undisturbed import undisturbed

__all__ = ["undisturbed"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

URL = f"s3://{BUCKET}/team/tiny"
OUTAGE_S = 60.0


@pytest.fixture(scope="module")
def server():
    with bucket_server() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": running.url}.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def story(server, tmp_path_factory):
    """The output of the second machine's driver; and a folder with what was in the bucket when the first was lost, and at last."""
    folder = tmp_path_factory.mktemp("bucket")
    config, bucket = write_undisturbed_run(folder), Bucket(place_of(URL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BT_RAY_HOME", str(folder / "first"))
        with RunAtWork(config, copy_home(bucket) / "run", folder / "first.log", url=URL) as run:
            run.wait_for_rows("search", 3)
            run.wait_for(lambda: any("/search-" in f"/{name}" and "/rows/" in name for name in bucket.names()))
            run.kill_driver()
        shutil.rmtree(folder / "first")
        fetch(bucket, folder / "before")
        patch.setenv("BT_RAY_HOME", str(folder / "second"))
        with RunAtWork(config, copy_home(bucket) / "run", folder / "second.log", url=URL) as run:
            run.wait_for(lambda: (run.run_dir / "lock.json").is_file())
            server.fault = lambda method, path: "503"
            time.sleep(OUTAGE_S)
            server.fault = lambda method, path: None
            code, output = run.end()
    assert code == 0, output[-3000:]
    fetch(bucket, folder / "fetched")
    return output, folder


def test_another_machine_goes_on_and_ends_as_if_nothing_had_happened(story, undisturbed):
    _, folder = story
    before = [path for path in (folder / "before" / "steps").rglob("*") if "rows" in path.parts or path.name == "record.json"]
    before = [path for path in before if path.is_file()]
    assert {path.suffix for path in before} == {".json", ".jsonl"}
    for path in before:  # a record as it was, rows with more of them behind
        after = (folder / "fetched" / path.relative_to(folder / "before")).read_bytes()
        assert after.startswith(path.read_bytes()) and (path.suffix == ".jsonl" or after == path.read_bytes())
    assert_as_undisturbed(folder / "fetched", undisturbed)


def test_it_is_read_from_the_bucket_alone(story):
    output, _ = story
    assert f"ask {URL}" in output, "how to go on names the place"
    report = json.loads(bt_ray("report", URL, "--json").stdout)
    assert (report["status"], report["run_dir"], report["test_looks"]) == ("done", URL, 1)
    assert bt_ray("status", URL).stdout.count("done") >= 3
    assert "side" in bt_ray("ask", URL, "text=a boat on the shelf").stdout
    assert "is finished" in bt_ray("stop", URL).stdout


def test_keys_are_nowhere_and_nothing_is_left_running(story):
    output, folder = story
    secret = ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]
    assert secret not in output
    written = [path for root in ("fetched", "second") for path in (folder / root).rglob("*") if path.is_file()]
    assert written and not [path for path in written if secret.encode() in path.read_bytes()]
    wait_until(lambda: not our_processes())
