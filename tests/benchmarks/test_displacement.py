"""Which part of a displacement changes an encoder's features, on displacements of which that is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from initialization_files import written
from protocol import config, contribution, grant, serve

from benchmarks import displacement
from leap_dist.nn.actor_critic import initialization

MANIFEST, START = initialization(4, 5)


def moved(shift: float) -> np.ndarray:
    """φ_0 with a change of all convolutions, and with all linear weights shifted."""
    end = START.copy()
    for name, part in MANIFEST.split(end).items():
        part += shift if name == displacement.LAYER else 0.001 * np.sign(part)
    return end


def test_the_parts_of_a_displacement_add_up() -> None:
    end = moved(-0.5)
    found = dict(displacement.parts(START, end, MANIFEST))
    assert np.array_equal(found["φ_0"], START)
    assert np.array_equal(found["φ"], end)
    steps = {name: vector - START for name, vector in found.items()}
    assert np.allclose(steps["only its convolutions"] + steps["only its linear layer"], steps["φ"], atol=1e-6)
    mean = "only the mean change of the linear weights"
    assert np.allclose(steps[mean] + steps["all but that"], steps["φ"], atol=1e-6)
    layer = {name: MANIFEST.split(step)[displacement.LAYER] for name, step in steps.items()}
    assert np.allclose(layer[mean], -0.5)
    assert np.allclose(layer["all but that"], 0, atol=1e-6)
    assert not layer["only its convolutions"].any()
    assert np.array_equal(np.sort(steps["shuffled"].round(4)), np.sort(steps["φ"].round(4)))


def test_a_shift_of_all_linear_weights_kills_the_units() -> None:
    seen = {"bright": torch.rand(8, 4, 84, 84, generator=torch.Generator().manual_seed(0))}
    dead = {name: float(displacement.cells(vector, seen)[0].split(",")[0])
            for name, vector in displacement.parts(START, moved(-0.5), MANIFEST)}  # fmt: skip
    assert dead["φ"] == dead["only the mean change of the linear weights"] == 1.0
    assert max(dead["φ_0"], dead["all but that"], dead["only its convolutions"]) < 0.6


def test_descent_goes_against_the_mean_of_the_clipped_contributions(tmp_path: Path) -> None:
    settings = config(mode="sync", meta__batch_size=2, meta_updates=2, meta__contribution_clip=1.0)
    server = serve(tmp_path / "run", settings)
    assert displacement.descent(tmp_path / "run", 3.0, 8) == {}
    leases = [grant(server, f"w{number}") for number in range(2)]
    size = server.snapshot()[1].size
    vectors = [np.eye(size, dtype=np.float32)[number] * (1 + 9 * number) for number in range(2)]
    for lease, vector in zip(leases, vectors, strict=True):
        assert server.push(contribution(lease, vector, seq=2)).durable
    server.tick()
    server.close()
    found = displacement.descent(tmp_path / "run", 3.0, size)
    for name, ratio in {"clipped": 5.5, "normalized": 1.0}.items():  # the second one was clipped at the median
        step = found[name]
        assert np.linalg.norm(step) == pytest.approx(3.0)
        assert step[1] / step[0] == pytest.approx(ratio)
        assert step[0] < 0


@pytest.mark.emulator
def test_the_table_has_a_row_for_each_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that a server has begun with another initialization than that of its seed, as if it had learned that."""
    written(tmp_path / "run", games=["pong"])
    monkeypatch.setattr(sys, "argv", ["displacement", str(tmp_path / "run")])
    displacement.main()
    out = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| ")][1:] == [
        f"| {name}" for name, _ in displacement.parts(START, START, MANIFEST)
    ]
    moves = MANIFEST.split(initialization(4, 3)[1] - initialization(4, 0)[1])[displacement.LAYER]
    assert f"linear.weight: mean change {moves.mean():+.2g}, mean absolute change {np.abs(moves).mean():.2g}" in out
    monkeypatch.setattr(sys, "argv", ["displacement", str(tmp_path)])
    with pytest.raises(SystemExit):
        displacement.main()
    assert "No such file" in capsys.readouterr().err
