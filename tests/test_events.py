"""Draining a stage."""

import pytest

from sv3d_fast.events import Progress, finish


def test_finish_returns_the_value_and_runs_every_step():
    seen = []

    def stage():
        for done in (1, 2, 3):
            seen.append((yield Progress("count", done, 3)))
        return "value"

    assert finish(stage()) == "value"
    assert seen == [None, None, None]


def test_finish_of_a_stage_without_steps():
    assert finish(x for x in ()) is None


def test_finish_lets_errors_through():
    def stage():
        yield Progress("count", 1, 2)
        raise ValueError("frames: expected more")

    with pytest.raises(ValueError, match="frames: expected more"):
        finish(stage())


def test_figures_are_not_shared():
    first, second = Progress("fit", 1, 2), Progress("fit", 2, 2)
    first.figures["loss"] = 1.0
    assert second.figures == {}
