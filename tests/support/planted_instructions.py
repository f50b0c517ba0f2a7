"""What the tests of `opro` and `gpo` share: a loop of proposals and scores without Ray, stub LMs, planted problems."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bt_ray.config import PromptStep
from bt_ray.rollout.tasks import candidate_id
from bt_ray.search.base import SearchContext, Searcher, build_searcher

SIGNATURE = {"inputs": ["text"], "outputs": ["label"]}
NUM_SEEDS = 50


def context(ask: Any, start: str | dict[str, str] = "Do it.", seed: int = 0, **step: Any) -> SearchContext:
    """A program of one predictor `main`, or of those that `start` names."""
    texts = {"main": start} if isinstance(start, str) else start
    return SearchContext(
        step=PromptStep.model_validate({"optimizer": "opro", **step}),
        student={"predictors": {name: {"instructions": text, "demos": []} for name, text in texts.items()}},
        rollouts=[],
        examples=[{"id": f"e{i}", "inputs": {"text": f"t{i}"}, "labels": {"label": f"gold{i}"}} for i in range(5)],
        labelled={name: ["label"] for name in texts},
        signatures=dict.fromkeys(texts, SIGNATURE),
        seed=seed,
        ask=ask,
    )


@dataclass
class Run:
    """What a search proposed, round by round, with the scores."""

    rounds: list[list[dict[str, Any]]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)

    def texts(self, predictor: str = "main") -> list[str]:
        return [found["candidate"]["predictors"][predictor]["instructions"] for batch in self.rounds for found in batch]

    def labels(self) -> list[str]:
        return [found["label"] for batch in self.rounds for found in batch]


def drive(searcher: Searcher, score: Callable[[dict[str, Any]], float], backwards: bool = False) -> Run:
    """Propose until None, then tell the scores of all that wait, in their order or the other way round."""
    run = Run()
    while True:
        batch = []
        while (proposal := searcher.propose()) is not None:
            batch.append(dict(proposal))
        if not batch:
            assert searcher.finished()
            return run
        run.rounds.append(batch)
        for found in reversed(batch) if backwards else batch:
            value = score(found["candidate"]["predictors"])
            run.scores[candidate_id(found["candidate"])] = value
            searcher.observe(candidate_id(found["candidate"]), value, True)


def shown_in(prompt: str) -> list[tuple[str, float]]:
    """The history that a meta-prompt shows."""
    found = re.findall(r"<instruction>(.*?)</instruction>\nScore: ([\d.]+)", prompt, re.S)
    return [(text, float(score)) for text, score in found]


class Scribe:
    """An LM that writes a new, numbered instruction every time, and keeps what it was asked."""

    def __init__(self, answers: Sequence[Any] = ()) -> None:
        self.calls: list[tuple[list[str], int]] = []
        self._answers = list(answers)
        self._count = 0

    def __call__(self, prompts: Sequence[str], seed: int = 0) -> list[Any]:
        self.calls.append((list(prompts), seed))
        return [self._answers.pop(0) if self._answers else self._new() for _ in prompts]

    def _new(self) -> str:
        self._count += 1
        return f"<instruction>Number {self._count}.</instruction>"


def by_length(predictors: dict[str, Any]) -> float:
    """A score that differs between instructions."""
    return sum(len(part["instructions"]) for part in predictors.values()) % 17 / 17


# OPRO's mechanism: the order of the history. Here the LM works on what it was shown last.

VOCABULARY = [f"w{i}" for i in range(60)]
HISTORY_LENGTH = 20


def last_reader(prompts: Sequence[str], seed: int = 0) -> list[str]:
    """Changes one word of the last instruction shown to any word, useful or not."""
    answers = []
    for number, prompt in enumerate(prompts):
        rng = random.Random(f"{prompt}/{seed}/{number}")
        words = shown_in(prompt)[-1][0].split()
        words[rng.randrange(len(words))] = rng.choice(VOCABULARY)
        answers.append(f"<instruction>{' '.join(words)}</instruction>")
    return answers


def num_planted_found() -> int:
    """Of NUM_SEEDS searches, those that found all of 5 planted words (of 60) within 200 instructions of 12 words."""
    found = 0
    for seed in range(NUM_SEEDS):
        rng = random.Random(f"planted/{seed}")
        planted, start = set(rng.sample(VOCABULARY, 5)), " ".join(rng.choices(VOCABULARY, k=12))

        def share(predictors: dict[str, Any], planted: set[str] = planted) -> float:
            return len(planted & set(predictors["main"]["instructions"].split())) / len(planted)

        lent = context(last_reader, start, seed, num_candidates=200, proposals_per_round=8, history_length=HISTORY_LENGTH)
        found += max(drive(build_searcher("opro", lent), share).scores.values()) == 1.0
    return found


# GPO's mechanisms. An instruction here has 12 places, each with one right word of 10. The LM
# trusts that whatever differs from the best and scored worse was the mistake: true between like
# instructions, wrong between unlike ones. It uses up the words that it may change.

NUM_PLACES, NUM_WORDS = 12, 10


def blamer(prompts: Sequence[str], seed: int = 0) -> list[str]:
    """Changes up to the allowed number of words of the last instruction: none that it holds for
    right, because a worse instruction lacked it, and to none that a worse instruction had."""
    answers = []
    for number, prompt in enumerate(prompts):
        rng = random.Random(f"{prompt}/{seed}/{number}")
        shown = shown_in(prompt)
        words, best = shown[-1][0].split(), shown[-1][1]
        right: set[int] = set()
        wrong: set[str] = set()
        for text, score in shown[:-1]:
            differing = [place for place, word in enumerate(text.split()) if word != words[place]]
            wrong |= {text.split()[place] for place in differing}
            right |= set(differing) if score < best else set()
        budget = re.search(r"at most (\d+) words", prompt)
        assert budget is not None
        places = [place for place in range(NUM_PLACES) if place not in right] or list(range(NUM_PLACES))
        for place in rng.sample(places, min(len(places), rng.randint(1, int(budget[1])))):
            choice = [f"{place}v{i}" for i in range(NUM_WORDS)]
            words[place] = rng.choice([word for word in choice if word not in wrong and word != words[place]] or choice)
        answers.append(f"<instruction>{' '.join(words)}</instruction>")
    return answers


def num_reaching_nine(trap: int = 0) -> int:
    """Of NUM_SEEDS searches, those that had 9 of the 12 right words within 240 instructions.

    With a `trap` the start is a local best: what differs from it in fewer places than that scores below it, the less
    the more it differs. So small steps do not leave it.
    """
    reached = 0
    for seed in range(NUM_SEEDS):
        rng = random.Random(seed)
        right, start = ([f"{place}v{rng.randrange(NUM_WORDS)}" for place in range(NUM_PLACES)] for _ in range(2))

        def share(predictors: dict[str, Any], right: list[str] = right, start: list[str] = start) -> float:
            words = predictors["main"]["instructions"].split()
            num_changed = sum(a != b for a, b in zip(start, words, strict=True))
            if num_changed < trap:
                return 1.5 / NUM_PLACES * (1 - num_changed / trap)
            return sum(a == b for a, b in zip(right, words, strict=True)) / NUM_PLACES

        lent = context(blamer, " ".join(start), seed, num_candidates=240, proposals_per_round=8, history_length=8)
        reached += max(drive(build_searcher("gpo", lent), share).scores.values()) >= 9 / NUM_PLACES
    return reached
