"""What the package `gepa` is lent: rows of mini-batches, scores of whole candidates, and an LM that reflects."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from gepa.core.adapter import EvaluationBatch
from gepa.strategies.instruction_proposal import InstructionProposalSignature

from bt_ray.errors import PromptTooLongError
from bt_ray.rollout.evaluator import row_score
from bt_ray.rollout.tasks import candidate_id
from bt_ray.search.base import Candidate, Proposal, Row, SearchContext

# An iteration whose mini-batch is answered perfectly proposes nothing; its rows are cheap, but a good
# program would go on like that for ever.
ITERATIONS_PER_PROPOSAL = 10
# Added to each score of a whole candidate. A merge draws a common ancestor with the scores as weights, which
# fails where they are all 0; a shift of all scores leaves comparisons as they were. A power of two: sums
# of scores like 0 and 1 stay exact, and so do ties.
SCORE_SHIFT = 2.0**-30


class ComponentName(str):
    """A predictor's name with the same hash in every process, for gepa alone: plain strings do not find it in a dict.

    gepa's merge draws while it goes through a set of names; the order of a set of plain strings
    differs from process to process, and with it the candidates of a search that is run again.
    """

    def __hash__(self) -> int:
        return int.from_bytes(hashlib.sha256(self.encode()).digest()[:7], "big")


class Abort(BaseException):
    """Ends gepa's run from inside its calls. No Exception: gepa would log it and go on.

    `error`: what the search shall raise; None when nobody waits for the result any more.
    """

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(error)
        self.error = error


class Scores(Protocol):
    """Where whole candidates are scored."""

    def score(self, proposal: Proposal) -> dict[str, float]:
        """Scores by id of the search examples; blocks. Raises Abort when the search is over."""

    def check(self) -> None:
        """Raise Abort when the search is over."""


def to_texts(student: Candidate) -> dict[str, str]:
    """gepa's form of a candidate: the instruction of each predictor."""
    return {ComponentName(name): predictor["instructions"] for name, predictor in student["predictors"].items()}


def to_candidate(student: Candidate, texts: Mapping[str, str]) -> Candidate:
    """These instructions with the student's demos."""
    plain = {str(name): text for name, text in texts.items()}
    demos = {name: predictor["demos"] for name, predictor in student["predictors"].items()}
    return {"predictors": {name: {"instructions": text, "demos": demos[name]} for name, text in plain.items()}}


class Book:
    """Counts gepa's proposals, says when they are enough, and writes down who came from whom.

    A callback and a stop condition of gepa in one.
    """

    def __init__(self, student: Candidate, num_proposals: int) -> None:
        self._student, self._num_proposals = student, num_proposals
        self.num_proposed = 0  # instructions that reflection wrote, and merges
        self._known = {(name, text.strip()) for name, text in to_texts(student).items()}
        self._num_repeated = 0  # reflections that wrote what was there
        self.labels: dict[str, str] = {}  # by candidate id
        self.lineage: list[dict[str, Any]] = []

    def __call__(self, state: Any) -> bool:
        iterations = state.i + 1  # gepa counts from -1
        return self.num_proposed >= self._num_proposals or iterations >= ITERATIONS_PER_PROPOSAL * self._num_proposals

    def on_proposal_end(self, event: Any) -> None:
        self.num_proposed += 1
        written = {(name, text.strip()) for name, text in event["new_instructions"].items()}
        self._num_repeated += written <= self._known
        self._known |= written

    def on_merge_attempted(self, event: Any) -> None:
        self.num_proposed += 1

    def on_valset_evaluated(self, event: Any) -> None:
        key = candidate_id(to_candidate(self._student, event["candidate"]))
        parents = [self.lineage[index]["candidate_id"] for index in event["parent_ids"]]
        entry = {"candidate_id": key, "label": self.labels[key], "parents": parents}
        self.lineage.append({**entry, "score": event["average_score"] - SCORE_SHIFT})

    def label(self, candidate: Candidate, reflected: bool) -> str:
        """The candidate's name in the report; the first one is gepa's seed."""
        new = f"reflection {self.num_proposed}" if reflected else f"merge {self.num_proposed + 1}"
        return self.labels.setdefault(candidate_id(candidate), new if self.labels else "student")

    def notes(self) -> list[str]:
        notes = []
        if self._num_repeated:
            notes.append(f"{self._num_repeated} of {self.num_proposed} proposals repeat an instruction that was there before.")
        if self.num_proposed < self._num_proposals:
            notes.append(
                f"gepa made {self.num_proposed} of {self._num_proposals} proposals; other mini-batches had nothing to mend."
            )
        return notes


class RowsAdapter:
    """gepa's adapter, and its reflection LM, over the runs, scores and LM of a search.

    Instances of gepa's training set are examples; those of its validation set are ids, because a
    searcher never sees the search examples.
    """

    propose_new_texts = None  # gepa's own prompt and parsing

    def __init__(self, context: SearchContext, scores: Scores, book: Book) -> None:
        self._context, self._scores, self._book = context, scores, book
        self.started = False
        self._num_asked = 0
        self._lost = {"empty": 0, "too long": 0}  # reflections without an instruction
        self._runs: dict[tuple[str, str], bool] = {}  # (candidate id, example id) -> said in words what was wrong

    def evaluate(
        self, batch: Sequence[Any], candidate: dict[str, str], capture_traces: bool = False
    ) -> EvaluationBatch[Any, Any]:
        """Scores of a batch, with (example, row) as trajectories of training examples."""
        self.started = True
        with _aborting():
            self._scores.check()
            prompts = to_candidate(self._context.student, candidate)
            if isinstance(batch[0], str):
                # gepa asks for traces of what reflection wrote, but not for its seed and merges.
                found = self._scores.score({"label": self._book.label(prompts, capture_traces), "candidate": prompts})
                return EvaluationBatch(outputs=[None] * len(batch), scores=[found.get(name, 0.0) + SCORE_SHIFT for name in batch])
            rows = self._run(prompts, batch)
            trajectories = list(zip(batch, rows, strict=True))
            return EvaluationBatch(outputs=rows, scores=[_score(row) for row in rows], trajectories=trajectories)

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: EvaluationBatch[Any, Any], components_to_update: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """For each predictor its inputs, outputs and feedback in the rows that called it."""
        with _aborting():
            key = candidate_id(to_candidate(self._context.student, candidate))
            dataset: dict[str, list[dict[str, Any]]] = {}
            for name in components_to_update:
                seed = f"{self._context.seed}/gepa/{key}/{name}"
                records = [
                    reflective_record(self._context, str(name), example, row, random.Random(f"{seed}/{example['id']}"))
                    for example, row in eval_batch.trajectories or []
                ]
                dataset[name] = [record for record in records if record is not None]
            return dataset

    def reflect(self, prompt: str) -> str:
        """The LM's answer. A ValueError (gepa asks once more, then goes on) where it has no instruction in it."""
        self._scores.check()
        seed, self._num_asked = self._num_asked, self._num_asked + 1
        with _aborting():
            assert self._context.ask is not None  # build has looked
            try:
                (answer,) = self._context.ask([prompt], seed)
            except PromptTooLongError:
                answer = None
            if answer is not None and InstructionProposalSignature.output_extractor(answer.strip())["new_instruction"]:
                return answer
        self._lost["too long" if answer is None else "empty"] += 1
        raise ValueError("no instruction")

    def notes(self) -> list[str]:
        notes = []
        silent = sum(not spoken for spoken in self._runs.values())
        if silent:
            expected = " and the expected labels" if self._context.labelled else ""
            notes.append(
                f"The metric said nothing in words on {silent} of {len(self._runs)} training runs: reflection saw their score"
                f"{expected}, not why an answer was wrong."
            )
        if self._lost["empty"]:
            notes.append(f"{self._lost['empty']} reflections had no instruction in them.")
        if self._lost["too long"]:
            notes.append(
                f"{self._lost['too long']} reflection prompts did not fit the context; a smaller "
                "options.reflection_minibatch_size makes them shorter."
            )
        return notes

    def _run(self, prompts: Candidate, examples: Sequence[Row]) -> list[Row]:
        assert self._context.run_rows is not None  # build has looked
        # gepa fills the last mini-batch of a pass with examples that it has already.
        names = list(dict.fromkeys(example["id"] for example in examples))
        rows = dict(zip(names, self._context.run_rows(prompts, names), strict=True))
        key = candidate_id(prompts)
        self._runs |= {(key, name): bool(row["error"] or row["feedback"] or _spoken(row)) for name, row in rows.items()}
        return [rows[example["id"]] for example in examples]


def reflective_record(
    context: SearchContext, predictor: str, example: Row, row: Row, rng: random.Random
) -> dict[str, Any] | None:
    """One example as the reflecting LM sees it, or None where the predictor was not called.

    Of several calls one whose answer did not parse, else one at random. An answer that did not
    parse is shown raw. What the metric said of the call itself goes before what it said of the run.
    """
    calls = [call for call in row["calls"] if call["predictor"] == predictor]
    if not calls:
        return None
    call = rng.choice([call for call in calls if call["outputs"] is None] or calls)
    outputs = call["text"] if call["outputs"] is None else call["outputs"]
    feedback = call.get("feedback") or feedback_text(context, predictor, example, row)
    return {"Inputs": call["inputs"], "Generated Outputs": outputs, "Feedback": feedback}


def feedback_text(context: SearchContext, predictor: str, example: Row, row: Row) -> str:
    """What the metric said, or the error; without either the score, and the labels as far as they name outputs."""
    if row["feedback"] and not row["error"]:
        return str(row["feedback"])
    if row["error"]:
        parts = [f"The run failed ({row['error']['kind']}): {row['error']['message']}"]
    else:
        parts = [f"Score: {_score(row):g}."]
    labels, named = example["labels"], context.labelled
    own = {field: labels[field] for field in named.get(predictor, []) if field in labels}
    every = {field: labels[field] for fields in named.values() for field in fields if field in labels}
    whose = "The expected output" if own else "The expected output of the whole program"
    parts += [f"{whose} is {field}: {value}" for field, value in (own or every).items()]
    return "\n".join(parts)


def _spoken(row: Row) -> bool:
    return any(call.get("feedback") for call in row["calls"])


def _score(row: Row) -> float:
    """As among the search examples, where a run without a score counts as 0 too."""
    return row_score(row) or 0.0


@contextmanager
def _aborting() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Abort(error) from error
