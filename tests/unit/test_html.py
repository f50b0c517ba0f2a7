"""The HTML report: one file that loads nothing, in which foreign text stays text."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bt_ray.report.build import build_report
from bt_ray.report.html import MAX_CHANGES, render_html
from tests.support.report_facts import demo_facts

VOID = {"meta", "br", "hr", "img", "input", "link"}
ATTACK = "</script></style></title><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' <!--"


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that every element is closed in its place."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words.append(data)
        if "td" in self._open:
            self.rows[-1].append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(facts: dict[str, Any]) -> str:
    return render_html(build_report(facts), facts)


def test_the_page_loads_nothing() -> None:
    page = page_of(demo_facts())
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    assert not {"src", "href", "action", "srcset", "xlink:href"} & {name for _, name, _ in parsed.attributes}
    policy = next(value for tag, name, value in parsed.attributes if tag == "meta" and value.startswith("default-src"))
    assert "default-src 'none'; style-src 'unsafe-inline'" in policy and "script" not in policy


def test_foreign_text_stays_text_everywhere() -> None:
    facts = demo_facts()
    calm = Page(page_of(facts))
    for key in ("task", "model", "metric", "run_dir", "status", "pick_why", "follow"):
        if key != "follow":
            facts[key] = ATTACK
    for stage in facts["stages"]:
        stage["note"] = stage["error"] = ATTACK
        for predictor in ((stage["candidate"] or {}).get("predictors") or {}).values():
            predictor["instructions"] = ATTACK
            for demo in predictor["demos"]:
                demo.update(dict.fromkeys(demo, ATTACK))
        for row in (stage["predictions"] or {}).values():
            row["prediction"] = {"queue": ATTACK}
            row["error"] = ATTACK if row["score"] == 0 else None
    for example in facts["examples"].values():
        example.update({"inputs": {ATTACK: ATTACK}, "labels": {"queue": ATTACK}})
    for control in facts["controls"]:
        control.update({"name": ATTACK, "note": ATTACK})
    facts["follow_answers"]["p.w"]["prediction"] = {"queue": ATTACK}
    page = page_of(facts)
    parsed = Page(page)
    assert set(parsed.tags) == set(calm.tags)
    assert not [item for item in parsed.attributes if item[1].startswith("on") or "alert" in item[2]]
    assert parsed.text.count("<script>alert(1)</script>") > 20
    assert "<script" not in page


RAN = "<script>document.title='ran'</script></title><img src=x onerror=\"document.title='ran'\">"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--dump-dom"]


def hostile_facts() -> dict[str, Any]:
    """A script in a prompt, in the names of model and metric, and in an exception's text."""
    facts = demo_facts() | {"model": f"model {RAN}", "metric": f"metric {RAN}"}
    facts["stages"][-1].update({"status": "failed", "note": None, "error": f"error {RAN}"})
    pick = next(stage for stage in facts["stages"] if stage["id"] == facts["pick"])
    for predictor in pick["candidate"]["predictors"].values():
        predictor["instructions"] = f"prompt {RAN}"
    return facts


def test_scripts_in_prompts_names_and_errors_are_text() -> None:
    page = page_of(hostile_facts())
    parsed = Page(page)
    assert "script" not in parsed.tags and "img" not in parsed.tags and "<script" not in page
    for what in ("prompt", "model", "metric", "error"):
        assert f"{what} <script>document.title='ran'</script>" in parsed.text, what


def dumped(page: str, folder: Path) -> str:
    """The page's DOM after a browser has run what there is to run."""
    assert BROWSER, "BT_RAY_BROWSER is set and there is no chromium on PATH"
    folder.mkdir()
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [BROWSER, *QUIET, f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(not BROWSER and "BT_RAY_BROWSER" not in os.environ, reason="no chromium on PATH")
def test_no_script_runs_in_a_browser(tmp_path: Path) -> None:
    assert "<title>ran</title>" in dumped(f"<title>before</title>{RAN}", tmp_path / "control"), "the browser runs scripts"
    dom = dumped(page_of(hostile_facts()), tmp_path / "report")
    assert "<title>" in dom and "<title>ran</title>" not in dom and "<script" not in dom


def test_names_of_stages_and_predictors_are_escaped() -> None:
    facts = demo_facts()
    pick = next(stage for stage in facts["stages"] if stage["id"] == "p.w")
    pick["path"] = pick["kind"] = "<b>&"
    pick["candidate"]["predictors"] = {"<i>name": {"instructions": "x", "demos": [{"<u>field": 1}]}}
    facts["stages"][-1]["status"] = "<s>"
    parsed = Page(page_of(facts))
    assert not {"b>&", "i", "u", "s"} & set(parsed.tags)
    for words in ("<b>&", "<i>name", "<u>field", "<s>"):
        assert words in parsed.text


def test_text_that_utf8_cannot_hold_is_shown_escaped() -> None:
    facts = demo_facts()
    facts["follow_answers"]["p.w"]["prediction"] = {"queue": "\ud800 \x00 \u202e"}
    page = page_of(facts)
    page.encode("utf-8")
    assert "\\ud800 \\x00 \\u202e" in page and "\u202e" not in page


def test_the_tree_has_a_box_and_a_score_per_stage() -> None:
    facts = demo_facts()
    parsed = Page(page_of(facts))
    boxes = [value for tag, name, value in parsed.attributes if tag == "rect" and name == "class" and value.startswith("node")]
    edges = [value for tag, name, value in parsed.attributes if tag == "path" and name == "class"]
    assert sorted(boxes) == ["node"] * 6 + ["node is-off", "node is-pick"]
    # The way from vanilla to the pick `p -> w` has two arrows.
    assert sorted(edges) == ["edge"] * 5 + ["edge is-pick"] * 2
    for stage in build_report(facts)["stages"]:
        if stage["test"]:
            assert f"{stage['test']['score']:.3f}" in parsed.text


def test_boxes_do_not_overlap_and_lie_in_the_picture() -> None:
    page = page_of(demo_facts())
    tree = re.search(r'<svg width="(\d+)" height="(\d+)"[^>]*>(?:(?!</svg>).)*class="node.*?</svg>', page, re.S)
    assert tree is not None
    width, height = int(tree[1]), int(tree[2])
    found = re.findall(r'class="node[^"]*" x="([\d.]+)" y="([\d.]+)" width="(\d+)" height="(\d+)"', tree[0])
    boxes = [tuple(float(number) for number in box) for box in found]
    assert len(boxes) == 8
    for index, (x, y, wide, high) in enumerate(boxes):
        assert x + wide <= width and y + high <= height
        for other_x, other_y, *_ in boxes[index + 1 :]:
            assert abs(x - other_x) >= wide or abs(y - other_y) >= high


def test_the_page_tells_the_whole_story() -> None:
    facts = demo_facts()
    parsed = Page(page_of(facts))
    for words in (
        "Choose the queue that can help.",  # an instruction of the pick
        "late order",  # a demo
        "p -> w against p:",  # rows fixed and broken
        "TF-IDF and logistic regression",
        "pick - p -> p",
        "The test file was opened once.",
        "120 rows of test show a difference of",
        "within one standard error",
    ):
        assert words in parsed.text, words


def test_fixed_and_broken_rows_show_both_answers() -> None:
    facts = demo_facts()
    for stage in facts["stages"]:
        stage["predictions"] = None
    rows = {"vanilla": [("returns", 0.0), ("account", 1.0)], "p": [("billing", 1.0), ("delivery", 0.0)]}
    for stage in facts["stages"][:2]:
        stage["predictions"] = {
            f"test-00{index}": {"prediction": {"queue": queue}, "score": score, "error": None}
            for index, (queue, score) in enumerate(rows[stage["id"]])
        }
    parsed = Page(page_of(facts))
    assert "p against vanilla: 1 fixed, 1 broken, of 2 rows" in parsed.text
    asked = "message: My parcel has not come"
    assert [asked, "queue: billing", "queue: returns (0.00)", "queue: billing (1.00)"] in parsed.rows


def test_long_lists_of_changes_are_cut_and_say_so() -> None:
    facts = demo_facts(test_rows=200)
    for stage, score in zip(facts["stages"][:2], (0.0, 1.0), strict=True):
        for row in stage["predictions"].values():
            row["score"] = score
    assert f"and {200 - MAX_CHANGES} more" in Page(page_of(facts)).text


def test_a_run_without_a_pick_has_a_page() -> None:
    facts = demo_facts() | {"pick": None, "controls": [], "follow": None}
    for stage in facts["stages"]:
        stage.update({"status": "pending", "select_scores": None, "search_scores": None, "test_scores": None, "cost": {}})
        stage.update({"candidate": None, "predictions": None})
    assert "no stage finished" in Page(page_of(facts)).text


def test_light_and_dark() -> None:
    assert "prefers-color-scheme: dark" in page_of(demo_facts())
