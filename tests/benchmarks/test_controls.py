"""The initializations that a learned one is compared with: φ_0, as it was and with features of the learned norm."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import controls
from benchmarks.encoder_features import frames
from leap_dist.config.loading import resolve, to_yaml
from leap_dist.evaluation import initializations
from leap_dist.nn.flat_vector import flatten
from leap_dist.storage.atomic import pack
from leap_dist.tasks.task import family_of
from leap_dist.weights.initialization import load_encoder, read_initialization


def run_directory(folder: Path, learned: np.ndarray, **settings: object) -> Path:
    """Write what a run leaves behind that has learned the flat vector `learned`."""
    config = resolve("smoke", {"games": ["pong", "breakout"], "seed": 5, **settings})
    family = family_of(config)
    header = {
        "version": 7, "tasks": "atari", "preset": "smoke", "meta_learner": "leap", "shared": config.scope,
        "mode": "sync", "games": list(config.games), "task_steps": 100, "agent_steps": 2800,
        "preprocessing": family.preprocessing(config),
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "manifest.json").write_text("{}")
    manifest, _ = family.initialization(config, config.seed, config.scope)
    (folder / "init.safetensors").write_bytes(pack(manifest.split(learned), header))
    return folder


@pytest.mark.emulator
def test_the_controls_are_the_start_and_the_start_with_the_learned_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve("smoke", {"seed": 5})
    _, first = family_of(config).initialization(config, 5, "encoder")
    learned = 0.7 * first
    run = run_directory(tmp_path / "run", learned)
    monkeypatch.setattr(sys, "argv", ["controls", str(run), "--out", str(tmp_path / "controls")])
    controls.main()
    start, scaled = (load_encoder(tmp_path / "controls" / f"{name}.safetensors") for name in ("start", "scaled"))
    assert np.array_equal(flatten(start.parameters()).numpy(), first)
    seen = frames(["pong", "breakout"])
    norms = {
        name: controls.feature_norm(encoder, seen)
        for name, encoder in (("learned", load_encoder(run / "init.safetensors")), ("start", start), ("scaled", scaled))
    }
    assert norms["learned"] < 0.5 * norms["start"]
    assert norms["scaled"] == pytest.approx(norms["learned"], rel=1e-4)
    for name, parameter in start.named_parameters():
        same = np.array_equal(parameter.detach().numpy(), dict(scaled.named_parameters())[name].detach().numpy())
        assert same == (not name.startswith("linear.w")), name  # biases are zero at the start
    assert f"was multiplied by {norms['learned'] / norms['start']:.3g}" in capsys.readouterr().out

    labels, files = initializations.read([str(tmp_path / "controls" / "scaled.safetensors")])
    (arm,) = initializations.arms(labels, files, config)
    assert (arm.label, arm.metadata["meta_learner"], arm.metadata["version"]) == ("scaled", "none", 0)
    assert initializations.notes([arm], config) == [], "it was not trained on any game"
    assert read_initialization(run / "init.safetensors").metadata["version"] == 7


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"meta.shared": "convolutions"}, "φ is not an encoder of four gray frames of Atari games"),
        ({"atari.frames": "rgb1"}, "φ is not an encoder of four gray frames of Atari games"),
        (None, "init.safetensors"),
    ],
)
def test_what_has_no_controls_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, str] | None,
    wrong: str,
) -> None:
    if settings is not None:
        config = resolve("smoke", settings)
        run_directory(tmp_path / "run", family_of(config).initialization(config, 5, config.scope)[1], **settings)
    monkeypatch.setattr(sys, "argv", ["controls", str(tmp_path / "run"), "--out", str(tmp_path / "controls")])
    with pytest.raises(SystemExit) as ended:
        controls.main()
    assert ended.value.code == 2
    assert wrong in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "controls").exists()
