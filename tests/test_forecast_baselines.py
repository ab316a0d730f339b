"""Persistence, the mean of the context, and the linear autoregression."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuromamba.forecast import forecast_error
from neuromamba.forecast_baselines import (
    brain_series,
    context_mean,
    fit_autoregression,
    persistence,
    second_moments,
    squared_error,
)


def autoregressive(
    n: int, volumes: int, weights: list[float], seed: int, spread: float = 5
) -> torch.Tensor:
    """Series (voxel, volume) around means of their own, long after their start."""
    rng = np.random.default_rng(seed)
    x = np.zeros((n, volumes + 100))
    for t in range(len(weights), x.shape[1]):
        x[:, t] = rng.normal(size=n) + sum(w * x[:, t - 1 - k] for k, w in enumerate(weights))
    return torch.from_numpy(x[:, 100:] + spread * rng.normal(size=(n, 1)))


def test_errors_follow_from_the_second_moments() -> None:
    series, known = autoregressive(300, 7, [0.7], seed=0), 4
    x = series.numpy()
    past, future, mean = x[:, :known], x[:, known:], x[:, :known].mean(1, keepdims=True)
    moments = second_moments(series, known)
    found = squared_error(moments, persistence(known, 3))
    assert found == pytest.approx(((future - past[:, -1:]) ** 2).mean(0))
    found = squared_error(moments, context_mean(known, 3))
    assert found == pytest.approx(((future - mean) ** 2).mean(0))
    weights = np.random.default_rng(1).normal(size=(known, 3))
    forecast = past[:, ::-1] @ weights
    assert squared_error(moments, weights) == pytest.approx(((future - forecast) ** 2).mean(0))


@pytest.mark.parametrize("order", [0, 2, 5])
def test_the_autoregression_is_least_squares_on_the_last_volumes_and_the_mean(order: int) -> None:
    known = 6
    x = autoregressive(2000, 9, [0.6, -0.5], seed=1).numpy()
    past = x[:, :known][:, ::-1]
    read = np.column_stack([past[:, :order], past.mean(1)])
    expected = read @ np.linalg.lstsq(read, x[:, known:], rcond=None)[0]
    # Validation subjects whose future is what this order says.
    validation = torch.from_numpy(np.column_stack([x[:, :known], expected]))
    train = second_moments(torch.from_numpy(x), known)
    found = fit_autoregression(train, second_moments(validation, known), known)
    assert found.order == order
    assert past @ found.weights == pytest.approx(expected, abs=1e-8)
    assert found.validation[order] == pytest.approx(0, abs=1e-8)


def test_the_order_is_chosen_on_other_subjects() -> None:
    known = 8
    few = second_moments(autoregressive(15, 12, [0.9], seed=2), known)
    many = second_moments(autoregressive(4000, 12, [0.9], seed=3), known)
    found = fit_autoregression(few, many, known)
    assert found.order < known - 1, "fifteen voxels do not tell eight weights"
    assert found.order == int(np.argmin(found.validation))
    assert len(found.validation) == known
    expected = squared_error(many, found.weights).mean()
    assert found.validation[found.order] == pytest.approx(expected)


def test_it_holds_the_others_as_special_cases() -> None:
    walk = autoregressive(20_000, 8, [1.0], seed=4)
    noise = autoregressive(20_000, 8, [0.0], seed=5)
    centred, nothing = autoregressive(20_000, 8, [0.0], seed=5, spread=0), np.zeros((4, 4))
    pairs = (walk, persistence(4, 4)), (noise, context_mean(4, 4)), (centred, nothing)
    for series, best in pairs:
        moments = second_moments(series, 4)
        found = fit_autoregression(moments, moments, 4)
        error = squared_error(moments, best)
        assert squared_error(moments, found.weights) == pytest.approx(error, rel=0.05)
    # A steady process is forecast better than by any of them.
    moments = second_moments(autoregressive(20_000, 8, [0.8], seed=6, spread=0), 4)
    error = squared_error(moments, fit_autoregression(moments, moments, 4).weights)
    for other in (persistence(4, 4), context_mean(4, 4), nothing):
        assert (error < 0.99 * squared_error(moments, other)).all()


def test_of_one_known_volume_a_share_is_forecast() -> None:
    series = autoregressive(100, 3, [0.5], seed=7)
    moments = second_moments(series, 1)
    found = fit_autoregression(moments, moments, 1)
    x = series.numpy()
    assert found.order == 0
    assert found.weights[0] == pytest.approx(x[:, 0] @ x[:, 1:] / (x[:, 0] @ x[:, 0]))


def test_background_does_not_count() -> None:
    tokens = torch.randn(3, 4, 2 * 5)  # 2 volumes and 5 voxels a patch
    series = brain_series(tokens, 2)
    assert series.shape == (15, 8)
    assert torch.equal(series[7], tokens[1].reshape(8, 5)[:, 2])
    tokens.unflatten(-1, (2, 5))[1, :, :, 2] = 0
    assert torch.equal(brain_series(tokens, 2), series[[*range(7), *range(8, 15)]])
    forecast = tokens[:, 2:] + 3
    forecast.unflatten(-1, (2, 5))[1, :, :, 2] = 1000
    assert forecast_error(forecast, tokens, 2) == pytest.approx([9, 9], rel=1e-5)


def test_the_models_error_by_horizon() -> None:
    tokens, away = torch.randn(2, 5, 6), torch.tensor([1.0, 2.0, 3.0])[:, None]
    assert forecast_error(tokens[:, 2:] + away, tokens, 3) == pytest.approx([1, 4, 9], rel=1e-4)
