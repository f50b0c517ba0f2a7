"""What needs an NVIDIA GPU. Everything important has a test elsewhere that needs none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where the driver's tool is not there."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if shutil.which("nvidia-smi") is None:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here (no nvidia-smi)"))
