"""What the report claims from the facts of a run, and how the terminal shows it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from bt_ray.report import formats, text
from bt_ray.report.build import build_report
from bt_ray.report.changes import stage_changes
from bt_ray.report.statistics import tango_paired
from tests.support.report_facts import demo_facts


def printed(*parts: Any, width: int = 100) -> str:
    """What the given render functions (with their arguments) print without a terminal."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    for function, *arguments in parts:
        function(*arguments, console)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def by_id(report: dict[str, Any], stage_id: str) -> dict[str, Any]:
    return next(stage for stage in report["stages"] if stage["id"] == stage_id)


def of(facts: dict[str, Any], stage_id: str) -> dict[str, Any]:
    return next(stage for stage in facts["stages"] if stage["id"] == stage_id)


def set_scores(facts: dict[str, Any], stage_id: str, scores: list[float | None], split: str = "test") -> None:
    of(facts, stage_id)[f"{split}_scores"] = {f"{split}-{index:03d}": score for index, score in enumerate(scores)}


def test_the_report_is_plain_json() -> None:
    report = build_report(demo_facts())
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_stage_scores_carry_their_interval() -> None:
    facts = demo_facts()
    set_scores(facts, "p", [1.0] * 8 + [0.0, None])
    stage = by_id(build_report(facts), "p")
    assert (stage["test"]["score"], stage["test"]["n"], stage["test"]["method"]) == (pytest.approx(8 / 9), 9, "wilson")
    assert stage["test"]["low"] < 8 / 9 < stage["test"]["high"]
    assert stage["search"] is not None and by_id(build_report(facts), "w")["search"] is None


@pytest.mark.parametrize(
    ("own", "parent", "paid"),
    [
        ([1.0] * 30, [0.0] * 20 + [1.0] * 10, "yes"),
        ([0.0] * 20 + [1.0] * 10, [1.0] * 30, "no"),
        ([1.0] * 29 + [0.0], [1.0] * 30, "unclear"),
    ],
)
def test_a_stage_paid_if_its_paired_gain_is_clear_of_zero(own: list[float | None], parent: list[float | None], paid: str) -> None:
    facts = demo_facts()
    set_scores(facts, "p.w", own)
    set_scores(facts, "p", parent)
    stage = by_id(build_report(facts), "p.w")
    assert stage["paid"] == paid
    assert stage["gain"]["on"] == "test" and stage["gain"]["n"] == 30
    assert stage["gain"]["low"] < stage["gain"]["difference"] <= stage["gain"]["high"]


def test_gain_falls_back_to_select_and_is_none_without_a_parent() -> None:
    facts = demo_facts()
    of(facts, "p")["test_scores"] = None
    report = build_report(facts)
    assert by_id(report, "p")["gain"]["on"] == "select"
    assert by_id(report, "vanilla")["gain"] is None and by_id(report, "vanilla")["paid"] is None
    assert by_id(report, "w.w")["paid"] is None and by_id(report, "w.w")["note"] == "nothing passes"


def test_real_scores_get_bootstrap_intervals() -> None:
    facts = demo_facts()
    set_scores(facts, "p", [0.1 * (index % 7) for index in range(40)])
    set_scores(facts, "vanilla", [0.05 * (index % 5) for index in range(40)])
    stage = by_id(build_report(facts), "p")
    assert stage["test"]["method"] == "skew-score" and stage["gain"]["low"] > 0


def test_contrasts_are_those_of_the_plan_without_doubles() -> None:
    facts = demo_facts()
    contrasts = {item["name"]: item for item in build_report(facts)["contrasts"]}
    # `p` is the best single step as well: it is counted once.
    mixes = ["p -> w -> p - p", "p -> w -> p - w"]
    assert list(contrasts) == ["pick - vanilla", "pick - best single step", "pick - p -> p", *mixes]
    assert contrasts["pick - best single step"]["against"] == "p"
    for stage in ("w", "w.p"):
        set_scores(facts, stage, [1.0] * 60, "select")
    contrasts = {item["name"]: item for item in build_report(facts)["contrasts"]}
    assert list(contrasts) == ["pick - vanilla", "pick - best single step", "pick - p -> p", "pick - p", *mixes]
    assert contrasts["pick - best single step"]["against"] == "w"


def test_rivals_are_chosen_on_select_never_on_test() -> None:
    facts = demo_facts()
    set_scores(facts, "p", [1.0] * 60, "select")
    set_scores(facts, "w", [0.0] * 60, "select")
    set_scores(facts, "p", [0.0] * 120)
    set_scores(facts, "w", [1.0] * 120)
    contrasts = {item["name"]: item["against"] for item in build_report(facts)["contrasts"]}
    assert contrasts["pick - best single step"] == "p"


def test_contrasts_are_paired_and_adjusted() -> None:
    facts = demo_facts()
    report = build_report(facts)
    first = report["contrasts"][0]
    pick, root = of(facts, "p.w")["test_scores"], of(facts, "vanilla")["test_scores"]
    table = [sum((pick[key], root[key]) == pair for key in pick) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]
    assert (first["difference"], first["low"], first["high"]) == pytest.approx(tango_paired(*table))
    assert first["p_holm"] == pytest.approx(first["p"] * len(report["contrasts"]))
    assert report["resolution"]["n"] == 120
    assert report["resolution"]["discordant"] == pytest.approx((table[1] + table[2]) / 120)
    assert 0.05 < report["resolution"]["difference"] < 0.3


def test_the_pick_is_compared_with_others_only() -> None:
    facts = demo_facts() | {"pick": "p"}
    names = [item["name"] for item in build_report(facts)["contrasts"]]
    assert names == ["pick - vanilla", "pick - p -> p", "p -> w -> p - p", "p -> w -> p - w"]
    assert [item["against"] for item in build_report(facts | {"pick": "vanilla"})["contrasts"]] == ["p", "p -> p", "p", "w"]


def test_optimism_is_search_minus_select_of_the_pick() -> None:
    facts = demo_facts() | {"pick": "p"}
    set_scores(facts, "p", [1.0, 1.0, 1.0, 0.0], "search")
    set_scores(facts, "p", [1.0, 0.0, None], "select")
    assert build_report(facts)["optimism"] == pytest.approx(0.25)
    assert build_report(facts | {"pick": "p.w"})["optimism"] is None


def test_a_second_run_of_the_pick_gives_the_flip_rate_and_its_sentence() -> None:
    facts = demo_facts() | {"pick": "p"}
    set_scores(facts, "p", [1.0, 0.0, 1.0, None], "select")
    report = build_report(facts | {"again_scores": {"select-000": 1.0, "select-001": 1.0, "select-002": 1.0, "select-003": 0.0}})
    assert report["flip_rate"] == pytest.approx(1 / 3)
    assert "33 % of the rows scored otherwise" in printed((text.render_pick, report))
    assert build_report(facts)["flip_rate"] is None


def test_a_run_that_has_only_begun_has_a_report() -> None:
    facts = demo_facts()
    for stage in facts["stages"]:
        stage.update({"status": "pending", "select_scores": None, "search_scores": None, "test_scores": None, "cost": {}})
        stage.update({"rollouts": None, "rows": None, "candidate": None, "predictions": None})
    facts.update({"pick": None, "controls": [], "test_looks": 0, "follow": None, "follow_answers": {}, "estimates": None})
    report = build_report(facts)
    assert report["best"] is None and report["contrasts"] == [] and report["resolution"] is None
    shown = printed((text.render_plan, facts), (text.render_report, report, facts))
    assert "none: no stage finished" in shown and "The test file was not opened." in shown


def test_the_reason_of_the_pick_is_the_recorded_one() -> None:
    assert "within one standard error" in build_report(demo_facts())["best"]["why"]
    assert build_report(demo_facts() | {"pick_why": "told so"})["best"]["why"] == "told so"
    # A recorded pick that today's rule would not make gets no invented reason.
    assert build_report(demo_facts() | {"pick": "vanilla"})["best"]["why"] is None


def test_the_terminal_shows_every_part() -> None:
    facts = demo_facts()
    shown = printed((text.render_report, build_report(facts), facts))
    for words in (
        "expected  queue: billing",
        "29 of 64 pass: 58 rows to learn from",
        "29 of 64 pass: demos from 29 examples",
        "skipped: nothing passes",
        "p -> w *     0.783 [0.701, 0.848]",
        "TF-IDF and logistic regression  0.758",
        "pick - best single step (p): +0.158 [+0.062, +0.256], p 0.003 (Holm 0.005), 120 rows of test",
        "120 rows of test show a difference of 0.163 or more to vanilla with 80 % power",
        "Rows with an error: w 1",
        "The test file was opened once.",
    ):
        assert words in shown, words
    assert "\x1b" not in shown


def test_the_plan_shows_the_tree_and_its_cost() -> None:
    shown = printed((text.render_plan, demo_facts()))
    assert "│   └── p -> w  about 700 LM calls, 3 min 20 s" in shown
    assert "Together about 5 600 LM calls and 26 min 40 s of work." in shown


def test_more_than_one_look_at_test_is_said() -> None:
    report = build_report(demo_facts() | {"test_looks": 3})
    assert "opened 3 times" in printed((text.render_test_looks, report))


def test_foreign_text_reaches_the_terminal_as_text() -> None:
    facts = demo_facts()
    facts["follow_answers"]["p.w"]["prediction"] = {"queue": "[bold]x[/bold] \x1b[31mred\x1b[0m \x07 \u202etxet [/nope]"}
    of(facts, "w.w")["note"] = "[/red] \x1b]0;title\x07"
    shown = printed((text.render_report, build_report(facts), facts), width=200)
    assert "[bold]x[/bold] \\x1b[31mred\\x1b[0m \\x07 \\u202etxet [/nope]" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


def test_changes_list_the_largest_first() -> None:
    before = {"predictions": {key: {"score": score} for key, score in (("a", 0.0), ("b", 0.5), ("c", 1.0), ("d", None))}}
    after = {"predictions": {key: {"score": score} for key, score in (("a", 0.4), ("b", 1.0), ("c", 0.2), ("d", 1.0))}}
    found = stage_changes(after, before)
    assert found is not None
    assert (found.fixed, found.broken, found.compared) == (("b", "a"), ("c",), 3)
    assert stage_changes({"predictions": None}, before) is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (7830, "2 h 10 min"), (None, "–")]
)
def test_durations_read_well(seconds: float | None, words: str) -> None:
    assert formats.seconds_text(seconds) == words


def test_long_text_is_cut_and_says_so() -> None:
    assert formats.plain("a" * 30, 10) == "a" * 10 + " … (+20 characters)"
    assert formats.shorten("p -> w -> p -> w", 8) == "p -> w…"


def test_statistics_and_build_load_nothing_heavy() -> None:
    code = "import sys, bt_ray.report.build; print([m for m in ('numpy', 'scipy', 'rich', 'torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
