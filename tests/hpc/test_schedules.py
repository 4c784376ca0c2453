"""Learning rates at the steps where they are known."""

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hpc.config import ScheduleConfig
from hpc.schedules import Schedule, Sum, in_steps, rate_at


def rates(**settings: Any) -> list[float]:
    config = ScheduleConfig(**settings)
    return [rate_at(step, config, peak=2.0, steps=14) for step in range(14)]


NAMES = ("constant", "linear", "cosine", "polynomial", "inverse-sqrt", "plateau")


@pytest.mark.parametrize("name", NAMES)
def test_warmup_rises_to_the_peak_and_never_starts_at_zero(name: str) -> None:
    rising = rates(name=name, warmup_steps=4)
    assert rising[:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(rate <= 2.0 for rate in rising[4:])


def test_linear_falls_evenly_to_the_final_ratio() -> None:
    falling = rates(name="linear", warmup_steps=4, final_ratio=0.5)
    assert falling[9] == pytest.approx(1.5)
    assert falling[13] == pytest.approx(2.0 - 0.9)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    falling = rates(name="cosine", warmup_steps=4)
    assert falling[9] == pytest.approx(1.0)
    assert falling[13] == pytest.approx(1 + math.cos(0.9 * math.pi))


def test_constant_stays() -> None:
    assert set(rates(name="constant", warmup_steps=4)[4:]) == {2.0}


def test_polynomial_of_power_one_half_falls_late_and_of_one_is_linear() -> None:
    falling = rates(name="polynomial", power=0.5, warmup_steps=4)
    assert falling[4] == 2.0
    assert falling[9] == pytest.approx(2.0 * math.sqrt(0.5))
    assert falling[13] == pytest.approx(2.0 * math.sqrt(0.1))
    assert rates(name="polynomial", warmup_steps=4) == rates(name="linear", warmup_steps=4)


def test_inverse_sqrt_falls_from_the_end_of_warmup() -> None:
    falling = rates(name="inverse-sqrt", warmup_steps=4)
    assert falling[4] == pytest.approx(2.0 * math.sqrt(4 / 5))
    assert falling[11] == pytest.approx(2.0 * math.sqrt(4 / 12))
    assert rates(name="inverse-sqrt")[8] == pytest.approx(2.0 / 3)


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_real_numbers_beyond_the_last_step(name: str) -> None:
    config = ScheduleConfig(name=name)  # type: ignore[arg-type]
    rate = rate_at(99, config, peak=2.0, steps=14)
    assert isinstance(rate, float)
    assert 0 <= rate <= 2


def test_warmup_in_epochs_becomes_steps() -> None:
    config = ScheduleConfig(warmup_epochs=0.5)
    assert in_steps(config, 1000 / 64) == ScheduleConfig(warmup_steps=8)  # 7.8 of them
    assert in_steps(ScheduleConfig(warmup_steps=3), 10.0) == ScheduleConfig(warmup_steps=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 5, "warmup_epochs": 1.0}, r"both set the warm-up: give one"),
        ({"name": "constant", "final_ratio": 0.1}, r"final_ratio = 0.1 does not apply.*linear"),
        ({"name": "linear", "power": 0.5}, r"power = 0.5 does not apply .*\"polynomial\""),
        ({"name": "cosine", "patience": 3}, r"patience = 3 does not apply .*\"plateau\""),
        (
            {"name": "plateau", "watch": "held-out", "window": 5},
            r"window = 5 does not apply to watch = 'held-out'.*\"training\"",
        ),
        ({"name": "plateau", "factor": 1.0}, r"factor = 1.0 is not between 0 and 1"),
        ({"name": "plateau", "patience": 0}, r"patience = 0"),
        ({"name": "polynomial", "power": 0.0}, r"power = 0.0 must be greater than 0"),
        ({"final_ratio": 1.5}, r"final_ratio = 1.5 is not in \[0, 1\]"),
        ({"warmup_epochs": -1.0}, r"warmup_epochs = -1.0 is negative"),
    ],
)
def test_what_would_be_ignored_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**settings)


def test_resolved_settings_are_accepted_again() -> None:
    for name in NAMES:
        config = ScheduleConfig(name=name)  # type: ignore[arg-type]
        assert ScheduleConfig(**dataclasses.asdict(config)) == config


def alone(values: Sequence[float]) -> list[float]:
    return list(values)


PLATEAU = ScheduleConfig(
    name="plateau", factor=0.5, patience=2, min_lr=0.2, window=2, warmup_steps=3
)


def plateau_rates(losses: Sequence[float], config: ScheduleConfig = PLATEAU) -> list[float]:
    """Rates of the steps with these training losses."""
    schedule = Schedule(config, peak=1.0, steps=100, start=10)
    used = []
    for step, loss in enumerate(losses):
        used.append(schedule.rate(10 + step))
        schedule.after_step(10 + step, torch.tensor(loss), alone)
    return used


def test_plateau_cuts_after_patience_and_not_below_the_minimum() -> None:
    """Windows of two after three steps of warm-up; the first sets the best."""
    warm = [1 / 3, 2 / 3, 1.0]
    flat = plateau_rates([9.0] * 3 + [2.0] * 16)
    assert flat[:3] == pytest.approx(warm)
    assert flat[3:] == [1.0] * 6 + [0.5] * 4 + [0.25] * 4 + [0.2] * 2
    falling = plateau_rates([9.0] * 3 + [2.0 - 0.1 * i for i in range(16)])
    assert falling[3:] == [1.0] * 16
    too_little = plateau_rates([9.0] * 3 + [2.0 - 1e-6 * i for i in range(16)])
    assert too_little == flat


def test_plateau_starts_its_patience_anew_when_the_loss_falls() -> None:
    losses = [2.0, 2.0, 2.1, 2.1, 1.5, 1.5, 1.6, 1.6, 1.7, 1.7, 1.0]
    assert plateau_rates([9.0] * 3 + losses)[3:] == [1.0] * 10 + [0.5]


def test_plateau_on_the_held_out_loss_sees_evaluations_only() -> None:
    config = ScheduleConfig(name="plateau", factor=0.5, patience=2, watch="held-out")
    schedule = Schedule(config, peak=1.0, steps=100, start=0)
    for applied in range(20):
        schedule.after_step(applied, torch.tensor(5.0), alone)
    assert schedule.rate(20) == 1.0
    for loss in (2.0, 2.0, 2.0):
        schedule.after_evaluation(20, loss)
    assert schedule.rate(20) == 0.5


def on_ranks(size: int, function: Callable[[int, Sum], Any]) -> list[Any]:
    """Run `function(rank, sum_over_ranks)` on threads that stand for ranks."""
    barrier, shares, results = threading.Barrier(size), [[0.0]] * size, [None] * size

    def run(rank: int) -> None:
        def sum_over_ranks(values: Sequence[float]) -> list[float]:
            shares[rank] = list(values)
            barrier.wait(timeout=30)
            total = [sum(column) for column in zip(*shares, strict=True)]
            barrier.wait(timeout=30)
            return total

        results[rank] = function(rank, sum_over_ranks)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_plateau_goes_on_exactly_whatever_the_stop_and_the_ranks() -> None:
    """Also in the middle of a window, where every rank holds a part of the sum."""
    config = ScheduleConfig(name="plateau", factor=0.5, patience=1, window=5)
    # Four micro-batches a step; the mean loss wavers, so that some windows are better.
    losses = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)) / 3

    def run(size: int, steps: range, saved: dict[str, Any] | None = None) -> dict[str, Any]:
        def on_rank(rank: int, sum_over_ranks: Sum) -> dict[str, Any]:
            schedule = Schedule(config, peak=1.0, steps=60, start=0)
            if saved is not None:
                schedule.load_state_dict(saved, rank)
            for step in steps:
                share = losses[step].double().view(size, -1)[rank].sum()
                schedule.after_step(step, share, sum_over_ranks)
            return schedule.state_dict(sum_over_ranks)

        first, *others = on_ranks(size, on_rank)
        assert all(other == first for other in others)
        return first

    straight = run(1, range(58))
    assert straight["plateau"]["scale"] < 0.1
    assert straight["plateau"]["steps"] == 3
    middle = json.loads(json.dumps(run(4, range(13))))
    assert run(2, range(0), middle) == middle
    assert run(2, range(13, 58), middle) == straight
