"""Each shipped metric on worked cases: label, prediction, score."""

from __future__ import annotations

import dspy
import pytest

from bt_ray.tasks.banking8 import exact_intent as banking_intent
from bt_ray.tasks.gsm8k import last_number_matches
from bt_ray.tasks.helpdesk import exact_intent
from bt_ray.tasks.helpdesk.program import DEPARTMENTS
from bt_ray.tasks.hotpotqa import exact_answer
from bt_ray.tasks.iris import exact_species

INTENT_CASES = [
    *((intent, intent, 1.0) for intents in DEPARTMENTS.values() for intent in intents),
    ("card: lost", " card: lost\n", 1.0),
    ("card: lost", "card: refused", 0.0),
    ("transfer: not arrived", "transfer: take back", 0.0),
    ("loan: get one", "loan: pay back", 0.0),
    ("card: lost", "Card: lost", 0.0),
    ("card: lost", "card:lost", 0.0),
    ("card: lost", "card lost", 0.0),
    ("card: lost", "card: lost.", 0.0),
    ("card: lost", "card: lost, card: lost", 0.0),
    ("card: lost", "lost", 0.0),
    ("card: lost", "", 0.0),
    ("card: lost", None, 0.0),
    ("card: lost", 3, 0.0),
    ("card: lost", ["card: lost"], 0.0),
]

SPECIES_CASES = [
    ("setosa", "setosa", 1.0),
    ("versicolor", "versicolor", 1.0),
    ("virginica", "virginica", 1.0),
    ("setosa", "setosa ", 1.0),
    ("setosa", "\tsetosa\n", 1.0),
    ("setosa", "versicolor", 0.0),
    ("setosa", "virginica", 0.0),
    ("versicolor", "setosa", 0.0),
    ("versicolor", "virginica", 0.0),
    ("virginica", "setosa", 0.0),
    ("virginica", "versicolor", 0.0),
    ("setosa", "Setosa", 0.0),
    ("setosa", "SETOSA", 0.0),
    ("setosa", "Iris setosa", 0.0),
    ("setosa", "iris-setosa", 0.0),
    ("setosa", "setosa.", 0.0),
    ("virginica", "virginia", 0.0),
    ("setosa", "setosa or versicolor", 0.0),
    ("setosa", "", 0.0),
    ("setosa", None, 0.0),
    ("setosa", 0, 0.0),
]

NUMBER_CASES = [
    ("72", "72", 1.0),
    ("72", "The answer is 72.", 1.0),
    ("72", "24 + 48 = 72", 1.0),
    ("72", "72 = 24 + 48", 0.0),
    ("72", "72.0", 1.0),
    ("72", "72.5", 0.0),
    ("18", "$18.00", 1.0),
    ("1000", "1,000", 1.0),
    ("1234567", "$1,234,567 a year", 1.0),
    ("1,000", "1000 metres", 1.0),
    ("3", "1,3", 1.0),
    ("-5", "-5", 1.0),
    ("-5", "x = \u22125", 1.0),
    ("-5", "-$5", 1.0),
    ("5", "-5", 0.0),
    ("3", "10-7=3", 1.0),
    ("7", "10-7", 1.0),
    ("0.5", ".5", 1.0),
    ("50", "50%", 1.0),
    ("2", "1/2", 1.0),
    ("10", "ten", 0.0),
    ("10", "", 0.0),
    ("10", None, 0.0),
    ("10", 10, 1.0),
    ("10", "10 apples", 1.0),
    ("10", "#### 10", 1.0),
    ("10", "10 of 12", 0.0),
    ("10", "100", 0.0),
]

ANSWER_CASES = [
    ("Fort Wainwright", "Fort Wainwright", 1.0),
    ("Fort Wainwright", "fort wainwright", 1.0),
    ("Fort Wainwright", "Fort Wainwright.", 1.0),
    ("Fort Wainwright", "  Fort   Wainwright\n", 1.0),
    ("Fort Wainwright", "the Fort Wainwright", 1.0),
    ("The Beatles", "Beatles", 1.0),
    ("A Night at the Opera", "night at opera", 1.0),
    ("yes", "Yes.", 1.0),
    ("yes", "no", 0.0),
    ("no", "No, they are not", 0.0),
    ("Fort Wainwright", "Wainwright", 0.0),
    ("Fort Wainwright", "Fort Wainwright, Alaska", 0.0),
    ("1,000", "1000", 1.0),
    ("O'Brien", "OBrien", 1.0),
    ("Jean-Paul", "Jean Paul", 0.0),
    ("U.S.", "us", 1.0),
    ("Theatre", "atre", 0.0),
    ("9 March 1934", "March 9, 1934", 0.0),
    ("Zoë", "Zoe", 0.0),
    ("'The' Band", "band", 1.0),
    ("The", "a", 1.0),
    ("Fort Wainwright", "", 0.0),
    ("Fort Wainwright", None, 0.0),
    ("1934", 1934, 1.0),
]


@pytest.mark.parametrize("label, predicted, score", INTENT_CASES)
@pytest.mark.parametrize("metric", [exact_intent, banking_intent])
def test_exact_intent(metric, label: str, predicted: object, score: float) -> None:
    assert metric(dspy.Example(intent=label), dspy.Prediction(intent=predicted), trace=[]) == score


@pytest.mark.parametrize("label, predicted, score", SPECIES_CASES)
def test_exact_species(label: str, predicted: object, score: float) -> None:
    assert exact_species(dspy.Example(species=label), dspy.Prediction(species=predicted), trace=[]) == score


@pytest.mark.parametrize("label, predicted, score", NUMBER_CASES)
def test_last_number_matches(label: str, predicted: object, score: float) -> None:
    assert last_number_matches(dspy.Example(answer=label), dspy.Prediction(answer=predicted), trace=[]) == score


@pytest.mark.parametrize("label, predicted, score", ANSWER_CASES)
def test_exact_answer(label: str, predicted: object, score: float) -> None:
    assert exact_answer(dspy.Example(answer=label), dspy.Prediction(answer=predicted), trace=[]) == score


METRICS = [(exact_intent, "intent"), (exact_species, "species"), (last_number_matches, "answer"), (exact_answer, "answer")]


@pytest.mark.parametrize("metric, field", METRICS)
def test_a_prediction_without_the_field_is_wrong(metric, field: str) -> None:
    assert metric(dspy.Example({field: "1"}), dspy.Prediction(other="1")) == 0.0


@pytest.mark.parametrize("metric, field", METRICS)
def test_an_example_without_the_label_is_an_error(metric, field: str) -> None:
    with pytest.raises(AttributeError):
        metric(dspy.Example(other="1"), dspy.Prediction({field: "1"}))


def test_a_label_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="no number"):
        last_number_matches(dspy.Example(answer="ten"), dspy.Prediction(answer="10"))
