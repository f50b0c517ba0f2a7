"""Which tests share a process where they run in several (`--dist loadgroup`): those of a file, and those of tests/faults."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = Path(item.path)
        item.add_marker(pytest.mark.xdist_group("faults" if path.parent.name == "faults" else path.stem))
