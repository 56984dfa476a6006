"""benchmarks.supervised: that its arms compute the same thing, and that it runs."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import supervised
from leap_dist.nn.flat_vector import flatten

UPDATES = 4


def test_the_authors_loop_computes_what_ours_does():
    """The same batches from the same start: losses, parameters and, in the length metric, the meta-gradient."""
    images, start = supervised.data(0), supervised.start()
    authors = supervised.AuthorsLoop(images, start)
    learner = supervised.learner_of("float32")
    watch = supervised.watcher(learner)
    batches = supervised.prepared(images)

    def take(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = batches.pop(0)
        return (255 * pixels).round().to(torch.uint8), labels

    learner._train.take = take
    losses = []
    for _ in range(UPDATES):
        authors.step()
        losses.append(learner.backward())
        watch.observe(losses[-1])
        learner.step()
    np.testing.assert_allclose(authors.losses, [loss.item() for loss in losses], rtol=1e-3)
    np.testing.assert_allclose(authors.errors, learner.curve().errors, atol=1e-6)
    watch.finish()
    theirs, found = flatten(authors.pulls.values()).numpy(), watch.report()[0].numpy()
    assert np.linalg.norm(theirs - found) < 0.03 * np.linalg.norm(found)
    moved = flatten(authors.model.parameters()) - flatten(learner.shared.values())
    assert moved.norm() < 0.03 * (flatten(learner.shared.values()) - torch.from_numpy(start)).norm()


@pytest.mark.parametrize("arguments", [pytest.param([], marks=pytest.mark.slow), ["--stacked", "2"]])
def test_it_runs(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["supervised", "--repeats", "1", "--updates", "2", "--json", *arguments])
    monkeypatch.setattr(supervised, "prepare", lambda *_: None)
    monkeypatch.setattr(supervised, "WARM_UP", 1)
    supervised.main()
    report = json.loads(capsys.readouterr().out)
    assert all(figure["median"] > 0 for figure in report["figures"].values())
    assert len(report["ratios"]) == (1 if arguments else 8)
