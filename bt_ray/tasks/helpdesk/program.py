"""The helpdesk program: two plain predictions, the second one sees the first."""

from __future__ import annotations

from typing import Literal

import dspy

# Which intents belong to which department. For reading and for tests: the data labels intents only,
# so a program learns its departments from the runs that end in the right intent.
DEPARTMENTS = {
    "card": ("card: lost", "card: refused"),
    "transfer": ("transfer: not arrived", "transfer: take back"),
    "account": ("account: close", "account: new details"),
    "loan": ("loan: get one", "loan: pay back"),
}


class FindDepartment(dspy.Signature):
    """Is this bank customer writing about a card, a transfer of money, an account or a loan?"""

    message: str = dspy.InputField()
    department: Literal["card", "transfer", "account", "loan"] = dspy.OutputField()


class FindIntent(dspy.Signature):
    """What does the customer want?"""

    message: str = dspy.InputField()
    department: str = dspy.InputField()
    # An intent begins with its department: the second answer then follows from the first, so a run
    # that ends right has, most often, a right department to learn from.
    intent: Literal[
        "card: lost",
        "card: refused",
        "transfer: not arrived",
        "transfer: take back",
        "account: close",
        "account: new details",
        "loan: get one",
        "loan: pay back",
    ] = dspy.OutputField()


class Helpdesk(dspy.Module):
    """message -> department -> intent: two LM calls a message.

    The prediction holds both fields. Instructions are one sentence each, because the adapter
    lists the allowed values and a small model on a CPU pays for every token of its prompt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.department = dspy.Predict(FindDepartment)
        self.intent = dspy.Predict(FindIntent)

    def forward(self, message: str) -> dspy.Prediction:
        department = self.department(message=message).department
        intent = self.intent(message=message, department=department).intent
        return dspy.Prediction(department=department, intent=intent)

    async def aforward(self, message: str) -> dspy.Prediction:
        department = (await self.department.acall(message=message)).department
        intent = (await self.intent.acall(message=message, department=department)).intent
        return dspy.Prediction(department=department, intent=intent)
