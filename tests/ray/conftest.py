"""One small Ray cluster for all tests of this folder, gone before tests of another folder run in the same process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[2])
GIB = 1024**3


@pytest.fixture(scope="package")  # of the package that the __init__.py here makes; a plain folder has no scope of its own
def ray_cluster() -> Iterator[None]:
    """A local cluster with four logical CPUs, and this repository importable in its workers."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=GIB,
        include_dashboard=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": ROOT}},
    )
    yield
    ray.shutdown()
