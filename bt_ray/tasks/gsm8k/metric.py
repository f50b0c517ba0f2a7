"""The GSM8K metric: the last number of the answer counts."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import dspy

# A minus belongs to the number only if nothing stands before it: "10-3" ends in 3, "= -3" in -3. Commas
# count as part of a number in groups of three only, so "3, 4" and "1,2" are two numbers each.
_NUMBER = re.compile(r"(?<![\w.)])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+")


def last_number(text: str) -> Decimal | None:
    """The last number written in digits, without thousands commas and dollar signs; None without one."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def last_number_matches(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    """1.0 if the last number of the predicted answer equals the label's, else 0.0.

    Numbers compare by value (18 = 18.00). An answer without digits is wrong; a label without
    them raises ValueError, since that is a fault of the data.
    """
    gold = last_number(str(example.answer))
    if gold is None:
        raise ValueError(f"the label {example.answer!r} holds no number")
    predicted = prediction.get("answer")
    return float(predicted is not None and last_number(str(predicted)) == gold)
