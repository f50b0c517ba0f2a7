"""What the terminal says in words: the followed example, skipped stages, the pick."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from bt_ray.report import formats, live, text
from bt_ray.report.build import build_report
from bt_ray.report.text_lines import committed_line
from bt_ray.stages import weight
from tests.support.report_facts import demo_facts


def printed(function: Any, *arguments: Any) -> str:
    file = io.StringIO()
    function(*arguments, Console(file=file, width=200, force_terminal=False))
    return file.getvalue()


def skipped_by_the_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The record of a weight stage that had nothing to learn from."""
    monkeypatch.setattr(weight.steps, "pass_counts", lambda record: {"rollouts": 8, "passed": 0})
    ctx: Any = SimpleNamespace(publish=lambda outcome, records: outcome)
    return weight._skipped(ctx, SimpleNamespace(), "none of 8 rollouts passes")  # type: ignore[arg-type]


def test_a_skipped_stage_is_called_so_once_and_its_children_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = demo_facts()
    facts["stages"][-1] |= skipped_by_the_step(monkeypatch)
    child = {**facts["stages"][-1], "id": "w.w.p", "path": "w -> w -> p", "note": None, "error": "not run: w -> w was skipped"}
    facts["stages"].append(child)
    shown = printed(text.render_stages, facts)
    assert "w -> w       skipped: none of 8 rollouts passes, so there is nothing to learn from\n" in shown
    assert "w -> w -> p  skipped: not run: w -> w was skipped\n" in shown
    assert "no reason given" not in shown


def test_the_live_view_calls_a_skipped_stage_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    state = live.StageState("w", "w", "skipped", note=skipped_by_the_step(monkeypatch)["note"])
    assert live.line(state) == "w: skipped, none of 8 rollouts passes, so there is nothing to learn from"


def test_a_failed_stage_shows_its_error() -> None:
    assert formats.pass_text({"status": "failed", "note": None, "error": "out of\nmemory"}) == "failed: out of memory"
    assert formats.pass_text({"status": "failed"}) == "failed: no reason given"
    tuned = {"status": "done", "rollouts": {"passed": 50, "rollouts": 192}, "rows": 66}
    assert formats.pass_text(tuned) == "50 of 192 pass: 66 rows to learn from"
    both = {**tuned, "prompts_on_select": {"vanilla": 0.4375, "incoming": 0.375}}
    assert formats.pass_text(both).endswith(
        "to learn from; select 0.438 with the vanilla prompts, 0.375 with the incoming prompts"
    )


@pytest.mark.parametrize(
    ("answer", "shows"),
    [
        ({"prediction": {"queue": "billing"}, "score": 1.0}, "queue: billing  (right)"),
        ({"prediction": {"queue": "delivery"}, "score": 0.0}, "queue: delivery  (wrong)"),
        ({"prediction": {"queue": "billing"}, "score": 0.25}, "queue: billing  (score 0.25)"),
        (
            {"prediction": {"queue": "billing"}, "score": None, "error": "KeyError: 'queue'"},
            "queue: billing  (not scored: KeyError: 'queue')",
        ),
        ({"prediction": None, "score": None, "error": "the answer\nlacks queue"}, "failed: the answer lacks queue\n"),
    ],
)
def test_the_followed_example_is_right_or_wrong_or_says_why_not(answer: dict[str, Any], shows: str) -> None:
    facts = demo_facts()
    facts["follow_answers"] = {"vanilla": answer}
    shown = printed(text.render_follow, facts)
    assert f"vanilla      {shows}" in shown
    assert "–" not in shown


def test_the_pick_says_that_test_had_no_part_in_it() -> None:
    assert "  It was committed before test was opened.\n" in printed(text.render_pick, build_report(demo_facts()))
    unopened = demo_facts() | {"test_looks": 0}
    for stage in unopened["stages"]:
        stage["test_scores"] = None
    assert "It was committed by select alone; test has not been opened." in printed(text.render_pick, build_report(unopened))


def test_nothing_is_claimed_of_a_pick_that_an_earlier_opening_may_have_come_before() -> None:
    tested = {"score": 0.5}
    assert "for the last of 3 times" in committed_line({"best": {"test": tested}, "test_looks": 3})
    assert "before" not in committed_line({"best": {"test": None}, "test_looks": 1})
