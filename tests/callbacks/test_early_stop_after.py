"""An early stop that waits for so many validations first, as CLAM's: 20 without a better one, after the 50th."""

from __future__ import annotations

import torch

from medclip.callbacks.best import EarlyStop


def ends(stop: EarlyStop, values: list[float]) -> int | None:
    """Number of the validation, from 1, after which the run ends."""
    for number, value in enumerate(values, 1):
        if stop._evaluate_stopping_criteria(torch.tensor(value))[0]:
            return number
    return None


def test_patience_runs_out_but_not_before() -> None:
    values = [1.0] + [2.0] * 20
    assert ends(EarlyStop("val/loss", "min", patience=3), values) == 4
    assert ends(EarlyStop("val/loss", "min", patience=3, after=10), values) == 11
    assert ends(EarlyStop("val/loss", "min", patience=3, after=10), [1.0, *[2.0] * 9, 0.5, *[2.0] * 9]) == 14
    assert ends(EarlyStop("val/loss", "min", patience=3, after=30), values) is None


def test_what_is_no_number_ends_a_run_at_once() -> None:
    assert ends(EarlyStop("val/loss", "min", patience=3, after=10), [1.0, 2.0, float("nan")]) == 3


def test_a_resumed_run_has_counted_on() -> None:
    first, again = (EarlyStop("val/loss", "min", patience=3, after=10) for _ in range(2))
    assert ends(first, [1.0] + [2.0] * 7) is None
    again.load_state_dict(first.state_dict())
    assert ends(again, [2.0] * 9) == 3
