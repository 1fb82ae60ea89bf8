import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2mc_hf.progress import Progress

VALUES = st.floats(-1e3, 1e3)
TOTALS = st.integers(2, 1000)


def test_a_new_run_is_at_its_first_step() -> None:
    assert Progress().step == 0
    assert Progress().epoch == 0
    assert Progress().cosine(0.996, 1.0) == 0.996
    assert Progress().linear(256.0, 32.0, 10) == 256.0


def test_epochs_are_passes_over_the_images_and_may_be_broken() -> None:
    assert Progress(step=25, total_steps=100, steps_per_epoch=10).epoch == 2.5


@given(start=VALUES, end=VALUES, total=TOTALS)
def test_cosine_goes_from_start_at_the_first_step_to_end_at_the_last(start: float, end: float, total: int) -> None:
    assert Progress(0, total).cosine(start, end) == pytest.approx(start, rel=1e-12, abs=1e-9)
    assert Progress(total - 1, total).cosine(start, end) == end
    assert Progress(total + 7, total).cosine(start, end) == end


@given(start=VALUES, end=VALUES, total=TOTALS, fraction=st.floats(0, 1))
def test_cosine_is_half_a_period(start: float, end: float, total: int, fraction: float) -> None:
    step = round(fraction * (total - 1))
    expected = end + (start - end) * (1 + math.cos(math.pi * step / (total - 1))) / 2
    assert Progress(step, total).cosine(start, end) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_cosine_is_half_way_in_the_middle_and_steepest_there() -> None:
    values = [Progress(step, 101).cosine(0.0, 1.0) for step in range(101)]
    assert values[50] == pytest.approx(0.5)
    rises = [later - earlier for earlier, later in pairwise(values)]
    assert min(rises) > 0
    assert max(rises) == max(rises[49:51])


@given(start=VALUES, end=VALUES)
def test_a_run_of_one_step_is_at_the_start_of_a_cosine(start: float, end: float) -> None:
    assert Progress(0, 1).cosine(start, end) == pytest.approx(start, rel=1e-12, abs=1e-9)


@given(
    start=VALUES, end=VALUES, steps_per_epoch=st.integers(1, 50), epochs=st.integers(1, 20), fraction=st.floats(0, 1)
)
def test_linear_goes_from_start_to_end_over_the_epochs_and_stays(
    start: float, end: float, steps_per_epoch: int, epochs: int, fraction: float
) -> None:
    def value(step: int) -> float:
        return Progress(step, 10_000, steps_per_epoch).linear(start, end, epochs)

    last = steps_per_epoch * epochs
    step = round(fraction * last)
    assert value(0) == start
    assert value(step) == pytest.approx(start + (end - start) * step / last, rel=1e-9, abs=1e-9)
    assert value(last) == value(last + 13) == end


def test_linear_over_no_epochs_is_at_its_end_from_the_first_step() -> None:
    assert Progress(0, 100, 10).linear(256.0, 32.0, 0) == 32.0


def test_linear_over_half_an_epoch_counts_steps() -> None:
    assert Progress(2, 100, 10).linear(0.0, 1.0, 0.5) == pytest.approx(0.4)
    assert Progress(5, 100, 10).linear(0.0, 1.0, 0.5) == 1.0


def test_progress_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Progress().step = 1  # type: ignore[misc]
