"""The count of faults survived: from the page of faults and from what the tests ended as."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from faults import FAULTS, counts, faults, outcomes  # noqa: E402

PAGE = """1. `tests/faults/test_one.py::test_first`

| fault | what happens | test |
|---|---|---|
| killed | goes on | (1); `tests/ray/test_pool.py::test_kill` |
| hangs | is replaced | `tests/ray/test_pool.py::test_hang` |
| lost | another node | `tests/clusters/test_nodes.py::test_lost` |
"""
REPORT = """<testsuites><testsuite>
<testcase classname="tests.faults.test_one" name="test_first"/>
<testcase classname="tests.ray.test_pool" name="test_kill[a]"/>
<testcase classname="tests.ray.test_pool" name="test_kill[b]"/>
<testcase classname="tests.ray.test_pool" name="test_hang"><failure message="no"/></testcase>
<testcase classname="tests.unit.test_x" name="test_a_link_is_refused[1]"/>
<testcase classname="tests.unit.test_x" name="test_a_link_is_refused[2]"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_fault_is_survived_where_all_of_its_tests_pass(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(REPORT)
    found = counts(faults(PAGE), outcomes(tmp_path.glob("*.xml")))
    assert (found["injected"], found["survived"]) == (2, 1)
    assert (found["not_survived"], found["not_injected"]) == (["hangs"], ["lost"])
    assert (found["bad_inputs"], found["bad_inputs_refused"]) == (1, 1)


def test_every_line_of_the_page_names_tests_that_there_are() -> None:
    lines = faults(FAULTS.read_text(encoding="utf-8"))
    assert len(lines) > 30
    for fault, tests in lines.items():
        assert tests, fault
        for test in tests:
            path, name = test.split("::")
            assert f"def {name}(" in (ROOT / "tests" / f"{path}.py").read_text(encoding="utf-8"), f"{fault}: {test}"
