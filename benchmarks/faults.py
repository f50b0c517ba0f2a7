"""Faults survived of faults injected, and bad inputs refused of those tried, counted from what the tests ended as.

    make test test-faults REPORTS=reports      (and test-clusters, for the loss of nodes)
    python benchmarks/faults.py --reports reports

A fault is a line of docs/faults.md; it is survived where every test that the line names passed, and not injected where one of
them did not run. A bad input is a case of a test whose name says that something is refused, damaged, spoiled, planted or bad.
"""

from __future__ import annotations

import argparse
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from common import show

FAULTS = Path(__file__).parents[1] / "docs" / "faults.md"
TEST = re.compile(r"`tests/([\w/]+)\.py::(\w+)`")
CHAPTER = re.compile(r"\((\d)\)")
BAD = re.compile(r"refus|damage|spoil|planted|(^|_)bad_|torn|broken|no_number|unreadable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", required=True, type=Path, help="folder of the JUnit files")
    parser.add_argument("--faults", type=Path, default=FAULTS)
    args = parser.parse_args()
    ended = outcomes(args.reports.glob("*.xml"))
    if not ended:
        raise SystemExit(f"{args.reports} holds no report. Run: make test test-faults REPORTS={args.reports}")
    show("faults survived, and bad inputs refused", **counts(faults(args.faults.read_text(encoding="utf-8")), ended))


def faults(text: str) -> dict[str, set[str]]:
    """By fault, the tests that inject it, as `folder/file::test`; a number in brackets is a chapter of the list above."""
    chapters = {line.split(".")[0]: named(line) for line in text.splitlines() if re.match(r"\d\. ", line)}
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 3 or cells[0] in ("fault", "---"):
            continue
        numbered = {test for number in CHAPTER.findall(cells[2]) for test in chapters.get(number, ())}
        found[cells[0]] = named(cells[2]) | numbered
    return found


def named(text: str) -> set[str]:
    return {f"{path}::{test}" for path, test in TEST.findall(text)}


def outcomes(reports: Iterable[Path]) -> dict[str, list[str]]:
    """By test, as `folder/file::test`, what its cases ended as: passed, failed or skipped."""
    ended: dict[str, list[str]] = defaultdict(list)
    for report in sorted(reports):
        for case in ET.parse(report).getroot().iter("testcase"):
            place = case.get("classname", "").removeprefix("tests.").replace(".", "/")
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            ended[f"{place}::{case.get('name', '').split('[')[0]}"].append(outcome)
    return dict(ended)


def counts(lines: Mapping[str, set[str]], ended: Mapping[str, list[str]]) -> dict[str, object]:
    """What the figure says: counts, and which faults were not injected or not survived."""
    missing = {fault for fault, tests in lines.items() if any("passed" not in ended.get(test, ()) for test in tests)}
    failed = {fault for fault, tests in lines.items() if any("failed" in ended.get(test, ()) for test in tests)}
    injected = lines.keys() - (missing - failed)
    bad = [
        outcome for test, found in ended.items() if BAD.search(test.split("::")[1]) for outcome in found if outcome != "skipped"
    ]
    return {
        "injected": len(injected),
        "survived": len(injected - failed),
        "not_survived": sorted(failed),
        "not_injected": sorted(missing - failed),
        "bad_inputs": len(bad),
        "bad_inputs_refused": bad.count("passed"),
        "tests": len(ended),
    }


if __name__ == "__main__":
    main()
