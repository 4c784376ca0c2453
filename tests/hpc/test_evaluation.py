"""Learning is measured honestly: against shuffled proteins, with an error that holds."""

import numpy as np
import pytest

from hpc.evaluation import summarise


def test_figures_are_ratios_of_sums() -> None:
    result = summarise([2.0, 6.0], [3.0, 9.0], [1.0, 1.0], [1, 3])
    assert result.loss == 2.0
    assert result.loss_shuffled == 3.0
    assert result.learned == 1.0
    assert result.learned_se == 0.0  # each protein gains exactly 1 a target
    assert result.accuracy == 0.5
    assert (result.proteins, result.targets) == (2, 4)


def test_the_standard_error_is_the_spread_over_repeated_samples() -> None:
    generator = np.random.default_rng(0)

    def sample() -> tuple[float, float]:
        targets = generator.integers(5, 60, 300)
        effects = generator.normal(0.4, 0.3, 300)  # a protein's residues share its effect
        real = generator.gamma(2.0, 1.0, 300) * targets
        result = summarise(real, real + effects * targets, targets * 0.1, targets)
        return result.learned, result.learned_se

    learned, errors = np.array([sample() for _ in range(400)]).T
    assert np.mean(learned) == pytest.approx(0.4, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(learned), rel=0.1)
