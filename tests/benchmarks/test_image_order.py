"""The comparison of orders of images: what it trains, and what it finds in errors that were made up."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import image_order
from benchmarks.image_order import EPOCH, UPDATES, familiarity, learn, regression, swap, text, trace
from leap_dist.config.loading import resolve
from leap_dist.datasets import omniglot
from leap_dist.tasks.images import family


def test_errors_that_rise_within_an_epoch_leave_a_trace_and_a_trend_does_not() -> None:
    position = np.arange(UPDATES) % EPOCH
    rising = np.where(position < 5, 80.0, 83.0)
    falling = np.linspace(95, 60, UPDATES)
    assert trace(np.array([rising, falling, rising + falling])) == pytest.approx([3, 0, 3], abs=1e-9)


def test_classes_are_familiar_that_came_more_often_than_others_not_long_ago() -> None:
    found = familiarity(np.array([[0, 0], [0, 1], [1, 1], [0, 0]]))
    first = np.exp(-1 / 5)
    assert found == pytest.approx([0, 0, -first, first**2 - 1])


def test_the_slope_is_found_beside_a_trend_and_the_shape_of_an_epoch() -> None:
    rng = np.random.default_rng(0)
    covariate = rng.normal(size=(10, UPDATES))
    shape = rng.normal(size=EPOCH)[np.arange(UPDATES) % EPOCH] + np.linspace(1, -1, UPDATES) ** 3
    slope, error = regression(shape - 7 * covariate, covariate)
    assert slope == pytest.approx(-7)
    assert error == pytest.approx(0, abs=1e-9)
    _, error = regression(shape - 7 * covariate + rng.normal(size=(10, UPDATES)), covariate)
    assert error == pytest.approx(1 / 660**0.5, rel=0.1), "ten times 85 batches, less 19 means and powers"


def test_a_mean_has_its_standard_error_over_alphabets() -> None:
    assert text(np.array([-1.0, -3.0])) == "−2.00 ± 1.00"


def test_only_the_order_differs_between_the_networks_that_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    shapes = (rng.random((2, 20, 20, 28, 28)) < 0.1).astype(np.uint8) * 255
    monkeypatch.setattr(family, "_omniglot", lambda *_: omniglot.Omniglot({"Greek": shapes[0], "Latin": shapes[1]}))
    monkeypatch.setattr(image_order, "BLOCKS", {"2 to 3": slice(1, 3)})
    config = resolve("authors", {"tasks": "omniglot", "games": "greek,latin", "meta_learner": "none"})
    for updates, differs in ((3, False), (16, True)):  # an epoch has 15 batches
        monkeypatch.setattr(image_order, "UPDATES", updates)
        epoch, task = (learn(config, None, [0], order) for order in image_order.ORDERS)
        assert epoch.errors.shape == (2, updates)
        assert np.array_equal(epoch.losses[:, :3], task.losses[:, :3]) != differs
    swap(config, None, [0], None)
    rows = capsys.readouterr().out.splitlines()
    one, other = (learned.errors[:, 1:3].mean(1) for learned in (epoch, task))
    assert rows[2].startswith(f"| 2 to 3 | {one.mean():.1f} | {other.mean():.1f} | {text(one - other)} |")
