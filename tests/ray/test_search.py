"""Whole searches on Ray Tune, with evaluators that know the answer."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bt_ray.config import PromptStep
from bt_ray.errors import BtRayError, ConfigError, PoolError
from bt_ray.search.base import SearchContext
from bt_ray.search.racing import StopRule

pytestmark = pytest.mark.usefixtures("ray_cluster", "by_value")

USER_FILE = """
from bt_ray.search.base import ListSearcher


def candidate(quality):
    return {"predictors": {"p": {"instructions": str(quality), "demos": []}}}


def build(context):
    \"\"\"Candidates that carry their own quality, in the instruction.\"\"\"
    qualities = json.loads(context.student["predictors"]["p"]["instructions"])
    return ListSearcher([{"label": f"c{i}", "candidate": candidate(q)} for i, q in enumerate(qualities)], ["planted"])
"""


@pytest.fixture(scope="module")
def by_value() -> Iterator[None]:
    """The evaluators below travel as code: the workers do not import this file."""
    import ray

    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


class Planted:
    """Scores 1 on a share of the examples that stands in the candidate's instruction; keeps its rows
    in files, as a real evaluator does, and counts the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def evaluate(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, float]:
        quality = float(candidate["predictors"]["p"]["instructions"])
        scores = {}
        for example_id in example_ids:
            row = Path(self.folder, f"{quality}-{example_id}")
            if not row.exists():
                row.write_text("")
                with open(Path(self.folder, "runs.log"), "a") as log:
                    log.write(f"{quality} {example_id}\n")
            scores[example_id] = float(zlib.crc32(example_id.encode()) % 1000 < 1000 * quality)
        return scores


class Failing(Planted):
    """The pool dies under the second candidate."""

    def evaluate(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, float]:
        if candidate["predictors"]["p"]["instructions"] == "0.5":
            raise PoolError("pool: no replica starts. Look at the engine's log.")
        return super().evaluate(candidate, example_ids)


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class FailingOddly(Planted):
    def evaluate(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, float]:
        raise Unpicklable("this", "that")


class DyingOnce(Planted):
    """The process is killed in the middle of the first candidate's second rung, once."""

    def evaluate(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, float]:
        mark = Path(self.folder, "died")
        if Path(self.folder, "runs.log").exists() and not mark.exists():
            mark.write_text("")
            os._exit(1)
        return super().evaluate(candidate, example_ids)


class DyingBetween(Planted):
    """The process is killed once, as soon as its first candidate's last scores are on their way."""

    def evaluate(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, float]:
        scores = super().evaluate(candidate, example_ids)
        mark = Path(self.folder, "died")
        if len(runs(Path(self.folder))) >= 60 and not mark.exists():
            mark.write_text("")
            threading.Timer(0.03, os._exit, (1,)).start()
        return scores


class DyingAlways(Planted):
    def evaluate(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, float]:
        os._exit(1)


class Meeting(Planted):
    """Two candidates wait for one another: only a parallel search gets through."""

    def evaluate(self, candidate: dict[str, Any], example_ids: list[str]) -> dict[str, float]:
        Path(self.folder, f"here-{candidate['predictors']['p']['instructions']}").write_text("")
        give_up = time.monotonic() + 90
        while len(list(Path(self.folder).glob("here-*"))) < 2:
            if time.monotonic() > give_up:
                raise RuntimeError("nobody came")
            time.sleep(0.05)
        return super().evaluate(candidate, example_ids)


def search(folder: Path, evaluator: Any, qualities: list[float], parallel: int = 1, name: str = "mine.py:build") -> Any:
    from bt_ray.search.experiment import SearchPlan, run_search

    (folder / "mine.py").write_text("import json\n" + USER_FILE)
    student = {"predictors": {"p": {"instructions": json.dumps(qualities), "demos": []}}}
    context = SearchContext(PromptStep.model_validate({"optimizer": "labeled"}), student, [], [], {}, {}, seed=1)
    plan = SearchPlan([f"e{i}" for i in range(60)], (0.25, 0.5), StopRule(0.05), parallel, str(folder / "scratch"), str(folder))
    return run_search(name, context, evaluator, plan)


def runs(folder: Path) -> list[str]:
    return (folder / "runs.log").read_text().splitlines()


def test_finds_the_planted_best_stops_the_hopeless_and_resumes_without_a_run(tmp_path: Path, capfd: Any) -> None:
    qualities = [0.8, 0.0, 0.1, 0.95, 0.2]
    result = search(tmp_path, Planted(tmp_path), qualities)
    rows = {row["label"]: row for row in result.trials}
    assert result.label == "c3" and result.best["predictors"]["p"]["instructions"] == "0.95"
    assert result.score == rows["c3"]["score"] > 0.85
    assert [row["label"] for row in result.trials] == ["c0", "c1", "c2", "c3", "c4"]
    assert all(rows[label]["stopped_at"] in (15, 30) and not rows[label]["complete"] for label in ("c1", "c2", "c4"))
    assert rows["c0"]["complete"] and rows["c3"]["complete"]
    done = runs(tmp_path)
    assert len(done) == len(set(done)) == sum(row["num_examples"] for row in result.trials) < 300
    first_rung = [run.split()[1] for run in done[:15]]
    assert sorted(first_rung) != sorted(f"e{i}" for i in range(15))  # the search's own order, not the file's
    assert "planted" in result.notes
    assert list((tmp_path / "scratch").iterdir()) == []  # nothing of Tune's is kept
    printed = "".join(capfd.readouterr())
    assert "Trial" not in printed and "experiment" not in printed

    again = search(tmp_path, Planted(tmp_path), qualities)
    assert runs(tmp_path) == done  # not one run more
    strip = [{key: value for key, value in row.items() if key != "seconds"} for row in result.trials]
    assert [{key: value for key, value in row.items() if key != "seconds"} for row in again.trials] == strip


def test_the_evaluators_exception_is_raised_as_it_is(tmp_path: Path) -> None:
    environment = dict(os.environ)
    with pytest.raises(PoolError, match=r"^pool: no replica starts\. Look at the engine's log\.$"):
        search(tmp_path, Failing(tmp_path), [0.9, 0.5, 0.3])
    assert not any(run.startswith("0.3") for run in runs(tmp_path))
    assert dict(os.environ) == environment


def test_an_exception_that_does_not_pickle_still_tells_what_it_was(tmp_path: Path) -> None:
    with pytest.raises(BtRayError, match="Unpicklable while scoring a candidate: this and that"):
        search(tmp_path, FailingOddly(tmp_path), [0.9])


def test_candidates_are_scored_side_by_side(tmp_path: Path) -> None:
    result = search(tmp_path, Meeting(tmp_path), [0.9, 0.1], parallel=2)
    assert result.label == "c0"


def test_a_killed_process_costs_no_score(tmp_path: Path) -> None:
    result = search(tmp_path, DyingOnce(tmp_path), [0.9, 0.1])
    assert (tmp_path / "died").exists()
    assert result.label == "c0" and result.trials[0]["num_examples"] == 60
    assert len(runs(tmp_path)) == len(set(runs(tmp_path)))


def test_a_process_that_dies_between_two_candidates_costs_neither(tmp_path: Path) -> None:
    result = search(tmp_path, DyingBetween(tmp_path), [0.9, 0.5, 0.1])
    assert (tmp_path / "died").exists()
    assert result.label == "c0" and result.trials[0]["complete"]
    assert len(result.trials) == 3
    assert len(runs(tmp_path)) == len(set(runs(tmp_path)))


def test_a_process_that_always_dies_fails_the_search(tmp_path: Path) -> None:
    with pytest.raises(BtRayError, match="scores the candidate 'c0' died 3 times"):
        search(tmp_path, DyingAlways(tmp_path), [0.9])


def test_a_plan_without_examples_or_candidates_is_refused(tmp_path: Path) -> None:
    from bt_ray.search.experiment import SearchPlan, run_search

    with pytest.raises(ConfigError, match="proposed no candidate"):
        search(tmp_path, Planted(tmp_path), [])
    context = SearchContext(PromptStep.model_validate({"optimizer": "labeled"}), {"predictors": {}}, [], [], {}, {}, seed=1)
    with pytest.raises(ConfigError, match="no examples"):
        run_search("labeled", context, Planted(tmp_path), SearchPlan([], (), StopRule(0.05), 1, str(tmp_path)))
    with pytest.raises(ConfigError, match="not unique"):
        run_search("labeled", context, Planted(tmp_path), SearchPlan(["a", "a"], (), StopRule(0.05), 1, str(tmp_path)))
