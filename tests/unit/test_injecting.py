"""What the tests of faults look at notices what must not happen."""

from __future__ import annotations

from pathlib import Path

import pytest

from bt_ray.runs.commit import Cost, Step, StepKey
from tests.support.injecting import assert_kept, snapshot


def test_a_committed_step_that_is_begun_again_is_noticed(tmp_path: Path) -> None:
    done, open_ = (Step(tmp_path, StepKey("rollout", {"number": number})) for number in range(2))
    for step in (done, open_):
        step.begin()
    done.commit("p", {}, Cost())
    before = snapshot(tmp_path)
    open_.begin()
    assert_kept(tmp_path, before)
    Step(tmp_path, done.key).begin()
    with pytest.raises(AssertionError, match="was begun again"):
        assert_kept(tmp_path, before)
