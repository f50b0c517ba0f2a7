"""Banking8: the shape of the helpdesk program with eight intents of Banking77."""

from __future__ import annotations

from typing import Literal

import dspy

from bt_ray.tasks.helpdesk.program import Helpdesk

# The names are Banking77's own. Two per department, so that the first step says something about the second.
DEPARTMENTS = {
    "cards": ("card_arrival", "lost_or_stolen_card"),
    "transfers": ("cancel_transfer", "transfer_timing"),
    "topups": ("top_up_failed", "automatic_top_up"),
    "accounts": ("terminate_account", "edit_personal_details"),
}


class FindDepartment(dspy.Signature):
    """Which department handles this bank customer's message?"""

    message: str = dspy.InputField()
    department: Literal["cards", "transfers", "topups", "accounts"] = dspy.OutputField()


class FindIntent(dspy.Signature):
    """What does this bank customer want?"""

    message: str = dspy.InputField()
    department: str = dspy.InputField()
    intent: Literal[
        "card_arrival",
        "lost_or_stolen_card",
        "cancel_transfer",
        "transfer_timing",
        "top_up_failed",
        "automatic_top_up",
        "terminate_account",
        "edit_personal_details",
    ] = dspy.OutputField()


class Banking8(Helpdesk):
    """message -> department -> intent, as in the helpdesk, with the names of Banking77."""

    def __init__(self) -> None:
        super().__init__()
        self.department = dspy.Predict(FindDepartment)
        self.intent = dspy.Predict(FindIntent)
