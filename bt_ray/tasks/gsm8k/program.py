"""The GSM8K program: one chain of thought."""

from __future__ import annotations

import dspy


class Solve(dspy.Signature):
    """Solve the problem. The answer is one number."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class GSM8K(dspy.Module):
    """question -> answer: one LM call. The prediction holds `reasoning` and `answer`."""

    def __init__(self) -> None:
        super().__init__()
        self.solve = dspy.ChainOfThought(Solve)

    def forward(self, question: str) -> dspy.Prediction:
        return self.solve(question=question)

    async def aforward(self, question: str) -> dspy.Prediction:
        return await self.solve.acall(question=question)
