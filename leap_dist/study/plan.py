"""What a study trains and tests: from a command's settings to the configuration of every run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import ALPHABETS, HELD_OUT, normalize
from leap_dist.config.settings import Config
from leap_dist.study.spec import ARMS, Study

DEFAULT_GROUPS = ("4", "10", "20")
MOST = len(ALPHABETS) - HELD_OUT - 1
"""Alphabets that can be for pretraining."""
_OF_CELLS = {"games", "seed", "supervised.pretraining", "agent", "atari"}
"""Settings, and sections, that each cell has its own values for, or none at all."""
_MORE = ("worker.precision", "worker.wire", "server.on_lost")
"""What may change while a run goes on, and changes what is found."""
_ALIKE = {
    "tasks", "games", "seed", "meta_learner", "meta_updates", "meta.batch_size", "task_steps", "data_dir",
    "supervised.pretraining",
}  # fmt: skip
"""Settings that no arm has a value of its own for: arms are compared on the same tasks and the same budget."""


class Cell(NamedTuple):
    """One training run."""

    group: str
    seed: int
    arm: str

    def __str__(self) -> str:
        return f"{self.arm}, group {self.group}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study, and the settings that its runs are made with.

    Args:
        preset: where they start from.
        given: settings of all arms, by dotted name.
        of_arms: what single arms have in their place.
        test_steps: examples that an evaluation trains on.
    """

    study: Study
    preset: str
    given: Mapping[str, Any]
    of_arms: Mapping[str, Mapping[str, Any]]
    test_steps: int

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, so that whatever is done when it ends early compares all arms."""
        for seed in self.study.seeds:
            for group in self.study.groups:
                for arm in self.study.arms:
                    yield Cell(group, seed, arm)

    def training(self, cell: Cell) -> Config:
        """Of a cell. Raises ConfigError."""
        settings = {**self.given, **self.of_arms.get(cell.arm, {}), "meta_learner": cell.arm, "seed": cell.seed}
        return configuration.resolve(self.preset, settings, self._training_games(cell.group))

    def test(self, group: str, seed: int) -> Config:
        """Of an evaluation of all arms: they learn alike then. Raises ConfigError."""
        held_out = {"games": ("held_out",) if self.study.tasks == "omniglot" else (group,)}
        fixed = {"meta_learner": "none", "mode": "buffered", "seed": seed, "task_steps": self.test_steps}
        learning = {name: value for name, value in self.given.items() if not name.startswith(("meta", "leap"))}
        return configuration.resolve(self.preset, learning, fixed, held_out)

    def everything(self) -> Config:
        """Of all that any run learns from. Raises ConfigError."""
        runs = [self.training(cell) for cell in self.cells()]
        runs += [self.test(group, seed) for group in self.study.groups for seed in self.study.seeds]
        games = dict.fromkeys(name for config in runs for name in config.games)
        return dataclasses.replace(runs[0], games=tuple(games))

    def _training_games(self, group: str) -> dict[str, Any]:
        """What a group's runs train on, as settings."""
        if self.study.tasks == "omniglot":
            return {"games": ("pretraining",), "supervised.pretraining": group}
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
) -> Plan:
    """A plan, with every run's settings checked. Raises ConfigError.

    Args:
        arms: meta-learners; none given: all that go with the tasks.
        groups: numbers of pretraining alphabets, or data sets to hold out; none given: 4, 10 and 20, or all.
        seeds: how many; they are counted from setting `seed` on.
        test_steps: None: as many as a training task has.
    """
    if not 1 <= seeds <= 1000:
        raise ConfigError(f"seeds: {seeds} is not between 1 and 1000")
    tasks = configuration.parse_value("tasks", given.get("tasks", Config.tasks))
    if tasks == "atari":
        raise ConfigError("tasks: a study is of omniglot or multi-cv; for Atari games see launch.py evaluate")
    arms = arms or [arm for arm in ARMS if (tasks, arm) != ("multi-cv", "finetune-single")]
    for arm in (*arms, *of_arms):
        if arm not in ARMS:
            raise ConfigError(f"arms: no meta-learner {arm[:40]!r} among {', '.join(ARMS)}")
    for arm, settings in of_arms.items():
        if arm not in arms:
            raise ConfigError(f"with: {arm} is none of the arms {', '.join(arms)}")
        for name in settings:
            if name in _ALIKE:
                raise ConfigError(f"with: {name} is the same for all arms of a study; give it for all")
    first = configuration.resolve(preset, given)
    groups = groups or (DEFAULT_GROUPS if tasks == "omniglot" else first.games)
    groups = groups if tasks == "omniglot" else [normalize(group) for group in groups]
    if tasks == "multi-cv" and len(first.games) < 2:
        raise ConfigError(f"games: {first.games[0]} alone leaves nothing to train on while it is held out; add another")
    for group in groups:
        if tasks == "multi-cv" and group not in first.games:
            raise ConfigError(f"groups: {group[:40]!r} is none of the data sets {', '.join(first.games)}")
        if tasks == "omniglot" and not (group.isascii() and group.isdecimal() and 1 <= int(group[:6]) <= MOST):
            raise ConfigError(f"groups: {group[:40]!r} is no number of alphabets from 1 to {MOST}")
    if test_steps is not None and test_steps < first.steps_per_update:
        raise ConfigError(
            f"test_steps: {test_steps} is less than a batch of supervised.batch = {first.steps_per_update} examples"
        )
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
    plan = Plan(study, preset, given, of_arms, first.task_steps if test_steps is None else test_steps)
    runs = {cell: plan.training(cell) for cell in plan.cells()}
    tests = {(cell.group, cell.seed): plan.test(cell.group, cell.seed) for cell in runs}
    for cell, config in runs.items():
        assert not set(config.games) & set(tests[cell.group, cell.seed].games), cell
    found = {cell.arm: _settings(config) for cell, config in runs.items()}
    test = {name: value for name, value in _settings(tests[groups_of(study)[0]]).items() if _is_of_tests(name)}
    return dataclasses.replace(plan, study=dataclasses.replace(study, settings=found, test=test))


def parse_of_arms(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """ARM:SETTING=VALUE, each, as settings by arm. Raises ConfigError."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        arm, colon, rest = text.partition(":")
        name, equals, value = rest.partition("=")
        if not (colon and equals):
            raise ConfigError(f"with: {text[:60]!r} is not ARM:SETTING=VALUE, as in reptile:meta.learning-rate=0.3")
        found.setdefault(arm, {})[name.replace("-", "_")] = value
    return found


def groups_of(study: Study) -> list[tuple[str, int]]:
    """Every group with every seed, in the order in which they are made."""
    return [(group, seed) for seed in study.seeds for group in study.groups]


def _is_of_tests(name: str) -> bool:
    return name == "task_steps" or name == "worker.precision" or name.startswith("supervised.")


def _settings(config: Config) -> dict[str, Any]:
    """All that makes a difference to what is found, as plain data."""
    more = {name: configuration.look_up(config, name) for name in _MORE}
    return {
        name: value
        for name, value in {**configuration.fixed_settings(config), **more}.items()
        if name not in _OF_CELLS and name.split(".")[0] not in _OF_CELLS
    }


def merge(old: Study, new: Study) -> Study:
    """The study that `new` makes of `old` in the same folder. Raises ConfigError where they cannot be one.

    Arms, groups and seeds may be added; an arm that is there keeps its settings.
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
            was = before.get(name, configuration.default(name))  # a setting may be younger than the study
            if was != value:
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
