"""The disk of a run fills up while rows are written, and again while a fine-tune works: each time it is said, and nothing is lost."""

import os
import subprocess

import pytest

from tests.support.injecting import RunAtWork, assert_as_undisturbed, assert_kept, snapshot, write_undisturbed_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk):
    """Take all the space that is left; the file gives it back."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    assert os.statvfs(disk).f_bavail == 0
    return filler


def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_space(undisturbed, small_disk, tmp_path):
    config, run_dir = write_undisturbed_run(tmp_path), small_disk / "run"
    before = ({}, {})
    for kind, count in (("rollout", 3), ("finetune", 0)):
        run = RunAtWork(config, run_dir, tmp_path / f"{kind}.log")
        run.wait_for_rows(kind, count) if count else run.wait_for_step(kind)
        filler = fill(small_disk)
        code, output = run.end()
        filler.unlink()
        assert code == 1, output[-3000:]
        assert "its disk is full" in output or "No space left on device" in output, output[-3000:]
        assert "Traceback" not in output
        assert_kept(run_dir, before)
        before = snapshot(run_dir)
    run = RunAtWork(config, run_dir, tmp_path / "last.log")
    code, output = run.end(1000)
    assert code == 0, output[-3000:]
    assert_kept(run_dir, before)
    assert_as_undisturbed(run_dir, undisturbed)
