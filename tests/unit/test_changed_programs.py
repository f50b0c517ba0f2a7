"""A program that an optimiser of DSPy hands back with other fields; no Ray."""

from __future__ import annotations

from pathlib import Path

from bt_ray.search.base import build_searcher
from tests.support.compiling import context, pool

MINE = """
import dspy
from dspy.teleprompt import Teleprompter

class Drops(Teleprompter):
    def compile(self, student, *, trainset):
        student.route.signature = student.route.signature.delete("department").append("area", dspy.OutputField())
        return student
"""


def test_a_program_with_other_fields_is_refused_by_name_and_the_search_goes_on(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    _, journal = pool(tmp_path)
    searcher = build_searcher("mine.py:Drops", context(journal, "mine.py:Drops"), str(tmp_path))
    labels = []
    while (proposal := searcher.propose()) is not None:
        labels.append(proposal["label"])
    assert labels == ["incoming"] and searcher.finished()
    assert searcher.notes == [  # type: ignore[attr-defined]
        "The program that mine.py:Drops compiled was refused: the predictor 'route' lost the output 'department', "
        "the predictor 'route' got the output 'area'. A step can change prompts only."
    ]
