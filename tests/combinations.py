"""Combinations of parameters, of which the fast tests try some: every value, and every pair that behaves otherwise."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def combinations(*values: Iterable[Any], fast: Iterable[tuple]) -> list:
    """All combinations, for `pytest.mark.parametrize`; those that `fast` does not hold are slow."""
    everything, fast = list(itertools.product(*values)), list(fast)
    unknown = [chosen for chosen in fast if chosen not in everything]
    assert not unknown, unknown
    return [pytest.param(*chosen, marks=[] if chosen in fast else pytest.mark.slow) for chosen in everything]
