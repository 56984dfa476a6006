"""The trial of this machine's speed before a run."""

from __future__ import annotations

import itertools

import pytest
import torch

from leap_dist.config.loading import resolve
from leap_dist.worker import trial


@pytest.mark.emulator
def test_a_trial_counts_the_steps_of_whole_updates_and_leaves_torch_as_it_was(monkeypatch):
    ticks = itertools.count()
    clock = lambda: next(ticks) / 4  # noqa: E731
    config = resolve("smoke", {"worker.threads": 1, "worker.device": "cpu"})
    threads = torch.get_num_threads()
    rate = trial.steps_per_second(config, seconds=0.5, clock=clock)
    updates, seconds = 2, 0.75  # the clock is read at the start, after each update, and at the end
    assert rate == updates * config.steps_per_update / seconds
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("overrides", [{"worker.device": "cuda"}, {"worker.gpus": 0.5}])
def test_a_trial_says_nothing_about_a_gpu(monkeypatch, overrides):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert trial.steps_per_second(resolve("quick", overrides)) is None


def test_a_trial_says_nothing_about_images():
    assert trial.steps_per_second(resolve("quick", {"tasks": "omniglot"})) is None
