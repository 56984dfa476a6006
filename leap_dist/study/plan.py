"""The plan of a study: from the settings of a command to the configuration of every run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import ALPHABETS, HELD_OUT, normalize
from leap_dist.config.settings import Config
from leap_dist.study import games
from leap_dist.study.arms import DEFAULT_ARMS
from leap_dist.study.games import Cost, Tests
from leap_dist.study.spec import ARMS, Study, agents_done, progress_of, training_of

DEFAULT_GROUPS = ("4", "10", "20")
MOST = len(ALPHABETS) - HELD_OUT - 1
"""Maximum number of pretraining alphabets."""
_CELL_SETTINGS = {"games", "seed", "supervised.pretraining"}
"""Settings that differ between cells."""
_LEARNERS = {"atari": ("agent", "atari"), "omniglot": ("supervised",), "multi-cv": ("supervised",)}
"""Sections with the settings of the learners, by kind of task."""
_OF_META_TRAINING = ("meta", "leap", "early_stopping")
"""Prefixes of the names of settings that evaluations do not use."""
_TESTS, _NEW_ARM = "its tests", "an arm that is added"
_CHANGEABLE = ("worker.precision", "worker.wire", "server.on_lost")
"""Settings that may be changed when a run is resumed, and that affect its results."""
_OF_TESTS = ("games", "game_steps", "seeds")
"""Names under which a study of games records its `Tests`, which are not settings of the tests' learners."""
_COMMON = {
    "tasks", "games", "seed", "meta_learner", "meta_updates", "meta.batch_size", "task_steps", "data_dir",
    "supervised.pretraining",
}  # fmt: skip
"""Settings that must be equal for all arms: arms are compared on the same tasks with the same budget."""


class Cell(NamedTuple):
    """One training run."""

    group: str
    seed: int
    arm: str

    def __str__(self) -> str:
        return f"{self.arm}, group {self.group}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study, and the settings of its runs."""

    study: Study
    preset: str
    """Preset that all settings start from."""
    recorded: Mapping[str, Mapping[str, Any]]
    """Settings of the study that is continued, by dotted name and by arm, _TESTS or _NEW_ARM; see `_recorded`."""
    given: Mapping[str, Any]
    """Settings of all arms, by dotted name."""
    of_arms: Mapping[str, Mapping[str, Any]]
    """Settings of individual arms, which take precedence, by arm and dotted name."""
    test_steps: int
    """Number of examples or agent steps that a run of an evaluation trains on."""
    tests: Tests | None = None
    """Games to test on, with their lengths; None for images."""

    @property
    def test_seeds(self) -> int:
        """Number of runs in an evaluation for each initialization and task."""
        return self.tests.seeds if self.tests else 1

    @property
    def game_steps(self) -> Mapping[str, int]:
        """Lengths of the runs of individual games in an evaluation."""
        return self.tests.game_steps if self.tests else {}

    @property
    def cost(self) -> Cost:
        """Agent steps of the whole study."""
        study = self.study
        comparisons = len(study.seeds) * len(study.groups)
        trainings = len([arm for arm in study.arms if arm != "none"]) * comparisons
        played = self.tests.games if self.tests else ()
        each = comparisons * len(study.arms) * self.test_seeds  # agents for each game
        return Cost(
            trainings,
            trainings * study.meta_updates * study.batch_size * study.task_steps,
            each * len(played),
            each * sum(self.game_steps.get(game, self.test_steps) for game in played),
        )

    def steps_done(self, out: Path) -> int:
        """Return the agent steps of all ended tasks and finished agents in the study's folder."""
        steps = 0
        for cell in self.cells():
            if cell.arm != "none":
                training = training_of(out, cell.group, cell.seed, cell.arm)
                steps += int(progress_of(training)["done"]) * self.training(cell).steps_of_task
            for game in self.tests.games if self.tests else ():
                agents = agents_done(out, cell.group, cell.seed, cell.arm, game)
                steps += agents * self.game_steps.get(game, self.test_steps)
        return steps

    def cells(self) -> Iterator[Cell]:
        """Yield all cells, seed by seed, so that a study that ends early can still compare all arms."""
        for seed in self.study.seeds:
            for group in self.study.groups:
                for arm in self.study.arms:
                    yield Cell(group, seed, arm)

    def training(self, cell: Cell) -> Config:
        """Return the configuration of a training run. Raises ConfigError.

        A run that is validated on the way has the learning rate of its tests in `supervised.test_learning_rate`.
        """
        settings = {**self.given, **self.of_arms.get(cell.arm, {}), "meta_learner": cell.arm, "seed": cell.seed}
        before = self.recorded.get(cell.arm, self.recorded.get(_NEW_ARM, {}))
        config = configuration.resolve(self.preset, before, settings, self._training_games(cell.group))
        own = config.supervised
        if not config.early_stopping.interval or own.test_learning_rate:
            return config
        if self.recorded.get(cell.arm, {}).get("supervised.test_learning_rate") == 0:
            return config  # it was begun like that, perhaps by a version that validated with the rate of training
        shared = self.test(cell.group, cell.seed).supervised.learning_rate
        if shared == own.learning_rate:
            return config
        return dataclasses.replace(config, supervised=dataclasses.replace(own, test_learning_rate=shared))

    def test(self, group: str, seed: int) -> Config:
        """Return the configuration of an evaluation, which is the same for all arms. Raises ConfigError."""
        held_out: dict[str, Any] = {"games": ("held_out",) if self.study.tasks == "omniglot" else (group,)}
        if self.tests:
            held_out = {"games": self.tests.games}
        fixed = {"meta_learner": "none", "mode": "buffered", "seed": seed, "task_steps": self.test_steps}
        learning = {name: value for name, value in self.given.items() if not name.startswith(_OF_META_TRAINING)}
        config = configuration.resolve(self.preset, self.recorded.get(_TESTS, {}), learning, fixed, held_out)
        return dataclasses.replace(config, supervised=config.supervised.in_tests())

    def everything(self) -> Config:
        """Return a configuration with the tasks of all runs. Raises ConfigError."""
        runs = [self.training(cell) for cell in self.cells()]
        runs += [self.test(group, seed) for group in self.study.groups for seed in self.study.seeds]
        games = dict.fromkeys(name for config in runs for name in config.games)
        return dataclasses.replace(runs[0], games=tuple(games))

    def _training_games(self, group: str) -> dict[str, Any]:
        """Return the settings for the training tasks of a group."""
        if self.study.tasks == "omniglot":
            return {"games": ("pretraining",), "supervised.pretraining": group}
        if self.study.tasks == "atari":
            return {"games": (group,)}
        return {"games": tuple(name for name in self.study.games if name != group)}


def make(
    *,
    preset: str,
    given: Mapping[str, Any],
    arms: Sequence[str],
    groups: Sequence[str],
    seeds: int,
    of_arms: Mapping[str, Mapping[str, Any]],
    test_steps: int | None,
    test_seeds: int | None = None,
    game_steps: Mapping[str, int] = MappingProxyType({}),
    existing: Study | None = None,
) -> Plan:
    """Return a plan whose settings are valid for every run. Raises ConfigError.

    Args:
        preset: preset that all settings start from.
        given: settings of all arms, by dotted name.
        arms: meta-learners; if empty, those of the paper's experiments.
        groups: sets of training games, numbers of pretraining alphabets, or data sets to hold out; if empty, seed24;
            4, 10 and 20; or all data sets.
        seeds: number of seeds, which are consecutive, starting with the setting `seed`.
        of_arms: settings of individual arms, by arm and dotted name.
        test_steps: number of examples that a run of an evaluation trains on; by default, as in training, or more if
            the setting `supervised.test_epochs` allows more epochs.
        test_seeds: number of agents for each initialization and game, for Atari; by default, one.
        game_steps: agent steps of individual games in an evaluation, for Atari.
        existing: study to be continued. Its settings are used where none are given, so the command that began it
            continues it, even if the preset has changed since.
    """
    if not 1 <= seeds <= 1000:
        raise ConfigError(f"seeds: {seeds:,} is not between 1 and 1,000")
    if "tasks" not in given and existing is None:
        raise ConfigError("tasks: name the kind of tasks to study: atari, omniglot or multi-cv")
    tasks = configuration.parse_value("tasks", given.get("tasks", existing.tasks if existing else Config.tasks))
    if tasks not in ("atari", "omniglot", "multi-cv"):
        raise ConfigError(f"tasks: a study needs atari, omniglot or multi-cv; for {tasks}, use the command evaluate")
    if preset == games.PRESET and tasks == "atari":
        preset = "paper"
    if test_seeds is not None and not 1 <= test_seeds <= 1000:
        raise ConfigError(f"test_seeds: {test_seeds:,} is not between 1 and 1,000")
    if tasks != "atari" and (game_steps or test_seeds not in (None, 1)):
        raise ConfigError(f"{'game' if game_steps else 'test'}_{'steps' if game_steps else 'seeds'}: only for atari")
    arms = arms or DEFAULT_ARMS[tasks]
    for arm in (*arms, *of_arms):
        if arm not in ARMS:
            raise ConfigError(f"arms: no meta-learner {arm[:40]!r} among {', '.join(ARMS)}")
    for arm, settings in of_arms.items():
        if arm not in arms:
            raise ConfigError(f"with: {arm} is not one of the arms {', '.join(arms)}")
        for name in settings:
            if name in _COMMON:
                raise ConfigError(f"with: {name} is the same for all arms of a study; give it for all")
    recorded = {} if existing is None else _recorded(existing)
    first = configuration.resolve(preset, recorded.get(_NEW_ARM, {}), given)
    groups = groups or {"atari": games.GROUPS, "omniglot": DEFAULT_GROUPS}.get(tasks, first.games)
    groups = [normalize(group) for group in groups] if tasks == "multi-cv" else groups
    if tasks == "atari":
        games.check_groups(groups)
    if tasks == "multi-cv" and len(first.games) < 2:
        raise ConfigError(f"games: {first.games[0]} alone leaves nothing to train on while it is held out; add another")
    for group in groups:
        if tasks == "multi-cv" and group not in first.games:
            raise ConfigError(f"groups: {group[:40]!r} is not one of the data sets {', '.join(first.games)}")
        if tasks == "omniglot" and not (group.isascii() and group.isdecimal() and 1 <= int(group[:6]) <= MOST):
            raise ConfigError(f"groups: {group[:40]!r} is not a number of alphabets from 1 to {MOST}")
    if test_steps is not None and test_steps < first.steps_per_update:
        raise ConfigError(f"test_steps: {test_steps} is less than {first.steps_per_update}, the steps of one update")
    study = Study(
        tasks=tasks,
        arms=tuple(arm for arm in ARMS if arm in arms),
        groups=tuple(dict.fromkeys(str(int(group)) if tasks == "omniglot" else group for group in groups)),
        seeds=tuple(range(first.seed, first.seed + seeds)),
        games=first.games if tasks == "multi-cv" else (),
        settings={},
        test={},
        meta_updates=first.meta_updates,
        batch_size=first.meta.batch_size,
        task_steps=first.task_steps,
    )
    tested = None
    if tasks == "atari":
        asked = games.Asked(first.games if "games" in given else (), game_steps, test_steps, test_seeds)
        tested = games.tests(preset, first, asked, existing.test if existing else {})
    if test_steps is None:
        usual = first.supervised.test_steps(first.task_steps)
        test_steps = usual if existing is None else existing.test.get("task_steps", usual)
    plan = Plan(study, preset, recorded, given, of_arms, test_steps, tested)
    runs = {cell: plan.training(cell) for cell in plan.cells()}
    tests = {(cell.group, cell.seed): plan.test(cell.group, cell.seed) for cell in runs}
    for cell, config in runs.items():
        assert tested or not set(config.games) & set(tests[cell.group, cell.seed].games), cell
    found = {cell.arm: _settings(config) for cell, config in runs.items()}
    test = {name: value for name, value in _settings(next(iter(tests.values()))).items() if _applies_to_tests(name)}
    if tested:
        test |= {"games": list(tested.games), "game_steps": tested.game_steps, "seeds": tested.seeds}
    study = dataclasses.replace(study, settings=found, test=test)
    if existing is not None:
        merge(existing, study)  # raises errors before anything is printed
    return dataclasses.replace(plan, study=study)


def _recorded(study: Study) -> dict[str, dict[str, Any]]:
    """Return the settings of a study by arm, those of its tests, and those that an added arm has to share.

    Settings that are newer than the study get their defaults, not the values that a preset has given them since.
    """
    budget = {"tasks": study.tasks, "meta_updates": study.meta_updates, "task_steps": study.task_steps}
    budget |= {"meta.batch_size": study.batch_size} | ({"games": study.games} if study.games else {})
    every = {name for settings in study.settings.values() for name in settings}
    newer = {
        name: configuration.default(name)
        for name in _settings(Config(tasks=cast(Any, study.tasks)))
        if name not in every
    }
    arms = {arm: {**newer, **settings, **budget} for arm, settings in study.settings.items() if settings}
    shared = {
        name: value
        for name, value in next(iter(arms.values()), {}).items()
        if all(other.get(name) == value for other in arms.values())
        and not name.startswith(("meta", "leap.", "fomaml."))
        # A preset may give every arm its own rate; studies older than that have one for all.
        and (name in newer or not name.endswith("learning_rate") or "supervised.test_learning_rate" in newer)
    }
    learning = {name: value for name, value in newer.items() if name.split(".")[0] in _LEARNERS[study.tasks]}
    tests = {**learning, **study.test} if study.test else {}
    for name in ("task_steps", *_OF_TESTS):
        tests.pop(name, None)
    return {**arms, _TESTS: tests, _NEW_ARM: {**shared, **budget}}


def parse_of_arms(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the settings by arm from texts of the form ARM:SETTING=VALUE. Raises ConfigError."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        arm, colon, rest = text.partition(":")
        name, equals, value = rest.partition("=")
        if not (colon and equals):
            raise ConfigError(f"with: {text[:60]!r} is not ARM:SETTING=VALUE, as in reptile:meta.learning-rate=0.3")
        found.setdefault(arm, {})[name.replace("-", "_")] = value
    return found


def _applies_to_tests(name: str) -> bool:
    return name in ("task_steps", "worker.precision") or name.split(".")[0] in ("agent", "atari", "supervised")


def unused_sections(tasks: str) -> set[str]:
    """Return the sections of the learners that this kind of tasks does not use, and that a study does not record."""
    return {section for sections in _LEARNERS.values() for section in sections} - set(_LEARNERS[tasks])


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that affect the results, as JSON-compatible data."""
    more = {name: configuration.look_up(config, name) for name in _CHANGEABLE}
    unused = unused_sections(config.tasks)
    return {
        name: value
        for name, value in {**configuration.fixed_settings(config), **more}.items()
        if name not in _CELL_SETTINGS and name.split(".")[0] not in unused
    }


def merge(old: Study, new: Study) -> Study:
    """Return the study that combines `old` and `new`. Raises ConfigError if they cannot share a folder.

    Arms, groups and seeds can be added. An arm that exists keeps its settings.
    """
    for field in ("tasks", "games", "meta_updates", "batch_size", "task_steps"):
        was, asked = getattr(old, field), getattr(new, field)
        if was != asked:
            was, asked = (" ".join(value) if isinstance(value, tuple) else value for value in (was, asked))
            raise ConfigError(f"{field}: the study there has {was}, not {asked}; choose another --out")
    both_have = [arm for arm in ARMS if arm in old.settings and arm in new.settings]
    compared = {"tests": (old.test, new.test), **{arm: (old.settings[arm], new.settings[arm]) for arm in both_have}}
    for of, (before, after) in compared.items():
        for name, value in after.items():
            if name in _OF_TESTS:
                was, same = before.get(name), before.get(name) == value
            else:
                was = before.get(name, configuration.default(name))  # the setting may be newer than the study
                same = configuration.same_setting(name, was, value)
            if not same:
                name = "test_seeds" if name == "seeds" else name
                raise ConfigError(f"{name}: the study there has {was} for {of}, not {value}; choose another --out")

    def both(name: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys((*getattr(old, name), *getattr(new, name))))

    arms = tuple(arm for arm in ARMS if arm in both("arms"))
    groups = both("groups")
    if old.tasks == "omniglot":
        groups = tuple(sorted(groups, key=int))
    return dataclasses.replace(
        new,
        arms=arms,
        groups=groups,
        seeds=tuple(sorted(both("seeds"))),
        settings={arm: new.settings.get(arm) or old.settings.get(arm, {}) for arm in arms},
    )
