from __future__ import annotations

import pytest

from bt_ray.errors import ModelError
from bt_ray.lm.canary import MARGIN_NOISE, compare, tie_margin
from bt_ray.lm.types import CanaryCase

CASE = CanaryCase((1, 2), (10, 11, 12), (5.0, 0.0005, 3.0))
TIE = tie_margin("float32")


def test_equal_tokens_pass() -> None:
    assert compare(CASE, [10, 11, 12], TIE) is None


def test_clear_difference_names_position_and_tokens() -> None:
    found = compare(CASE, [99, 11, 12], TIE)
    assert found is not None and "token 0 is 99" in found and "gives 10" in found and "5" in found


def test_difference_at_a_tie_passes_and_ends_the_comparison() -> None:
    assert compare(CASE, [10, 7, 99], TIE) is None


def test_difference_at_a_tie_counts_where_the_dtype_is_finer() -> None:
    assert compare(CASE, [10, 7, 12], 1e-4) is not None


@pytest.mark.parametrize("answer", [[], [10], [10, 11]])
def test_short_answer_is_a_difference(answer: list[int]) -> None:
    assert compare(CASE, answer, TIE) is not None


def test_equal_tokens_with_other_margins_are_a_difference() -> None:
    # What an engine looks like that kept the weights before the swap.
    assert compare(CASE, [10, 11, 12], TIE, margins=[5.0, 0.0005, 2.5]) is not None
    assert compare(CASE, [10, 11, 12], TIE, margins=[5.0 + 0.9 * MARGIN_NOISE * TIE, 0.0005, 3.0]) is None


def test_margins_behind_a_tie_are_not_compared() -> None:
    assert compare(CASE, [10, 7, 12], TIE, margins=[5.0, 0.0, 99.0]) is None


def test_coarser_dtypes_have_wider_ties() -> None:
    assert tie_margin("float32") == 1e-3 < tie_margin("float16") < tie_margin("bfloat16") == 0.25
    with pytest.raises(ModelError, match="float8"):
        tie_margin("float8")
