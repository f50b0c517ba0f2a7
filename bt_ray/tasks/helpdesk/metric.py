"""The helpdesk metric."""

from __future__ import annotations

from typing import Any

import dspy


def exact_intent(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    """1.0 if the predicted intent is the labelled one, else 0.0.

    White space around the prediction is ignored, nothing else is: the intents are names. A
    prediction without an intent is wrong; an example without one raises AttributeError, since
    that is a fault of the data.
    """
    predicted = prediction.get("intent")
    return float(isinstance(predicted, str) and predicted.strip() == example.intent)
