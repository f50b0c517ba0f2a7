"""The HotPotQA metric: exact match after the normalisation of SQuAD and HotPotQA."""

from __future__ import annotations

import re
import string
from typing import Any

import dspy

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, then without ASCII punctuation, then without articles, with single spaces.

    In the order of the official evaluation script (Yang et al. 2018): an article that only shows
    once punctuation is gone is removed too.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_answer(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    """1.0 if predicted and labelled answer are equal after `normalise`, else 0.0.

    A prediction without an answer is wrong; an example without one raises AttributeError, since
    that is a fault of the data.
    """
    predicted = prediction.get("answer")
    return float(predicted is not None and normalise(str(predicted)) == normalise(str(example.answer)))
