"""Searchers, their registry, and the ledger that decides; no Ray."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bt_ray.config import PromptStep
from bt_ray.errors import ConfigError
from bt_ray.rollout.tasks import candidate_id
from bt_ray.search.base import ListSearcher, SearchContext, Searcher, build_searcher
from bt_ray.search.conduct import Answer, Conduct
from bt_ray.search.demos import draw_labelled
from bt_ray.search.ledger import Ledger, Verdict
from bt_ray.search.racing import StopRule

README = Path(__file__).resolve().parents[2] / "bt_ray" / "search" / "README.md"
SIGNATURES = {"route": {"inputs": ["text"], "outputs": ["area"]}, "answer": {"inputs": ["text"], "outputs": ["intent"]}}


def context(passing: int = 5, num_examples: int = 12, seed: int = 0, **step: Any) -> SearchContext:
    """A pipeline of two predictors of which only the last is labelled; `route` is called with a field
    that the trace made, so every demo shows which example and sample it comes from."""
    examples = [{"id": f"e{i}", "inputs": {"text": f"t{i}"}, "labels": {"intent": f"gold{i}"}} for i in range(num_examples)]
    rollouts = []
    for index in range(num_examples):
        for sample in range(2):
            calls = [
                {"predictor": "route", "inputs": {"text": f"t{index}"}, "outputs": {"area": f"area{index}.{sample}"}},
                {"predictor": "answer", "inputs": {"text": f"t{index}"}, "outputs": {"intent": f"intent{index}.{sample}"}},
            ]
            row = {"example_id": f"e{index}", "sample": sample, "calls": calls, "score": 1.0, "error": None}
            rollouts.append({**row, "accept": index < passing})
    student = {name: {"instructions": f"Do {name}.", "demos": []} for name in SIGNATURES}
    incoming = {name: {"instructions": f"Really do {name}.", "demos": []} for name in SIGNATURES}
    return SearchContext(
        step=PromptStep.model_validate({"optimizer": "random_fewshot", **step}),
        student={"predictors": student},
        rollouts=rollouts,
        examples=examples,
        labelled={"answer": ["intent"]},
        signatures=SIGNATURES,
        seed=seed,
        incoming={"predictors": incoming},
    )


def proposals(searcher: Searcher) -> dict[str, dict[str, Any]]:
    """All proposals by label, down to the predictors."""
    found = {}
    while (proposal := searcher.propose()) is not None:
        found[proposal["label"]] = proposal["candidate"]["predictors"]
    assert searcher.finished()
    return found


def test_random_fewshot_proposes_the_fixed_candidates_first_and_in_order() -> None:
    found = proposals(build_searcher("random_fewshot", context(max_labeled_demos=3, max_bootstrapped_demos=2, num_candidates=4)))
    assert list(found) == ["incoming", "zero_shot", "labels", "first", "draw 1", "draw 2", "draw 3", "draw 4"]
    assert found["incoming"]["route"]["instructions"] == "Really do route."
    assert found["zero_shot"]["answer"] == {"instructions": "Do answer.", "demos": []}
    assert found["labels"]["route"]["demos"] == []  # its output has no label
    assert len(found["labels"]["answer"]["demos"]) == 3
    assert all(demo["intent"] == "gold" + demo["text"][1:] for demo in found["labels"]["answer"]["demos"])
    assert found["first"]["route"]["demos"] == [{"text": "t0", "area": "area0.0"}, {"text": "t1", "area": "area1.0"}]
    assert found["first"]["answer"]["demos"][:2] == [{"text": "t0", "intent": "intent0.0"}, {"text": "t1", "intent": "intent1.0"}]
    filler = found["first"]["answer"]["demos"][2:]
    assert len(filler) == 1 and filler[0]["intent"].startswith("gold")
    assert filler[0]["text"] not in ("t0", "t1")  # never the same example twice


def test_demos_of_all_predictors_come_from_the_same_accepted_traces() -> None:
    found = proposals(build_searcher("random_fewshot", context(num_candidates=30, max_bootstrapped_demos=4, max_labeled_demos=0)))
    sizes = set()
    for label, predictors in found.items():
        if not label.startswith("draw"):
            continue
        areas = [demo["area"].removeprefix("area") for demo in predictors["route"]["demos"]]
        intents = [demo["intent"].removeprefix("intent") for demo in predictors["answer"]["demos"]]
        assert areas == intents
        examples = [area.split(".")[0] for area in areas]
        assert len(set(examples)) == len(examples)  # one rollout of an example
        assert {int(example) for example in examples} <= set(range(5))  # accepted ones only
        sizes.add(len(areas))
    assert sizes == {1, 2, 3, 4}


def test_draws_follow_from_the_seed() -> None:
    first, again = (proposals(build_searcher("random_fewshot", context(seed=3))) for _ in range(2))
    assert first == again
    assert first["draw 1"] != proposals(build_searcher("random_fewshot", context(seed=4)))["draw 1"]


def test_without_a_passing_rollout_labels_and_zero_shot_are_left_and_a_note_says_so() -> None:
    searcher = build_searcher("random_fewshot", context(passing=0))
    found = proposals(searcher)
    assert {"incoming", "zero_shot", "labels"} <= set(found) and "first" not in found
    assert all(not predictors["route"]["demos"] for predictors in found.values())
    assert any("No rollout passed" in note for note in searcher.notes)  # type: ignore[attr-defined]


def test_equal_candidates_are_proposed_once() -> None:
    searcher = build_searcher(
        "random_fewshot", context(passing=1, max_labeled_demos=0, max_bootstrapped_demos=1, num_candidates=9)
    )
    found = proposals(searcher)
    ids = [candidate_id({"predictors": predictors}) for predictors in found.values()]
    assert len(set(ids)) == len(ids)
    assert "labels" not in found  # no labelled demos allowed: equal to zero_shot
    assert any("of 9 draws" in note for note in searcher.notes)  # type: ignore[attr-defined]


def test_rows_with_an_error_or_a_lost_field_give_no_demo() -> None:
    base = context(passing=2, max_labeled_demos=0)
    for row in base.rollouts:
        if row["example_id"] == "e0":
            row["error"] = {"kind": "timeout", "message": ""}
        row["calls"][0]["outputs"] = None
    found = proposals(build_searcher("random_fewshot", base))
    assert found["first"]["route"]["demos"] == []
    assert [demo["text"] for demo in found["first"]["answer"]["demos"]] == ["t1"]


def test_a_labelled_demo_leaves_out_the_input_of_another_module() -> None:
    base = context()
    base.signatures["answer"] = {"inputs": ["text", "area"], "outputs": ["intent"]}  # `area` comes from `route`
    try:
        found = proposals(build_searcher("labeled", base))
    finally:
        base.signatures["answer"] = {"inputs": ["text"], "outputs": ["intent"]}
    demos = [demo for candidate in found.values() for demo in candidate["answer"]["demos"]]
    assert demos
    assert all(set(demo) == {"text", "intent"} for demo in demos)


@pytest.mark.parametrize("optimizer", ["labeled", "random_fewshot"])
def test_examples_without_their_label_take_no_place_among_labelled_demos(optimizer: str) -> None:
    base = context(passing=0, num_candidates=8, max_labeled_demos=3)
    for example in base.examples[:8]:
        example["labels"].clear()
    found = proposals(build_searcher(optimizer, base))
    drawn = [candidate["answer"]["demos"] for label, candidate in found.items() if label.startswith(("labels", "labeled"))]
    assert drawn and all(len(demos) == 3 for demos in drawn)


def test_labelled_demos_of_one_predictor_come_from_examples_that_have_its_labels() -> None:
    base = context()
    both = replace(base, labelled={"answer": ["intent"], "route": ["area"]})
    both.examples[3]["labels"]["area"] = "gold"  # the only one
    assert [one["id"] for one in draw_labelled(both, both.examples, random.Random(0), 5, ["route"])] == ["e3"]
    assert len(draw_labelled(both, both.examples, random.Random(0), 5)) == 5


def test_labeled_draws_distinct_sets_of_labels() -> None:
    found = proposals(build_searcher("labeled", context(num_candidates=3, max_labeled_demos=4)))
    assert list(found) == ["incoming", "zero_shot", "labels 1", "labels 2", "labels 3"]
    assert all(len(found[f"labels {n}"]["answer"]["demos"]) == 4 for n in (1, 2, 3))
    assert found["labels 1"] != found["labels 2"]


def test_unknown_searchers_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'random_fewshot'"):
        build_searcher("random_fewshots", context())
    with pytest.raises(ConfigError, match="there is no file"):
        build_searcher("missing.py:Mine", context(), str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be imported"):
        build_searcher("no_such_module_here:Mine", context())
    (tmp_path / "mine.py").write_text("class Greedy:\n    def __init__(self, context):\n        pass\n")
    with pytest.raises(ConfigError, match="did you mean 'Greedy'"):
        build_searcher("mine.py:Gredy", context(), str(tmp_path))
    with pytest.raises(ConfigError, match="without propose, observe, finished"):
        build_searcher("mine.py:Greedy", context(), str(tmp_path))


def test_a_searcher_is_found_by_module_name() -> None:
    assert "zero_shot" in proposals(build_searcher("bt_ray.search.labeled:build", context()))


# The ledger and the searcher's thread


def conduct(searcher: Searcher, num: int = 8, error: float = 0.05) -> Conduct:
    return Conduct(searcher, Ledger([str(i) for i in range(num)], (0.5,), StopRule(error)))


def drive(book: Conduct, score: Callable[[dict[str, Any], str], float]) -> Ledger:
    """Score candidates one after another in this process, as a search without parallelism would."""
    give_up = time.monotonic() + 30
    while (entry := book.next()) is not Answer.END:
        if isinstance(entry, Answer):
            assert time.monotonic() < give_up
            continue
        for rung, batch in enumerate(book.ledger.batches):
            scores = [(example_id, score(entry.candidate, example_id)) for example_id in batch]
            report = {"candidate_id": entry.candidate_id, "rung": rung, "scores": scores, "seconds": 0.0, "error": None}
            if book.heard(report) is not Verdict.CONTINUE:
                break
    book.close()
    return book.ledger


def named(label: str, demos: int = 0) -> Any:
    return {"label": label, "candidate": {"predictors": {"p": {"instructions": label, "demos": [{"x": "y"}] * demos}}}}


def test_only_fully_scored_candidates_win_and_hopeless_ones_stop() -> None:
    quality = {"good": 8, "lucky": 4, "bad": 0}
    ledger = drive(
        conduct(ListSearcher([named("good"), named("bad"), named("lucky")])),
        lambda candidate, example_id: float(int(example_id) < quality[candidate["predictors"]["p"]["instructions"]]),
    )
    best = ledger.best()
    assert best is not None and best.label == "good" and best.score == 1.0
    rows = {row["label"]: row for row in ledger.trials()}
    assert rows["bad"]["stopped_at"] == 4 and not rows["bad"]["complete"] and rows["bad"]["num_examples"] == 4
    assert rows["lucky"]["complete"] and rows["lucky"]["score"] == 0.5  # perfect so far: it had to be scored on all
    assert any("racing stopped 1 of 3" in note for note in ledger.notes())


def test_ties_go_to_fewer_demos_then_to_the_earlier() -> None:
    proposed = [named("aa", demos=2), named("bb", demos=1), named("cc", demos=1)]
    best = drive(conduct(ListSearcher(proposed)), lambda candidate, example_id: 1.0).best()
    assert best is not None and best.label == "bb"


def test_missing_and_non_finite_scores_count_as_zero_and_are_told() -> None:
    ledger = Ledger(["a", "b", "c", "d"], (), StopRule(0.05))
    entry = ledger.add(named("x"))
    assert entry is not None
    assert ledger.record(entry.candidate_id, 0, {"a": 1.0, "b": float("nan"), "d": 1.0}, 0.1) is Verdict.COMPLETE
    assert entry.score == 0.5 and entry.missing == 2
    assert any("2 runs got no score" in note for note in ledger.notes())


def test_a_rung_reported_twice_counts_once() -> None:
    ledger = Ledger(["a", "b"], (0.5,), StopRule(0.05))
    entry = ledger.add(named("x"))
    assert entry is not None
    for _ in range(2):
        assert ledger.record(entry.candidate_id, 0, {"a": 1.0}, 1.0) is Verdict.CONTINUE
    assert ledger.record(entry.candidate_id, 1, {"b": 0.0}, 1.0) is Verdict.COMPLETE
    assert entry.to_json()["seconds"] == 2.0 and entry.score == 0.5


class Learner(ListSearcher):
    """Proposes the second half of its list only after it has seen scores."""

    def __init__(self) -> None:
        super().__init__([named("a"), named("b"), named("a"), named("c")])
        self.heard: list[tuple[str, float, bool]] = []
        self.by_example: dict[str, dict[str, float]] = {}

    def propose(self) -> Any:
        return super().propose() if len(self._left) > 2 or len(self.heard) >= 2 else None

    def observe_examples(self, candidate_id: str, scores: dict[str, float]) -> None:
        self.by_example[candidate_id] = scores

    def observe(self, candidate_id: str, score: float, complete: bool) -> None:
        self.heard.append((candidate_id, score, complete))


def test_a_searcher_learns_from_scores_also_of_what_it_proposed_before() -> None:
    learner = Learner()
    ledger = drive(conduct(learner), lambda candidate, example_id: float(example_id == "0"))
    first = candidate_id(named("a")["candidate"])
    assert [heard[0] for heard in learner.heard].count(first) == 2  # once scored, once as the known score of an equal one
    assert learner.heard[0] == (first, 1 / 8, True)
    assert len(learner.by_example[first]) == 8
    assert ledger.num_duplicates == 1 and len(ledger.entries) == 3


class Silent(ListSearcher):
    def finished(self) -> bool:
        return False


def test_a_searcher_that_waits_for_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="proposes nothing and is not finished"):
        drive(conduct(Silent([named("a")])), lambda candidate, example_id: 1.0)


class Stubborn(ListSearcher):
    def propose(self) -> Any:
        return named("again")

    def finished(self) -> bool:
        return False


def test_a_searcher_that_repeats_itself_for_ever_is_ended() -> None:
    assert len(drive(conduct(Stubborn([])), lambda candidate, example_id: 1.0).entries) == 1


class Broken(ListSearcher):
    def observe(self, candidate_id: str, score: float, complete: bool) -> None:
        raise ValueError("cannot learn")


def test_an_exception_of_the_searcher_is_not_lost() -> None:
    with pytest.raises(ValueError, match="cannot learn"):
        drive(conduct(Broken([named("a"), named("b")])), lambda candidate, example_id: 1.0)


def test_the_searcher_of_the_readme_works(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (tmp_path / "grow.py").write_text(source)
    searcher = build_searcher("grow.py:GrowDemos", context(max_labeled_demos=6), str(tmp_path))

    def three_are_best(candidate: dict[str, Any], example_id: str) -> float:
        num_demos = len(candidate["predictors"]["answer"]["demos"])
        return (3 - abs(num_demos - 3)) / 3

    ledger = drive(conduct(searcher, error=0.001), three_are_best)
    best = ledger.best()
    assert best is not None and best.label == "3 demos"
    assert ledger.trials()[-1]["label"] == "4 demos"
    assert searcher.notes == ["Demos stopped helping at 4."]  # type: ignore[attr-defined]
