"""Studies of Atari games: their plan, what they cost, and figure 4 from whatever is there."""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import no_ray  # noqa: F401

from leap_dist.cli import plan as printed
from leap_dist.cli.main import main
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.envs.games import SETS
from leap_dist.evaluation.runs import Run, RunResult, save
from leap_dist.study import run as study_run
from leap_dist.study.games import FIGURE_4
from leap_dist.study.plan import Plan, make, merge
from leap_dist.study.report import build
from leap_dist.study.spec import Study, evaluation_of, training_of
from leap_dist.worker import trial

FEW = 20  # bootstrap samples


def planned(**changes: Any) -> Plan:
    given = {"tasks": "atari", **changes.pop("given", {})}
    settings = {"preset": "figure4", "arms": [], "groups": [], "seeds": 1, "of_arms": {}, "test_steps": None}
    return make(given=given, **{**settings, **changes})


def test_by_default_a_study_is_figure_4_of_the_paper() -> None:
    plan = planned()
    assert (plan.study.arms, plan.study.groups) == (("leap", "none"), ("seed24",))
    assert plan.study.settings["leap"]["mode"] == "sync"
    training, test = plan.training(next(plan.cells())), plan.test("seed24", 0)
    assert training.games == SETS["seed24"]
    assert (training.meta_updates, training.meta.batch_size, training.task_steps) == (100, 16, 1_000_000)
    assert test.games == tuple(FIGURE_4)
    assert plan.game_steps == FIGURE_4
    assert set(test.games) & set(training.games) == {"pong"}


@pytest.mark.parametrize(
    ("changes", "games", "lengths"),
    [
        ({"game_steps": {"pong": 80_000}}, tuple(FIGURE_4), {**FIGURE_4, "pong": 80_000}),
        ({"test_steps": 70_000}, tuple(FIGURE_4), {}),
        ({"given": {"games": "qbert,pong"}}, ("qbert", "pong"), {"pong": FIGURE_4["pong"]}),
        ({"preset": "smoke", "given": {"games": "qbert"}, "game_steps": {"qbert": 800}}, ("qbert",), {"qbert": 800}),
        ({"preset": "quick", "given": {"games": "breakout"}}, ("breakout",), {}),
    ],
)
def test_games_and_lengths_are_the_papers_or_the_users(
    changes: dict[str, Any], games: tuple[str, ...], lengths: dict[str, int]
) -> None:
    plan = planned(**changes)
    assert plan.test("seed24", 0).games == games
    assert plan.game_steps == lengths


def test_the_cost_is_the_sum_over_trainings_and_agents() -> None:
    plan = planned(arms=["leap", "finetune-multi", "none"], seeds=2, test_seeds=5)
    assert plan.cost.training == 2 * 2 * 100 * 16 * 1_000_000
    assert plan.cost.testing == 3 * 2 * 5 * sum(FIGURE_4.values())
    assert planned(given={"task_steps": 5_000_000}).cost.training == 100 * 16 * 5_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groups": ["seed42"]},
            "groups: 'seed42' is neither one of the sets seed24, camera25, moving4 nor a game.*seed24",
        ),
        ({"groups": ["../x"]}, "groups: '../x' is neither"),
        ({"game_steps": {"pnog": 800}}, "game_steps: 'pnog' is not one of the games space_invaders, .*pong"),
        ({"given": {"games": "pnog"}}, "games: no game 'pnog'"),
        ({"test_steps": 10}, "test_steps: 10 is less than"),
        (
            {"game_steps": {"pong": 10**32}},
            "game_steps: pong=10{32} is too large; the largest valid value is 1,000,000,000,000$",
        ),
        ({"test_seeds": 0}, "test_seeds: 0 is not between 1 and 1,000"),
        ({"test_seeds": 10**8}, "test_seeds: 100,000,000 is not between 1 and 1,000"),
        ({"game_steps": {"pong": 319}}, "game_steps: pong=319 is less than two updates of 160 steps"),
    ],
)
def test_a_mistake_is_answered_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        planned(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"game_steps": {"pong": 800}}, {"test_seeds": 2}])
def test_images_have_no_lengths_by_game_and_one_run_each(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="only for atari"):
        planned(preset="paper", given={"tasks": "omniglot"}, **changes)


def test_the_same_command_continues_a_study_and_another_one_is_refused(tmp_path: Path) -> None:
    first = planned(test_seeds=2, game_steps={"pong": 80_000})
    first.study.write(tmp_path)
    old = Study.read(tmp_path)
    again = planned(test_seeds=2, game_steps={"pong": 80_000}, existing=old)
    assert merge(old, again.study) == old
    assert again.training(next(again.cells())) == first.training(next(first.cells()))
    assert again.test("seed24", 0) == first.test("seed24", 0)
    for changes, field in [
        ({"test_seeds": 3}, "test_seeds"),
        ({"game_steps": {"pong": 90_000}}, "game_steps"),
        ({"given": {"games": "pong"}}, "games"),
        ({"test_seeds": 2, "game_steps": {"pong": 80_000}, "given": {"agent.unroll": 6}}, "agent.unroll"),
    ]:
        with pytest.raises(ConfigError, match=f"^{field}: the study there has"):
            merge(old, planned(existing=old, **changes).study)
    assert merge(old, planned(existing=old).study) == old, "what is not given is as before"
    more = planned(test_seeds=2, game_steps={"pong": 80_000}, arms=["leap", "reptile", "none"], existing=old)
    assert merge(old, more.study).arms == ("leap", "reptile", "none")


@pytest.mark.parametrize(("rate", "days"), [(1_000.0, True), (1e9, False)])
def test_what_takes_more_than_a_day_needs_a_yes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rate: float, days: bool
) -> None:
    monkeypatch.setattr(trial, "steps_per_second", lambda config: rate)
    rows, seconds = printed.study(planned(given={"workers": 2, "worker.cpus": 0.1}), tmp_path)
    lines = dict(rows)
    assert lines["train"] == "1 initialization: 1,600,000,000 agent steps in all"
    assert lines["test"] == "12 agents, 8,000,000 to 30,000,000 agent steps each: 276,000,000 in all"
    assert (seconds > 86_400) is days
    assert "19 hours on 1 machine, 2.3 hours on 8 machines with 16 virtual cores and an H100" in lines["with GPUs"]


def test_what_is_done_already_takes_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A study of which less than a day is left needs no second yes."""
    monkeypatch.setattr(trial, "steps_per_second", lambda config: 1_000.0)
    plan = planned(given={"workers": 2, "worker.cpus": 0.1}, seeds=1, test_seeds=2)
    _, before = printed.study(plan, tmp_path)
    test = evaluation_of(tmp_path, "seed24", 0)
    for agent in (0, 1):
        save(test, result("none", "pong", agent, FIGURE_4["pong"], 0.0), {})
    training = training_of(tmp_path, "seed24", 0, "leap")
    training.mkdir()
    (training / "summary.json").write_text(json.dumps({"state": "died", "tasks": 900, "tasks_wanted": 1600}))
    rows, seconds = printed.study(plan, tmp_path)
    done = 2 * 8_000_000 + 900 * 1_000_000
    assert dict(rows)["done"] == f"{done:,} of 2,152,000,000 agent steps"
    assert seconds == pytest.approx(before * (1 - done / 2_152_000_000))
    assert dict(rows)["with GPUs"].startswith("about 12 hours on 1 machine")


def test_the_rate_of_this_machine_says_nothing_about_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trial, "steps_per_second", lambda config: 1_000.0)
    rows, seconds = printed.study(planned(given={"address": "10.0.0.1:6379"}), tmp_path)
    assert dict(rows)["duration"] == "unknown"
    assert seconds == pytest.approx((1_600_000_000 + 276_000_000) / 27_900)


@pytest.mark.parametrize("said", [(), ("--yes",)])
def test_yes_starts_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial, "steps_per_second", lambda config: 1_000.0)
    started: list[Any] = []
    monkeypatch.setattr(study_run, "run", lambda *given: started.append(given) or "interrupted")
    try:
        code: Any = main(["study", "--tasks", "atari", "--preset", "figure4", "--out", str(tmp_path / "f4"), *said])
    except SystemExit as error:
        code = error.code
    assert (len(started), code) == ((1, 130) if said else (0, 2))


def test_where_no_trial_is_possible_the_measured_machine_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trial, "steps_per_second", lambda config: None)
    rows, seconds = printed.study(planned(), tmp_path)
    assert dict(rows)["duration"] == "unknown"
    assert seconds == pytest.approx((1_600_000_000 + 276_000_000) / 27_900)


def test_the_command_asks_for_the_yes_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial, "steps_per_second", lambda config: 1_000.0)
    out = tmp_path / "f4"
    with pytest.raises(SystemExit) as caught:
        main(["study", "--tasks", "atari", "--preset", "figure4", "--out", str(out)])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "276,000,000" not in said.out, "three seeds are the default"
    assert "828,000,000 in all" in said.out
    assert said.err.endswith("error: yes: this study takes more than a day on this machine; add --yes to start it\n")
    assert not out.exists()


# The report -------------------------------------------------------------------------------------------------------


def result(arm: str, game: str, seed: int, steps: int, level: float) -> RunResult:
    ended = np.arange(1, 101) * steps // 100
    returns = level + np.linspace(0, 10, 100) + np.random.default_rng([seed, *game.encode()]).normal(size=100)
    return RunResult(arm, game, seed, steps, 1.0, ended, returns, ({"steps": steps, "loss": 1.0},))


def write(out: Path, groups: tuple[str, ...] = ("seed24",)) -> Study:
    plan = planned(groups=list(groups), seeds=2, test_seeds=2, given={"games": "pong,breakout"})
    plan.study.write(out)
    for group in groups:
        for seed in (0, 1):
            for arm in plan.study.arms:
                for game in ("pong", "breakout"):
                    for agent in (2 * seed, 2 * seed + 1):
                        one = result(arm, game, agent, FIGURE_4[game], 3.0 if arm == "leap" else 0.0)
                        save(evaluation_of(out, group, seed), one, {})
    return plan.study


def test_figure_4_and_the_table_come_from_whatever_is_there(tmp_path: Path) -> None:
    write(tmp_path)
    assert build(tmp_path, FEW) == []
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "figure4.png", "profiles.png", "aggregates.png", "improvement.png",
    }  # fmt: skip
    text = (tmp_path / "table.md").read_text()
    for part in (
        "## Trained on seed24", "figures/figure4.png", "8,000,000 to 20,000,000", "figures/improvement.png",
        "## Settings of each arm", "| leap | meta_learner leap, meta.optimizer adam |",
        "draw seeds of the meta-training with replacement",
    ):  # fmt: skip
        assert part in text
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {(row["group"], row["seed"], row["agent_seed"]) for row in rows} == {
        ("seed24", "0", "0"), ("seed24", "0", "1"), ("seed24", "1", "2"), ("seed24", "1", "3"),
    }  # fmt: skip
    numbers = json.loads((tmp_path / "results.json").read_text())["groups"]["seed24"]
    assert numbers["baseline"] == "none"
    assert numbers["against"]["leap"]["pairs"] == 8
    assert numbers["against"]["leap"]["improvement"]["auc"]["point"] > 0.9


def test_runs_that_the_study_plans_and_that_are_not_there_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    (evaluation_of(tmp_path, "seed24", 0) / "runs" / "leap" / "pong" / "1.json").unlink()
    first, *others = build(tmp_path, FEW)
    assert first == "seed24/seed0/test: incomplete: 1 of 8 runs are missing: leap/pong"
    assert "incomplete: missing runs (1): leap/pong seed 1" in others
    shutil.rmtree(evaluation_of(tmp_path, "seed24", 1))
    warnings = build(tmp_path, FEW)
    assert warnings[1] == (
        "seed24/seed1/test: incomplete: 8 of 8 runs are missing: leap/pong (2), leap/breakout (2), none/pong (2), "
        "none/breakout (2)"
    )


def test_no_two_agents_of_a_study_share_their_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs of a random initialization depend on the agent's seed alone: copies would count as independent."""
    plan = planned(
        preset="smoke", arms=["none"], groups=["pong"], seeds=3, test_seeds=5,
        given={"games": "pong,breakout", "workers": 1}, game_steps={"pong": 80},
    )  # fmt: skip
    made: list[tuple[str, int, int]] = []

    def perform(config: Config, runs: list[Run], out: Path, **named: object) -> str:
        made.extend((run.game, run.seed, run.steps) for run in runs)
        return "done"

    monkeypatch.setattr(study_run.reporting, "evaluate", perform)
    monkeypatch.setattr(study_run.driver, "session", lambda config: nullcontext())
    assert study_run.run(plan, tmp_path / "study", lambda text: None) == "done"
    assert sorted(seed for game, seed, _ in made if game == "pong") == list(range(15))
    assert {(game, steps) for game, _, steps in made} == {("pong", 80), ("breakout", 400)}


def test_a_group_more_has_pictures_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, ("seed24", "pong"))
    build(tmp_path, FEW)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"seed24-figure4.png", "pong-figure4.png"} <= names
    assert "figure4.png" not in names
    assert "## Trained on pong" in (tmp_path / "table.md").read_text()


def test_a_study_without_results_has_no_report(tmp_path: Path) -> None:
    planned().study.write(tmp_path)
    with pytest.raises(ConfigError, match="holds no results of the study yet"):
        build(tmp_path, FEW)


def test_arms_of_other_kinds_are_left_out_with_a_word(tmp_path: Path) -> None:
    write(tmp_path)
    save(evaluation_of(tmp_path, "seed24", 0), result("rival", "pong", 0, 8_000_000, 9.0), {})
    (warning,) = build(tmp_path, FEW)
    assert warning == "seed24/seed0/test: left out, because the study does not name them: rival"
