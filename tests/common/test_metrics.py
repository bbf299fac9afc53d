"""Metrics of answers, against values computed by hand."""

import pytest

from scaledown.common.metrics import exact_match, f1, match, normalize_answer


def test_normal_form():
    assert normalize_answer("  The Battle of\tHastings, (1066)! ") == "battle of hastings 1066"


@pytest.mark.parametrize(
    "prediction, answers, expected",
    [
        ("the Eiffel Tower.", ["Eiffel tower"], (1, 1, 1)),
        ("It is the Eiffel Tower", ["a bridge", "Eiffel Tower"], (0, 2 * 2 / 6, 1)),
        # Words count as often as they occur: 2 of 3 and 2 of 2.
        ("new new york", ["New New"], (0, 2 * 2 / 5, 1)),
        ("york york", ["new york"], (0, 2 * 1 / 4, 0)),
        ("", ["x"], (0, 0, 0)),
        ("the", ["a"], (1, 1, 1)),  # nothing is left of either
    ],
)
def test_against_hand_computed_values(prediction, answers, expected):
    assert (exact_match(prediction, answers), f1(prediction, answers), match(prediction, answers)) == pytest.approx(
        expected
    )
