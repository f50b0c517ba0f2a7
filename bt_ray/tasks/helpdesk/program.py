"""The helpdesk program: two plain predictions, the second one sees the first."""

from __future__ import annotations

from typing import Literal

import dspy

# Which intents belong to which department. For reading and for tests: the data labels intents only,
# so a program learns its departments from the runs that end in the right intent.
DEPARTMENTS = {
    "cards": ("lost_card", "declined_card"),
    "transfers": ("late_transfer", "undo_transfer"),
    "accounts": ("close_account", "change_details"),
    "loans": ("apply_loan", "repay_loan"),
}


class FindDepartment(dspy.Signature):
    """Which department handles this bank customer's message?"""

    message: str = dspy.InputField()
    department: Literal["cards", "transfers", "accounts", "loans"] = dspy.OutputField()


class FindIntent(dspy.Signature):
    """What does this bank customer want?"""

    message: str = dspy.InputField()
    department: str = dspy.InputField()
    intent: Literal[
        "lost_card",
        "declined_card",
        "late_transfer",
        "undo_transfer",
        "close_account",
        "change_details",
        "apply_loan",
        "repay_loan",
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
