"""Which tests share a process where they run in several (`--dist loadfile`)."""

from __future__ import annotations

from typing import Any

import pytest

SHARED = ("tests/faults/test_one_run_through_all.py", "tests/faults/test_loss_of_nodes.py")  # one run that nobody disturbs


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file, and of the files that share a run, go to one process."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return SHARED[0] if file in SHARED else file

    return Scheduler(config, log)
