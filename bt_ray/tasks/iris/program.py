"""The iris program: one chain of thought over four numbers."""

from __future__ import annotations

from typing import Literal

import dspy


class FindSpecies(dspy.Signature):
    """Which iris has these measurements in cm?"""

    sepal_length: float = dspy.InputField()
    sepal_width: float = dspy.InputField()
    petal_length: float = dspy.InputField()
    petal_width: float = dspy.InputField()
    species: Literal["setosa", "versicolor", "virginica"] = dspy.OutputField()


class Iris(dspy.Module):
    """Four lengths in cm -> species: one LM call. The prediction holds `reasoning` and `species`."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.ChainOfThought(FindSpecies)

    def forward(self, **measurements: float) -> dspy.Prediction:
        return self.classify(**measurements)

    async def aforward(self, **measurements: float) -> dspy.Prediction:
        return await self.classify.acall(**measurements)
