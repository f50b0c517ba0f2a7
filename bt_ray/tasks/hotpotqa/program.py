"""The HotPotQA program: three chains of thought around two retrievals."""

from __future__ import annotations

import asyncio
from pathlib import Path

import dspy

from bt_ray.tasks.hotpotqa.retrieval import Retriever, default_corpus


class FirstQuery(dspy.Signature):
    """Write a search query that finds what is needed first to answer the question."""

    question: str = dspy.InputField()
    search_query: str = dspy.OutputField()


class SecondQuery(dspy.Signature):
    """Write a search query that finds what the context still lacks to answer the question."""

    context: list[str] = dspy.InputField()
    question: str = dspy.InputField()
    search_query: str = dspy.OutputField()


class FinalAnswer(dspy.Signature):
    """Answer the question from the context, in a few words."""

    context: list[str] = dspy.InputField()
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class HotpotQA(dspy.Module):
    """question -> query -> retrieve -> query -> retrieve -> answer: three LM calls, two retrievals.

    The prediction holds `answer` and `hops`: for each retrieval in turn its `query` and the `titles`
    found. Up to `k` passages come from each retrieval; a passage found twice is shown once.

    `corpus` is a jsonl(.gz) file with `title` and `text`; by default the one that
    `python -m bt_ray.tasks.hotpotqa.data` installs. Raises FileNotFoundError if there is none: at
    once, since otherwise each question alone would fail.
    """

    def __init__(self, corpus: str | None = None, k: int = 3) -> None:
        super().__init__()
        path = Path(corpus).expanduser() if corpus else default_corpus()
        if not path.is_file():
            raise FileNotFoundError(
                f"hotpotqa: there is no corpus {path}. Run `python -m bt_ray.tasks.hotpotqa.data SOURCE OUT` "
                "on this machine, or write a program file with a function that returns HotpotQA(corpus=PATH)."
            )
        self.retriever = Retriever(str(path.resolve()), k)
        self.first_query = dspy.ChainOfThought(FirstQuery)
        self.second_query = dspy.ChainOfThought(SecondQuery)
        self.final_answer = dspy.ChainOfThought(FinalAnswer)

    def forward(self, question: str) -> dspy.Prediction:
        query = self.first_query(question=question).search_query
        first = self.retriever.search(query)
        next_query = self.second_query(context=first, question=question).search_query
        second = self.retriever.search(next_query)
        answer = self.final_answer(context=_merge(first, second), question=question).answer
        return dspy.Prediction(answer=answer, hops=[_hop(query, first), _hop(next_query, second)])

    async def aforward(self, question: str) -> dspy.Prediction:
        # The index takes seconds to build: in a thread, so that other questions go on meanwhile.
        query = (await self.first_query.acall(question=question)).search_query
        first = await asyncio.to_thread(self.retriever.search, query)
        next_query = (await self.second_query.acall(context=first, question=question)).search_query
        second = await asyncio.to_thread(self.retriever.search, next_query)
        answer = (await self.final_answer.acall(context=_merge(first, second), question=question)).answer
        return dspy.Prediction(answer=answer, hops=[_hop(query, first), _hop(next_query, second)])


def _merge(first: list[str], second: list[str]) -> list[str]:
    """Both lists in order, each passage once."""
    return list(dict.fromkeys([*first, *second]))


def _hop(query: str, passages: list[str]) -> dict[str, object]:
    """What one retrieval was asked and found, short enough to be kept with every run."""
    return {"query": query, "titles": [passage.partition(" | ")[0] for passage in passages]}
