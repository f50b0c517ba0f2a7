"""Reading what a metric returned: the run and the check before it use one reader."""

import dspy
import numpy
import pytest

from bt_ray.rollout.runner import NoScore, RowError, read_score, score_of


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, 1.0),
        (2, 2.0),
        (numpy.bool_(True), 1.0),
        (numpy.float32(0.5), 0.5),
        (numpy.int64(3), 3.0),
        (numpy.array(1), 1.0),
        (dspy.Prediction(score=numpy.bool_(False)), 0.0),
    ],
)
def test_scores(value, score):
    assert score_of(value) == read_score(value, ("a", 0)) == (score, None)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        ("1.0", "'1.0' of type str"),
        (float("inf"), "inf"),
        (numpy.array([1, 2]), "array([1, 2]) of type ndarray"),
        (dspy.Prediction(answer="x"), "None"),
    ],
)
def test_what_is_no_score_is_shown_and_costs_its_row(value, shown):
    with pytest.raises(NoScore) as error:
        score_of(value)
    assert str(error.value) == shown
    with pytest.raises(RowError) as row:
        read_score(value, ("a", 2))
    assert str(row.value) == f"the metric gave {shown} on example 'a', sample 2; return a finite number or a bool"
    assert row.value.kind == "metric"
