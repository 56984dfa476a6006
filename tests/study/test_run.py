"""What a study does with training runs that it finds in its directory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.settings import Config
from leap_dist.storage import run_directory
from leap_dist.study import run as study_run
from leap_dist.study.plan import Plan, make
from leap_dist.study.spec import training_of


def planned(tasks: str, group: str) -> Plan:
    given = {"tasks": tasks, "workers": 1, "meta_updates": 2}
    return make(
        given=given, preset="smoke", arms=["leap", "none"], groups=[group], seeds=1, of_arms={}, test_steps=None
    )


class Studied:
    """A study in whose directory a finished run of `leap` was found, with other settings than the study's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path, plan: Plan, **others: Any) -> None:
        (cell,) = (cell for cell in plan.cells() if cell.arm == "leap")
        self.folder = training_of(out, cell.group, cell.seed, cell.arm)
        found = replace(plan.training(cell), **others)
        run_directory.prepare(self.folder, found)
        run_directory.write_summary(self.folder, {"state": "done", "tasks_wanted": found.total_tasks})
        self.trained: list[Config] = []
        self.labels: list[str] = []
        self.said: list[str] = []

        def train(config: Config, run: object, *, label: str) -> tuple[str, dict[str, object]]:
            self.trained.append(config)
            self.labels.append(label)
            return "done", {}

        monkeypatch.setattr(study_run.reporting, "train", train)
        monkeypatch.setattr(study_run, "_test", lambda *given: "done")
        monkeypatch.setattr(study_run.driver, "session", lambda config: nullcontext())
        monkeypatch.setattr(study_run.driver, "check_prerequisites", lambda config: None)
        self.outcome = study_run.run(plan, out, self.said.append)


def test_a_finished_run_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study = Studied(monkeypatch, tmp_path / "study", planned("atari", "pong"))
    assert (study.outcome, study.trained) == ("done", [])


def test_a_run_of_fewer_meta_updates_is_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study = Studied(monkeypatch, tmp_path / "study", planned("atari", "pong"), meta_updates=1)
    assert study.outcome == "done"
    assert [config.meta_updates for config in study.trained] == [2]
    assert study.labels == [f"study/{study.folder.relative_to(tmp_path / 'study')}"], (
        "runs of a study have names of their own"
    )


def test_a_run_of_more_meta_updates_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They cannot be taken back, and the other arms would have fewer."""
    study = Studied(monkeypatch, tmp_path / "study", planned("atari", "pong"), meta_updates=3)
    assert (study.outcome, study.trained) == ("failed", [])
    assert f"{study.folder} was begun with other settings: meta_updates: 3 -> 2" in study.said[0]


@pytest.mark.parametrize("finished", [True, False])
def test_defaults_that_have_changed_since_do_not_matter_where_the_tasks_do_not_use_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: bool
) -> None:
    """Studies of images were refused after the form of ε in the agents' optimizer had got another default."""
    plan = planned("omniglot", "2")
    agent = replace(Config().agent, epsilon_form="inside")
    study = Studied(monkeypatch, tmp_path / "study", plan, agent=agent, meta_updates=2 if finished else 1)
    assert study.outcome == "done", study.said
    assert [config.agent.epsilon_form for config in study.trained] == ([] if finished else ["inside"])


def test_a_setting_that_the_tasks_use_does_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    agent = replace(Config().agent, epsilon_form="inside")
    study = Studied(monkeypatch, tmp_path / "study", planned("atari", "pong"), agent=agent)
    assert study.outcome == "failed"
    assert "agent.epsilon_form: inside -> outside" in study.said[0]
