"""One run that nobody disturbs; disturbed ones are to end with its hashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.driver_runs import bt_ray
from tests.support.injecting import write_undisturbed_run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its run directory: vanilla, p, and p -> w."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_undisturbed_run(folder)
    bt_ray("run", config, "--run-dir", folder / "run", timeout_s=550)
    return folder / "run"
