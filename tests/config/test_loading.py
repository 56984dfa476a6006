"""The configuration: presets, what is refused and in which words, YAML there and back, what a resume may change."""

from __future__ import annotations

import datetime
import math
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st

from leap_dist.config.loading import (
    ConfigError,
    completed,
    fields,
    fixed_settings,
    incompatibilities,
    read_yaml,
    resolve,
    same_setting,
    to_yaml,
)
from leap_dist.config.presets import DEFAULTS, PRESET_HELP, PRESETS
from leap_dist.config.settings import Config
from leap_dist.envs.games import SETS, available
from leap_dist.storage import run_directory

FIELDS = {name: (field, kind) for name, field, kind in fields()}


def look_up(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def write(path: Path, config: Config) -> Path:
    path.write_bytes(to_yaml(config).encode())
    return path


def read_back(path: Path) -> Config:
    loaded = read_yaml(path)
    return resolve(loaded["preset"], loaded)


def one_line(error: ConfigError) -> str:
    """The message, which the command line prints as it is."""
    message = str(error)
    assert len(message.splitlines()) == 1, f"more than one line: {message!r}"
    return message


def refusal(preset: str, *overrides: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(preset, *overrides)
    return one_line(caught.value)


# --- presets -------------------------------------------------------------------------------------------------------

APPENDIX_E = {
    "agent.envs": 32,  # "a batch size of 32"
    "agent.unroll": 5,
    "agent.learning_rate": 1e-4,
    "agent.epsilon": 1e-4,
    "agent.epsilon_form": "outside",  # that of PyTorch, in which the authors published their code
    "agent.decay": 0.99,
    "agent.entropy_cost": 0.01,
    "agent.reward_clip": "bound",  # "clip the absolute value of the rewards to maximum 5.0"
    "agent.discount": 0.99,
    "atari.frames": "rgb1",  # "84 × 84 × 3 RGB images"
    "task_steps": 1_000_000,  # section 4.3
    "leap.metric": "energy",
    "leap.loss_weight": 1.0,
    "leap.stabilize": True,
    # The paper is silent: the camera-ready's, or the field's usual values (notes, sections 1 and 2).
    "meta.batch_size": 16,
    "meta_updates": 100,
    "meta.optimizer": "adam",
    "meta.learning_rate": 1e-3,
    "agent.value_cost": 0.5,
    "agent.max_grad_norm": 0.5,
    "atari.frame_skip": 4,
    "atari.noop_max": 30,
    "atari.fire_on_reset": True,
    "atari.sticky_actions": 0.0,
    "atari.life_loss": True,
    "games": SETS["seed24"],
}

ALGORITHM_1 = {"mode": "sync", "meta.contribution_clip": 0.0}

LEAP_ON_GAMES = {
    "leap.metric": "length",
    "leap.loss_warmup": 0.1,
    "meta.optimizer": "sgd",
    "meta.learning_rate": 0.01,
    "meta.max_norm": 10.0,
    "meta.contribution_clip": 1.0,
}
"""docs/results-atari.md: with these, units stay alive."""

FAST = {
    **APPENDIX_E,
    **LEAP_ON_GAMES,
    "agent.envs": 16,
    "agent.learning_rate": 7e-4,
    "agent.epsilon": 1e-5,
    "agent.epsilon_form": "outside",
    "agent.value_cost": 0.25,
    "agent.reward_clip": "sign",
    "atari.frames": "gray4",
}


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("paper", {**APPENDIX_E, **ALGORITHM_1}),
        ("paper-5m", {**APPENDIX_E, **ALGORITHM_1, "task_steps": 5_000_000}),
        ("paper-async", {**APPENDIX_E, "mode": "buffered", "meta.contribution_clip": 3.0}),
        ("fast", FAST),
    ],
)
def test_presets_hold_the_published_values(preset, values):
    config = resolve(preset)
    assert {name: look_up(config, name) for name in values} == values
    assert config.preset == preset


@pytest.mark.parametrize("meta_learner", ["leap", "reptile", "fomaml", "finetune-multi"])
@pytest.mark.parametrize(
    ("preset", "tasks"),
    [
        ("paper", {"tasks": "atari"}),
        ("paper", {"tasks": "omniglot"}),
        ("authors", {"tasks": "omniglot"}),
        ("paper", {"tasks": "multi-cv"}),
        ("paper", {"tasks": "gymnasium", "games": "x"}),
        ("paper", {"tasks": "images", "games": "x"}),
    ],
)
def test_the_paper_is_algorithm_1_whatever_the_tasks(preset, tasks, meta_learner):
    """A meta-update waits for its whole batch and follows the plain mean, as in the published code."""
    config = resolve(preset, {**tasks, "meta_learner": meta_learner})
    assert {name: look_up(config, name) for name in ALGORITHM_1} == ALGORITHM_1


APPENDIX_C = {
    "meta.batch_size": 20,
    "sampling": "replacement",
    "meta.optimizer": "sgd",
    "meta.learning_rate": 0.1,
    "supervised.learning_rate": 0.1,
    "supervised.batch": 20,
    "supervised.rotations": 36,
    "supervised.augmentation": "none",
    "supervised.split": "drawing",
    "supervised.network": "norm-pool",
    "task_steps": 500 * 20,  # the axis of figure 3
}
PUBLISHED_CODE = {
    "meta.batch_size": 20,
    "sampling": "shuffled",
    "meta.learning_rate": 0.1,
    "supervised.learning_rate": 0.1,
    "supervised.rotations": 0,
    "supervised.augmentation": "affine",
    "supervised.shuffle": "task",
    "supervised.split": "first",
    "supervised.network": "authors",
    "supervised.polarity": "black-ink",
    "supervised.resampling": "nearest",
    "supervised.patience_steps": 0,
    "early_stopping.interval": 0,
    "task_steps": 100 * 20,
    "meta_updates": 1000,
}


@pytest.mark.parametrize(("preset", "values"), [("paper", APPENDIX_C), ("authors", PUBLISHED_CODE)])
def test_presets_of_omniglot_hold_what_paper_and_code_say(preset, values):
    config = resolve(preset, {"tasks": "omniglot"})
    assert {name: look_up(config, name) for name in values} == values


def test_the_papers_rates_of_single_meta_learners():
    """Appendix C: finetuning 0.01 instead of 0.1 on a task, Reptile 0.01 for the initialization."""

    def rates(preset: str, meta_learner: str, **more: Any) -> tuple[float, float, float]:
        found = resolve(preset, {"tasks": "omniglot", "meta_learner": meta_learner, **more})
        return found.supervised.learning_rate, found.supervised.test_learning_rate, found.meta.learning_rate

    assert rates("paper", "leap") == (0.1, 0.0, 0.1)
    assert rates("paper", "reptile") == (0.1, 0.0, 0.01)
    assert rates("paper", "finetune-multi") == (0.01, 0.01, 1.0)
    assert rates("paper", "finetune-multi", **{"supervised.learning_rate": 0.1}) == (0.1, 0.01, 1.0)
    assert rates("paper", "reptile", **{"meta.optimizer": "adam"})[2] == 0.1, "a rate of SGD does not suit Adam"
    assert rates("quick", "finetune-multi") == (0.1, 0.0, 1.0)
    assert resolve("paper", {"meta_learner": "reptile"}).meta.learning_rate == 0.1, "of Atari games it says nothing"


def test_a_preset_of_other_tasks_is_told_from_a_mistake():
    with pytest.raises(ConfigError, match="preset: authors does not exist for tasks atari; choose paper, "):
        resolve("authors")
    with pytest.raises(ConfigError, match="preset: authors does not exist for tasks multi-cv"):
        resolve("authors", {"tasks": "multi-cv"})
    with pytest.raises(ConfigError, match="no preset 'autors'; did you mean authors"):
        resolve("autors", {"tasks": "omniglot"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"supervised.patience": 1, "supervised.patience_steps": 9},
            "patience_steps: 9 does not go with",
        ),
        (
            {"supervised.shuffle": "task", "task_steps": 100_000_001},
            "shuffle: task keeps the order of 100000001 images",
        ),
        ({"supervised.split": "image"}, "split: image divides the rotations of a drawing, but there are none"),
        ({"supervised.held_out_images": "upright"}, "upright applies only with supervised.rotations"),
        (
            {"supervised.split": "image", "supervised.rotations": 2, "supervised.held_out_images": "upright"},
            "upright does not go with supervised.split image",
        ),
        (
            {"supervised.split": "training", "supervised.rotations": 2, "supervised.held_out_images": "upright"},
            "upright does not go with supervised.split training",
        ),
        ({"tasks": "multi-cv", "supervised.rotations": 2}, "rotations: 2 is for tasks omniglot, not multi-cv; use 0"),
        ({"tasks": "multi-cv", "supervised.polarity": "black-ink"}, "polarity: black-ink is for tasks omniglot"),
        ({"tasks": "multi-cv", "supervised.labels": "drawn"}, "labels: drawn is for tasks omniglot, not multi-cv; use"),
        ({"tasks": "multi-cv", "supervised.resampling": "nearest"}, "resampling: nearest is for tasks omniglot"),
    ],
)
def test_settings_of_images_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve("quick", {"tasks": "omniglot", **changes})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_is_described(preset):
    config = resolve(preset)
    assert config.preset == preset
    for name, value in PRESETS[preset].items():
        if name != "games":
            assert look_up(config, name) == value
    assert set(config.games) <= set(available())
    assert set(PRESET_HELP) == set(PRESETS)


def test_a_multitask_run_has_the_agent_steps_of_the_others_in_one_task_for_each_meta_update():
    given = {"games": "pong breakout", "meta.batch_size": 3, "meta_updates": 5, "task_steps": 4_000}
    joint, other = resolve("fast", {**given, "meta_learner": "multitask"}), resolve("fast", given)
    assert (joint.total_tasks, joint.steps_of_task) == (5, 12_000)
    assert joint.total_tasks * joint.steps_of_task == other.total_tasks * other.task_steps
    assert joint.rollouts_per_task == 12_000 // (2 * 16 * 5), "a rollout is one of every game"
    assert (joint.mode, joint.workers, joint.task_names) == ("sync", 1, ("all_games",))
    images = resolve("quick", {"meta_learner": "multitask", "tasks": "omniglot"})
    assert images.steps_per_update == 20, "a batch of one alphabet, however many there are"
    assert images.steps_of_task == 5 * resolve("quick", {"tasks": "omniglot"}).task_steps


@pytest.mark.parametrize("more", [{}, {"meta.optimizer": "adam"}, {"tasks": "gymnasium", "games": "x"}])
def test_finetuning_on_games_averages_encoders_like_heads_without_weight_and_clip(more):
    meta = resolve("fast", {"meta_learner": "finetune-multi", **more}).meta
    assert (meta.staleness, meta.contribution_clip) == ("constant", 0.0)
    asked = {"meta.staleness": "hinge", "meta.contribution_clip": 2.0}
    meta = resolve("fast", {"meta_learner": "finetune-multi", **more, **asked}).meta
    assert (meta.staleness, meta.contribution_clip) == ("hinge", 2.0)


@pytest.mark.parametrize("preset", ["fast", "quick"])
def test_leap_on_games_has_settings_with_which_units_stay_alive(preset):
    """They are Leap's alone, and `paper` keeps what the paper says."""
    for mode in ("sync", "buffered", "async", "stream"):
        config = resolve(preset, {"mode": mode})
        assert {name: look_up(config, name) for name in LEAP_ON_GAMES} == LEAP_ON_GAMES
    for other in ("paper", "paper-async", "smoke"):
        assert (resolve(other).meta.max_norm, resolve(other).leap.loss_warmup) == (0.0, 0.0)
    reptile = resolve(preset, {"meta_learner": "reptile"})
    assert (reptile.meta.max_norm, reptile.leap.metric) == (0.0, "energy")


@pytest.mark.parametrize("tasks", [{}, {"tasks": "gymnasium", "games": "x"}], ids=["atari", "gymnasium"])
def test_reptile_with_fast_takes_the_mean_of_what_a_batch_has_learned(tasks):
    """A single contribution moves φ by a tenth, and the modes that are optimizers keep their own settings."""
    for mode, rate, clip in (
        ("sync", 1.0, 0.0), ("buffered", 1.0, 0.0), ("async", 0.1, 0.0), ("stream", 0.1, 0.0),
        ("fedasync", 0.6, 0.0), ("delayed-nesterov", 0.7, 3.0),
    ):  # fmt: skip
        meta = resolve("fast", {**tasks, "meta_learner": "reptile", "mode": mode}).meta
        assert (meta.optimizer, meta.learning_rate, meta.contribution_clip) == ("sgd", rate, clip), mode
    for preset in ("quick", "smoke", "paper"):
        assert resolve(preset, {**tasks, "meta_learner": "reptile"}).meta.learning_rate == 0.1, (
            "of these nothing is known"
        )


@pytest.mark.parametrize("preset", ["fast", "quick"])
def test_leap_on_own_environments_moves_as_far_as_tasks_do_and_less_for_single_contributions(preset):
    own = {"tasks": "gymnasium", "games": "x"}
    for mode, rate in (("sync", 1.0), ("buffered", 1.0), ("async", 0.1), ("stream", 0.1), ("delayed-nesterov", 0.7)):
        meta = resolve(preset, {**own, "mode": mode}).meta
        assert (meta.optimizer, meta.learning_rate, meta.max_norm) == ("sgd", rate, 0.0), mode
    config = resolve(preset, own)
    assert (config.leap.metric, config.leap.loss_warmup, config.meta.contribution_clip) == ("energy", 0.1, 1.0)
    assert resolve(preset, {**own, "meta.optimizer": "adam"}).meta.learning_rate < 1
    assert resolve("paper", own).meta.optimizer == "adam"


def test_a_mode_that_is_an_optimizer_keeps_its_own_settings():
    config = resolve("fast", {"mode": "delayed-nesterov"})
    assert (config.meta.learning_rate, config.meta.momentum, config.meta.max_norm) == (0.7, 0.9, 0.0)
    assert (config.meta.contribution_clip, config.leap.metric) == (3.0, "energy")


def test_another_optimizer_keeps_the_metric_but_not_the_rate():
    config = resolve("fast", {"meta.optimizer": "adam"})
    assert (config.meta.learning_rate, config.meta.max_norm, config.leap.metric) == (1e-3, 0.0, "length")
    config = resolve("fast", {"meta.optimizer": "sgd"})
    assert (config.meta.learning_rate, config.meta.max_norm) == (0.01, 10.0)


def test_derived_values():
    assert resolve("paper").rollouts_per_task == 6_250, "a million steps of 32 environments × 5"
    assert resolve("paper", {"task_steps": 500}).rollouts_per_task == 3, "500 // 160"
    assert resolve("paper").max_staleness(6) == 24, "four times the workers"
    assert resolve("paper", {"meta.max_staleness": 5}).max_staleness(6) == 5


# --- what is accepted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("workers", "3", 3),
        ("workers", "3.0", 3),
        ("workers", 3.0, 3),
        ("workers", "auto", "auto"),
        ("task_steps", "1_000_000", 1_000_000),
        ("task_steps", "2e6", 2_000_000),
        ("task_steps", "999999999999", 999_999_999_999),
        ("agent.learning_rate", "1e-4", 1e-4),  # text to PyYAML, too
        ("agent.learning_rate", 1, 1.0),
        ("leap.stabilize", "no", False),
        ("leap.stabilize", "True", True),
        ("leap.final_loss", True, True),
        ("leap.metric", "length", "length"),
        ("games", "pong,breakout", ("pong", "breakout")),
        ("games", "pong, breakout pong", ("pong", "breakout")),
        ("games", ["pong", "breakout"], ("pong", "breakout")),
        ("games", "camera25", SETS["camera25"]),
        ("games", ["breakout", "seed24"], ("breakout", *SETS["seed24"])),
        ("meta-updates", "7", 7),  # as a flag spells it
        ("agent.learning-rate", 0.5, 0.5),
        ("address", "auto", "auto"),
    ],
)
def test_values_are_understood_as_text_and_as_what_they_are(name, text, value):
    found = look_up(resolve("paper", {name: text}), name.replace("-", "_"))
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win_and_presets_give_way():
    config = resolve("fast", {"agent.envs": 8, "workers": 3}, {"agent.envs": "2"})
    assert config.agent.envs == 2
    assert config.workers == 3
    assert config.agent.epsilon_form == "outside", "what is not overridden stays the preset's"


def test_limits_are_inclusive_where_they_say_so():
    for name, (field, kind) in FIELDS.items():
        for limit in ("low", "high"):
            bound = field.metadata[limit]
            if kind not in (int, float) or math.isinf(bound) or name in ("task_steps", "agent.envs", "agent.unroll"):
                continue
            context = CONTEXT.get(name, {})
            assert look_up(resolve("paper", context, {name: bound}), name) == bound
            beyond = bound + (-1 if limit == "low" else 1)
            assert f"{name}: {beyond}" in refusal("paper", {**context, name: beyond})
        if kind is float and not math.isinf(field.metadata["above"]):
            assert f"{name}: 0" in refusal("paper", {name: 0.0})


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # unknown keys
        ({"wrokers": 3}, ["wrokers: no such setting", "did you mean workers?"]),
        ({"agent.learning_rat": 1}, ["agent.learning_rat:", "did you mean agent.learning_rate?"]),
        ({"metric": "energy"}, ["metric: no such setting", "did you mean leap.metric?"]),
        ({"leap": 3}, ["leap: no such setting"]),
        ({"": 3}, ["no such setting"]),
        ({"xyzzy": 3}, ["xyzzy: no such setting"]),
        # wrong types
        ({"workers": "many"}, ["workers: 'many' is neither auto nor a whole number"]),
        ({"workers": "Auto"}, ["workers: 'Auto' is neither auto nor a whole number"]),
        ({"worker.gpus": 1.5}, ["worker.gpus: 1.5 is neither a share of one GPU nor a whole number", "use 1 or 2"]),
        ({"worker.gpus": 0.00005}, ["worker.gpus: 5e-05 is less than the smallest share of a GPU; use 0.0001"]),
        ({"workers": 2.5}, ["workers: 2.5", "whole number"]),
        ({"workers": "2.5"}, ["workers: '2.5'", "whole number"]),
        ({"workers": [2]}, ["workers: [2]", "whole number"]),
        ({"workers": None}, ["workers: None", "whole number"]),
        ({"workers": ""}, ["workers: ''", "whole number"]),
        ({"agent.discount": "high"}, ["agent.discount: 'high'", "a number"]),
        ({"agent.discount": {"a": 1}}, ["agent.discount: {'a': 1}", "a number"]),
        ({"leap.stabilize": "maybe"}, ["leap.stabilize: 'maybe'", "true nor false"]),
        ({"leap.stabilize": 1}, ["leap.stabilize: 1", "true nor false"]),
        ({"leap.stabilize": None}, ["leap.stabilize: None", "true nor false"]),
        ({"address": 6379}, ["address: 6379", "text"]),
        ({"games": 7}, ["games: 7", "names"]),
        ({"games": [1, 2]}, ["games: [1, 2]", "names"]),
        ({"games": []}, ["games: []", "names"]),
        ({"games": " , "}, ["games: ' , '", "names"]),
        ({"games": {"pong": 1}}, ["games: {'pong': 1}", "names"]),
        # bool where a number belongs: bool is an int to Python
        ({"workers": True}, ["workers: True", "whole number"]),
        ({"agent.discount": False}, ["agent.discount: False", "a number"]),
        # not finite
        ({"agent.discount": math.nan}, ["agent.discount: nan", "a number"]),
        ({"agent.discount": "nan"}, ["agent.discount: 'nan'", "a number"]),
        ({"agent.max_grad_norm": math.inf}, ["agent.max_grad_norm: inf", "a number"]),
        ({"workers": -math.inf}, ["workers: -inf", "a whole number"]),
        # out of range
        ({"workers": 0}, ["workers: 0", "too small", "1"]),
        ({"workers": "-4"}, ["workers: -4", "too small", "1"]),
        ({"workers": 100_001}, ["workers: 100001", "too large", "100,000"]),
        ({"task_steps": 10**23}, ["task_steps: 1" + 23 * "0", "too large", "1000000000000"]),
        ({"agent.discount": 1.01}, ["agent.discount: 1.01", "too large", "1"]),
        ({"agent.learning_rate": 0}, ["agent.learning_rate: 0", "greater than 0"]),
        ({"agent.learning_rate": -1e-4}, ["agent.learning_rate: -0.0001", "greater than 0"]),
        ({"leap.loss_weight": -0.5}, ["leap.loss_weight: -0.5", "too small", "0"]),
        ({"seed": 2**31}, ["seed: 2147483648", "too large", "2,147,483,647"]),
        # none of the choices
        ({"leap.metric": "enregy"}, ["leap.metric: 'enregy'", "energy, length", "did you mean energy?"]),
        ({"mode": "asynch"}, ["mode: 'asynch'", "sync, buffered, async", "did you mean async?"]),
        ({"mode": ["sync"]}, ["mode: ['sync']", "sync, buffered, async"]),
        ({"agent.reward_clip": None}, ["agent.reward_clip: None", "bound, sign, none"]),
        ({"worker.device": True}, ["worker.device: True", "auto, cpu, cuda"]),
        # games
        ({"games": "brakout"}, ["games: no game 'brakout'", "breakout"]),
        ({"games": ["pong", "Breakout"]}, ["games: no game 'Breakout'", "breakout"]),
        ({"games": "sed24"}, ["games: no game 'sed24'", "seed24"]),
        ({"games": "pong,joust"}, ["games: 'joust'", "two-player"]),
        # what only several settings together show
        ({"task_steps": 319}, ["task_steps: 319", "160", "at least 320"]),
        ({"task_steps": 60, "agent.envs": 8, "agent.unroll": 4}, ["task_steps: 60", "32", "at least 64"]),
        ({"server.lease_seconds": 5}, ["server.lease_seconds: 5 ", "2 s", "at least 6"]),
        ({"worker.heartbeat_seconds": 30}, ["server.lease_seconds: 60 ", "30 s", "at least 90"]),
        ({"worker.device": "cpu", "worker.gpus": 0.5}, ["worker.gpus: 0.5", "worker.device cpu", "gpus 0"]),
    ],
    ids=str,
)
def test_a_mistake_is_answered_in_one_line_with_the_field_and_the_value(overrides, words):
    message = refusal("paper", overrides)
    for word in words:
        assert word in message, message
    assert message.startswith(words[0]) or words[0] == "no such setting"


@pytest.mark.parametrize(
    ("preset", "suggestion"),
    [
        ("papr", "; did you mean paper?"),
        ("Fast", "; did you mean fast?"),
        ("xyzzy", "; choose from paper, paper-5m, paper-async, fast, quick, smoke"),
    ],
)
def test_an_unknown_preset_is_refused(preset, suggestion):
    assert refusal(preset) == f"preset: no preset {preset!r}{suggestion}"


def test_an_unknown_preset_among_the_overrides_is_refused():
    """It would go into config.yaml as "the preset that the other values started from"."""
    assert "nonsense" in refusal("paper", {"preset": "nonsense"})


def test_just_enough_is_enough():
    assert resolve("paper", {"task_steps": 320}).rollouts_per_task == 2
    assert resolve("paper", {"server.lease_seconds": 6}).server.lease_seconds == 6
    assert resolve("paper", {"worker.device": "cpu", "worker.gpus": 0}).worker.gpus == 0
    assert resolve("paper", {"worker.device": "auto", "worker.gpus": 0.5}).worker.gpus == 0.5


@pytest.mark.parametrize(
    "overrides",
    [
        {"workers": "-5\n"},
        {"workers": "\n200000"},
        {"agent.discount": "2\n\n"},
        {"no\nsuch": 1},
        {"no\rsuch": 1},
    ],
    ids=str,
)
def test_a_line_break_in_the_input_does_not_break_the_answer(overrides):
    refusal("paper", overrides)


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["10**400", "-10**400"])
@pytest.mark.parametrize("name", ["workers", "agent.discount", "leap.loss_weight", "seed"])
def test_a_number_beyond_floating_point_is_refused(name, value):
    """YAML knows integers of any size. Their digits alone fill a line, so that the value need not be repeated."""
    assert refusal("paper", {name: value}).startswith(f"{name}: ")


@pytest.mark.parametrize("value", [10**5000, [10**5000], {"a": 10**5000}], ids=["bare", "in a list", "in a mapping"])
@pytest.mark.parametrize("name", ["workers", "leap.stabilize", "leap.metric", "games", "address"])
def test_a_number_too_long_to_print_is_refused(name, value):
    """Python refuses to print an integer of more than 4,300 digits.

    YAML reads one of any size in hexadecimal.
    """
    assert refusal("paper", {name: value}).startswith(f"{name}: ")


def test_an_episode_longer_than_the_emulator_can_count_is_refused():
    """Its own counter is a C++ int; nobody plays for a year."""
    name = "atari.max_episode_frames"
    assert resolve("paper", {name: 2**31 - 1}).atari.max_episode_frames == 2**31 - 1
    assert f"{name}: {2**31}" in refusal("paper", {name: 2**31})


# --- settings that do not go together ------------------------------------------------------------------------------

MODES, LEARNERS = (get_args(FIELDS[name][1]) for name in ("mode", "meta_learner"))
REPTILE = {"meta_learner": "reptile"}
LAMBDA_0 = {"meta_learner": "leap", "leap.loss_weight": 0}
RHO = "meta.endpoint_correction"
PLAIN_SGD = {"meta.optimizer": "sgd", "meta.learning_rate": 1, "meta.momentum": 0}
NO_PATH = "needs contributions that reach from φ to the end of the path, unlike those of"
NOT_FEDASYNC = "does not compute mode fedasync, .*; use sgd, a meta.learning_rate .* of at most 1, and momentum 0$"
NOT_DELAYED = "does not go with mode delayed-nesterov, .*; use sgd and meta.nesterov true$"

TOGETHER: list[tuple[dict[str, Any], str, list[dict[str, Any]]]] = [
    # running
    (
        {"worker.device": "cpu", "worker.gpus": 0.5},
        r"worker.gpus: 0\.5 .* worker.device cpu; use worker.device cuda or worker.gpus 0$",
        [{"worker.device": "cuda"}, {"worker.gpus": 0}],
    ),
    ({"task_steps": 319}, "task_steps: 319 .* use at least 320$", [{"task_steps": 320}]),
    (
        {"meta_learner": "fomaml", "task_steps": 3359},  # 20 rollouts of 160 steps, and one to train on
        "task_steps: 3359 .* fomaml keeps .* 20 rollouts .* use at least 3360, or fewer fomaml.rollouts$",
        [{"task_steps": 3360}, {"fomaml.rollouts": 19}],
    ),
    (
        {"server.lease_seconds": 89, "worker.heartbeat_seconds": 30},
        "server.lease_seconds: 89 .* 30 s; use at least 90$",
        [{"server.lease_seconds": 90}],
    ),
    # the meta-learner
    (
        {"meta_learner": "finetune-single", "meta.shared": "convolutions"},
        "meta.shared: convolutions .* finetune-single .*; use encoder$",
        [{"meta.shared": "encoder"}],
    ),
    (
        {"mode": "stream", "meta_learner": "fomaml"},
        "meta_learner: fomaml .*; use mode buffered$",
        [{"mode": "buffered"}],
    ),
    (
        {"mode": "stream", "server.on_lost": "retry"},
        "server.on_lost: retry .* mode stream.*; use keep$",
        [{"server.on_lost": "keep"}],
    ),
    *(
        (
            {**REPTILE, "mode": mode, "meta.shift": "increments"},
            f"meta.shift: increments needs mode stream, not {mode}: .*; use meta.shift no$",
            [{"meta.shift": "no"}, {"mode": "stream"}],
        )
        for mode in MODES
        if mode != "stream"
    ),
    # fedasync and the endpoint correction
    (
        {**REPTILE, "mode": "fedasync", RHO: 0.5},
        r"meta.endpoint_correction: 0\.5 .* mode fedasync, .*; use 0$",
        [{RHO: 0}],
    ),
    *(
        (
            {"meta_learner": learner, **asked},
            f"{shown} {NO_PATH} meta_learner {learner}; use meta_learner reptile$",
            [REPTILE],
        )
        for learner in ("fomaml", "none")
        for asked, shown in (
            ({"mode": "fedasync"}, "mode: fedasync"),
            ({RHO: 0.25}, r"meta.endpoint_correction: 0\.25"),
        )
    ),
    *(
        (
            {**LAMBDA_0, "leap.metric": "length", **asked},
            f"{shown} {NO_PATH} leap.metric length, .*; use leap.metric energy$",
            [{"leap.metric": "energy"}],
        )
        for asked, shown in (({"mode": "fedasync"}, "mode: fedasync"), ({RHO: 1}, "meta.endpoint_correction: 1"))
    ),
    (
        {"mode": "stream", "meta.shift": "trajectory", "meta_learner": "finetune-multi"},
        "meta.shift: trajectory adds up whole paths, .* heads of finetune-multi .*; use meta.shift increments$",
        [{"meta.shift": "increments"}, {"meta_learner": "reptile"}],
    ),
    (
        {"mode": "stream", RHO: 1},
        "meta.endpoint_correction: 1 .* the increments of mode stream; use mode async, or meta.shift instead$",
        [{"mode": "async"}, {RHO: 0, "meta.shift": "increments"}],
    ),
    (
        {"mode": "fedasync"},
        "mode: fedasync .* loss term of leap; use leap.loss_weight 0, meta_learner reptile, or mode async with "
        "meta.endpoint_correction 1$",
        [{"leap.loss_weight": 0}, REPTILE, {"mode": "async", RHO: 1}],
    ),
    # the meta-optimizer
    *(
        ({**REPTILE, "mode": "fedasync", **asked}, f"meta.optimizer: {shown} {NOT_FEDASYNC}", [PLAIN_SGD])
        for asked, shown in (
            ({"meta.optimizer": "adam"}, r"adam with learning rate 0\.001 and momentum 0"),
            ({"meta.optimizer": "adamw"}, r"adamw with learning rate 0\.001 and momentum 0"),
            ({"meta.optimizer": "rmsprop"}, r"rmsprop with learning rate 0\.001 and momentum 0"),
            ({"meta.learning_rate": 1.5}, r"sgd with learning rate 1\.5 and momentum 0"),
            ({"meta.momentum": 0.9}, r"sgd with learning rate 0\.6 and momentum 0\.9"),
        )
    ),
    *(
        (
            {"mode": "delayed-nesterov", **asked},
            f"meta.optimizer: {shown} {NOT_DELAYED}",
            [{"meta.optimizer": "sgd", "meta.nesterov": True}],
        )
        for asked, shown in (
            ({"meta.optimizer": "adam"}, "adam"),
            ({"meta.optimizer": "rmsprop"}, "rmsprop"),
            ({"meta.nesterov": False}, "sgd without meta.nesterov"),
        )
    ),
    *(
        (
            {"meta.optimizer": optimizer, "meta.nesterov": True, "meta.momentum": 0.9},
            f"meta.nesterov: true does not go with {optimizer}; use meta.optimizer sgd$",
            [{"meta.optimizer": "sgd"}],
        )
        for optimizer in ("adam", "adamw", "rmsprop")
    ),
    *(
        (
            {**asked, "meta.momentum": 0, "meta.nesterov": True},
            r"meta.nesterov: true needs a momentum; use meta.momentum 0\.9$",
            [{"meta.momentum": 0.9}],
        )
        for asked in ({"meta.optimizer": "sgd"}, {"mode": "delayed-nesterov"})
    ),
    *(
        (
            {"meta.optimizer": optimizer, "meta.momentum": 0.75},
            rf"meta.momentum: 0\.75 does not go with {optimizer}; use meta.optimizer sgd or rmsprop$",
            [{"meta.optimizer": "sgd"}, {"meta.optimizer": "rmsprop"}],
        )
        for optimizer in ("adam", "adamw")
    ),
    *(
        (
            {"meta.optimizer": optimizer, "meta.weight_decay": 0.01},
            rf"meta.weight_decay: 0\.01 does not go with {optimizer}; use meta.weight_decay 0, or "
            "meta.optimizer adamw$",
            [{"meta.optimizer": "adamw"}, {"meta.weight_decay": 0}],
        )
        for optimizer in ("adam", "sgd", "rmsprop")
    ),
]
"""What is refused, in which words, and what then resolves: one for each choice that the words offer."""


@pytest.mark.parametrize(("overrides", "words", "remedies"), TOGETHER, ids=str)
def test_settings_that_do_not_go_together_are_answered_with_choices_that_do(overrides, words, remedies):
    message = refusal("paper", overrides)
    assert re.match(words, message), message
    for remedy in remedies:
        config = resolve("paper", overrides, remedy)
        assert {name: look_up(config, name) for name in remedy} == remedy


@pytest.mark.parametrize(
    "overrides",
    [
        {**REPTILE, "leap.metric": "length", RHO: 1},  # the metric is leap's alone
        {**REPTILE, "leap.metric": "length", "mode": "fedasync"},
        {**LAMBDA_0, "mode": "fedasync", "meta.learning_rate": 1},
        {"meta_learner": "leap", RHO: 0.5, "mode": "buffered"},
        {"meta_learner": "finetune-single", "mode": "fedasync"},
        {"meta_learner": "finetune-multi", "meta.shared": "convolutions"},
        {"mode": "stream", "meta_learner": "none", "meta.shift": "trajectory"},
        {"mode": "async", "server.on_lost": "keep"},
        {"mode": "async", "meta.optimizer": "adam"},  # a hazard, not a contradiction
        {"mode": "delayed-nesterov", "meta.momentum": 0.5, RHO: 0.5},
        {"meta.optimizer": "sgd", "meta.momentum": 0.9, "meta.nesterov": True},
        {"meta.optimizer": "rmsprop", "meta.momentum": 0.9},
        {"meta.optimizer": "adamw", "meta.weight_decay": 0.1},
        {"meta_learner": "fomaml", "task_steps": 3360},
    ],
    ids=str,
)
def test_what_goes_together_is_not_refused(overrides):
    config = resolve("paper", overrides)
    assert {name: look_up(config, name) for name in overrides} == overrides


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {"mode": st.sampled_from(MODES), "meta_learner": st.sampled_from(LEARNERS)},
        optional={
            "leap.metric": st.sampled_from(["energy", "length"]),
            "leap.loss_weight": st.sampled_from([0, 1]),
            "meta.shared": st.sampled_from(["encoder", "convolutions"]),
            "meta.optimizer": st.sampled_from(get_args(FIELDS["meta.optimizer"][1])),
            "meta.learning_rate": st.sampled_from([0.5, 2]),
            "meta.momentum": st.sampled_from([0, 0.9]),
            "meta.nesterov": st.booleans(),
            "meta.weight_decay": st.sampled_from([0, 0.1]),
            "meta.normalize": st.booleans(),
            RHO: st.sampled_from([0, 0.5]),
            "meta.shift": st.sampled_from(["no", "increments", "trajectory"]),
            "server.on_lost": st.sampled_from(["retry", "keep"]),
        },
    )
)
def test_whatever_is_chosen_resolves_or_is_answered_with_a_field_its_value_and_a_choice(overrides):
    try:
        config = resolve("paper", overrides)
    except ConfigError as error:
        field, value, choice = re.fullmatch(r"([a-z_.]+): (\S+) .*; use (.+)", one_line(error)).groups()
        assert field in FIELDS
        assert choice
        if field in overrides:
            given_value = overrides[field]
            assert value == (str(given_value).lower() if isinstance(given_value, bool) else str(given_value))
    else:
        assert {name: look_up(config, name) for name in overrides} == overrides


# --- what a choice brings along ------------------------------------------------------------------------------------

# Meta-optimizer and learning rate by default: the notes, sections 3 and 4. None: refused, for the reason below.
BY_DEFAULT: dict[str, dict[str, tuple[str, float] | None]] = {
    learner: {
        "sync": own,
        "buffered": own,
        "async": applied_as_they_come,
        "fedasync": None if learner in ("leap", "fomaml", "none") else ("sgd", 0.6),
        "delayed-nesterov": ("sgd", 0.7),
        "stream": None if learner == "fomaml" else applied_as_they_come,
    }
    for learner, own, applied_as_they_come in (
        ("leap", ("adam", 0.001), ("sgd", 0.1)),
        ("reptile", ("sgd", 0.1), ("sgd", 0.1)),
        ("fomaml", ("sgd", 0.5), ("sgd", 0.5)),
        ("finetune-multi", ("sgd", 1.0), ("sgd", 1.0)),
        ("finetune-single", ("sgd", 1.0), ("sgd", 1.0)),
        ("none", ("sgd", 0.001), ("sgd", 0.1)),  # it applies nothing
    )
} | {"multitask": {**dict.fromkeys(MODES), "sync": ("sgd", 1.0)}}
WHY_NOT = {
    ("leap", "fedasync"): "has no place for the loss term of leap",
    ("fomaml", "fedasync"): "unlike those of meta_learner fomaml",
    ("none", "fedasync"): "unlike those of meta_learner none",
    ("fomaml", "stream"): "fomaml has no increments to stream",
    **{
        ("multitask", mode): f"mode: {mode} does not go with meta_learner multitask" for mode in MODES if mode != "sync"
    },
}
PAIRS = [(learner, mode) for learner in LEARNERS for mode in MODES]


@pytest.mark.parametrize(("learner", "mode"), PAIRS)
@pytest.mark.parametrize("preset", ["paper", "smoke"])
def test_every_meta_learner_and_mode_resolve_with_their_defaults_or_say_why_not(tmp_path, preset, learner, mode):
    chosen = {"meta_learner": learner, "mode": mode}
    expected = BY_DEFAULT[learner][mode]
    if expected is None:
        assert WHY_NOT[learner, mode] in refusal(preset, chosen)
        return
    config = resolve(preset, chosen)
    assert (config.meta_learner, config.mode) == (learner, mode)
    assert (config.meta.optimizer, config.meta.learning_rate) == expected
    delayed = mode == "delayed-nesterov"
    assert (config.meta.momentum, config.meta.nesterov) == ((0.9, True) if delayed else (0.0, False))
    assert config.server.on_lost == ("keep" if mode == "stream" else "retry")
    assert read_back(write(tmp_path / "config.yaml", config)) == config


@pytest.mark.parametrize(
    ("learner", "mode"), [pair for pair in PAIRS if pair not in WHY_NOT and "multitask" not in pair]
)
def test_a_written_configuration_keeps_what_was_given_instead_of_the_defaults(tmp_path, learner, mode):
    chosen = {"meta_learner": learner, "mode": mode}
    given_values = {"meta.optimizer": "sgd", "meta.learning_rate": 0.25, "meta.momentum": 0.5, "meta.nesterov": True}
    if mode == "fedasync":
        given_values |= {"meta.momentum": 0, "meta.nesterov": False}
    config = resolve("paper", chosen, given_values)
    assert {name: look_up(config, name) for name in given_values} == given_values
    assert config == resolve("paper", given_values, chosen), "whichever was given first"
    assert read_back(write(tmp_path / "config.yaml", config)) == config


EXACTLY = "does not go with meta_learner multitask, whose learner continues exactly where it stopped"
REFUSED_INSTEAD = {
    ("multitask", "mode"): f"mode: buffered {EXACTLY}; use sync",
    ("multitask", "meta.optimizer"): f"meta.optimizer: rmsprop {EXACTLY}; use sgd",
    ("multitask", "meta.learning_rate"): f"meta.learning_rate: 0.25 {EXACTLY}; use 1",
    ("multitask", "meta.contribution_clip"): f"meta.contribution_clip: 2 {EXACTLY}; use 0",
    ("stream", "server.on_lost"): "server.on_lost: retry",
    ("fedasync", "meta.optimizer"): "meta.optimizer: rmsprop",
    ("delayed-nesterov", "meta.optimizer"): "meta.optimizer: rmsprop",
    ("delayed-nesterov", "meta.nesterov"): "without meta.nesterov",
}
GIVEN = {
    "meta.optimizer": "rmsprop",
    "meta.learning_rate": 0.25,
    "meta.momentum": 0.75,
    "meta.nesterov": False,
    "server.on_lost": "retry",
    "meta.contribution_clip": 2.0,
    "meta.staleness": "hinge",
    "mode": "buffered",
    "workers": 7,
}


@pytest.mark.parametrize(
    ("field", "choice", "name"), [(field, choice, name) for field, choice, brought in DEFAULTS for name in brought]
)
def test_what_is_given_wins_over_what_a_choice_brings(field, choice, name):
    context = {field: choice, **(REPTILE if choice == "fedasync" else {})}
    context |= {"mode": "stream"} if field == "meta.shift" else {}
    for overrides in ([{**context, name: GIVEN[name]}], [{name: GIVEN[name]}, context], [context, {name: GIVEN[name]}]):
        if (choice, name) in REFUSED_INSTEAD:  # and not quietly replaced
            assert REFUSED_INSTEAD[choice, name] in refusal("paper", *overrides)
        else:
            assert look_up(resolve("paper", *overrides), name) == GIVEN[name]


def values_like_yaml() -> st.SearchStrategy[Any]:
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.sampled_from([10**400, 2**53 + 1, "1e999", "-5\n", "٣", "0x10", "1__0"])
        | st.floats()
        | st.text()
        | st.text("0123456789.eE+-_ \n", max_size=8)
        | st.binary()
        | st.dates()
        | st.datetimes()
        | st.sampled_from(["pong", "seed24", "energy", "auto", "cpu", "yes", "inside", "sync"])
    )
    return st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(), values_like_yaml(), max_size=3),
)
@example("paper", {"games": [["pong"]]})
@example("paper", {"mode": {}})
@example("paper", {"seed": datetime.date(2026, 1, 1)})
def test_resolve_returns_a_config_or_raises_configerror(preset, overrides):
    try:
        config = resolve(preset, overrides)
    except ConfigError as error:
        one_line(error)
    else:
        assert isinstance(config, Config)
        for name, (field, kind) in FIELDS.items():
            value = look_up(config, name)
            if kind in (int, float):
                assert type(value) is kind
                assert field.metadata["low"] <= value <= field.metadata["high"]
                assert value > field.metadata["above"]


# --- YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_there_and_back_is_the_same_configuration(tmp_path, preset):
    config = resolve(preset, {"agent.learning_rate": 1e-7, "workers": 5, "leap.stabilize": False, "address": "12:30"})
    again = read_back(write(tmp_path / "config.yaml", config))
    assert again == config
    assert resolve(preset) != config
    assert to_yaml(again) == to_yaml(config)


def valid(name: str) -> st.SearchStrategy[Any]:
    field, kind = FIELDS[name]
    low, high, above = (field.metadata[key] for key in ("low", "high", "above"))
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if name == "games":
        return st.lists(st.sampled_from([*available(), *SETS]), min_size=1, max_size=5)
    if name == "gymnasium.modules":
        return st.lists(st.from_regex(r"[a-z]{1,4}(\.[a-z]{1,4})?", fullmatch=True), max_size=3)
    if name == "worker.labels":
        return st.lists(st.from_regex(r"[a-z]{1,4}!?=[a-z0-9]{1,4}", fullmatch=True), max_size=3)
    if name == "workers":
        return st.just("auto") | st.integers(1, 100_000)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(int(low), None if math.isinf(high) else int(high))
    if kind is float:
        bounded = st.floats(
            max(low, above), high if math.isfinite(high) else None, allow_nan=False, allow_infinity=False
        )
        return bounded.filter(lambda value: value > above)
    if name in ("data_dir", "init", "telemetry.project"):
        return st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters=":"), min_size=1)
    assert name == "address"
    host = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="@"), min_size=1)
    return st.sampled_from(["local", "auto"]) | st.builds("{}:{}".format, host, st.integers(1, 65535))


LOOSE = {"task_steps": 10**12, "server.lease_seconds": 1e300, "worker.heartbeat_seconds": 1.0, "worker.gpus": 0.0}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_yaml_there_and_back_for_arbitrary_settings(tmp_path, data):
    names = st.lists(st.sampled_from(sorted(set(FIELDS) - set(LOOSE) - {"preset"})), unique=True, max_size=6)
    overrides = {name: data.draw(valid(name), label=name) for name in data.draw(names)}
    try:
        config = resolve(data.draw(st.sampled_from(sorted(PRESETS))), LOOSE, overrides)
    except ConfigError as error:  # settings that do not go together
        one_line(error)
        reject()
    assert read_back(write(tmp_path / "config.yaml", config)) == config


def test_yaml_may_nest_sections_or_write_dotted_names(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("agent: {envs: 8}\nleap.metric: length\nworkers: 3\nmeta-updates: 9\n")
    loaded = read_yaml(path)
    assert loaded == {"agent.envs": 8, "leap.metric": "length", "workers": 3, "meta_updates": 9}
    config = resolve("paper", loaded)
    assert (config.agent.envs, config.leap.metric, config.workers, config.meta_updates) == (8, "length", 3, 9)


def test_an_empty_file_changes_nothing(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert read_yaml(path) == {}


def refused_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(path) in one_line(caught.value), "which file"


@pytest.mark.parametrize(
    "content",
    [
        b"- a\n- b\n",
        b"just text",
        b"17",
        b"a: [1, 2",
        b"a: b: c",
        b"\t- x",
        b"\xff\xfe\x00",
        b"\x80abc",
        b"a: \x00",
        b"a: *unknown",
        b"!!python/object/apply:os.system [true]",
        b"? [1, 2]\n: 3",
        b"<<: 3",
        b"seed: 2026-13-45",  # a timestamp to YAML: the resolver accepts it, datetime does not
        b"seed: 0x_",  # an integer without digits
        b"seed: 0b_",
        b"seed: " + b"9" * 5000,  # more digits than Python turns into an integer
        b"seed: !!int",
        b"leap.stabilize: !!bool maybe",
        b"seed: !!timestamp x",
        b"[" * 700,  # deeper than Python's stack
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path, content):
    refused_file(tmp_path / "bad.yaml", content)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        assert str(path) in one_line(caught.value)


SNIPPETS = [
    *(
        "workers",
        "agent",
        "envs",
        ":",
        ": ",
        "\n",
        "  ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        "&a",
        "*a",
        "<<",
        "!!int",
        "!!binary",
    ),
    *("?", "|", ">", "'", '"', "#", "0x", "_", "1", "2026-02-31", "1:60", ".inf", "~", "\t", "%", "@", "\\", "é"),
]
snippets = st.lists(st.sampled_from(SNIPPETS), max_size=14).map(lambda parts: "".join(parts).encode())


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | snippets)
def test_read_yaml_returns_settings_or_raises_configerror(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    try:
        loaded = read_yaml(path)
        assert all(isinstance(name, str) for name in loaded)
        resolve("paper", loaded)
    except ConfigError as error:
        one_line(error)


# --- resuming ------------------------------------------------------------------------------------------------------

CONTEXT = {
    "meta.momentum": {"meta.optimizer": "sgd"},
    "meta.nesterov": {"meta.optimizer": "sgd", "meta.momentum": 0.5},
    "meta.weight_decay": {"meta.optimizer": "adamw"},
    "meta.shift": {"mode": "stream"},
    "fomaml.rollouts": {"task_steps": 10**9},
    "meta.endpoint_correction": {"leap.metric": "energy"},
    "min_workers": {"workers": 100_000},
    "supervised.patience_steps": {"supervised.patience": 0},
    "early_stopping.interval": {"tasks": "omniglot"},
    "worker.stack": {"tasks": "omniglot"},
}
"""What else has to be set for a setting to have a meaning."""

OTHER_VALUES = {
    "games": "pong",
    "init": "runs/other",
    "task_steps": 5_000,
    "mode": "sync",
    "seed": 5,
    "leap.metric": "length",
    "leap.loss_weight": 0.5,
    "leap.stabilize": False,
    "leap.final_loss": True,
    "leap.loss_smoothing": 0.5,
    "leap.loss_warmup": 0.1,
    "meta.batch_size": 7,
    "meta.optimizer": "sgd",
    "meta.learning_rate": 0.5,
    "meta.momentum": 0.5,
    "meta.staleness": "hinge",
    "meta.max_staleness": 9,
    "meta.contribution_clip": 0.0,
    "meta.refuse_norm": 0.0,
    "meta.clip_window": 9,
    "sampling": "replacement",
    "meta.normalize": True,
    "meta.shared": "convolutions",
    "meta.nesterov": True,
    "meta.weight_decay": 0.1,
    "meta.schedule": "cosine",
    "meta.max_norm": 1.0,
    "meta.endpoint_correction": 0.5,
    "meta.shift": "increments",
    "meta.max_shift": 0.5,
    "fomaml.rollouts": 9,
    "agent.envs": 9,
    "agent.unroll": 9,
    "agent.learning_rate": 0.5,
    "agent.epsilon": 0.5,
    "agent.epsilon_form": "inside",
    "agent.decay": 0.5,
    "agent.max_grad_norm": 9.0,
    "agent.discount": 0.5,
    "agent.entropy_cost": 0.5,
    "agent.value_cost": 0.9,
    "agent.reward_clip": "none",
    "atari.frames": "rgb4",
    "atari.frame_skip": 2,
    "atari.noop_max": 3,
    "atari.fire_on_reset": False,
    "atari.sticky_actions": 0.25,
    "atari.life_loss": False,
    "atari.max_episode_frames": 500,
    "atari.full_actions": True,
    "supervised.batch": 7,
    "supervised.learning_rate": 0.5,
    "supervised.augmentation": "turned",
    "supervised.shuffle": "task",
    "supervised.pretraining": 7,
    "supervised.labels": "drawn",
    "supervised.resampling": "nearest",
    "supervised.epochs": 3,
    "supervised.patience": 4,
    "supervised.validation": 0.25,
    "gymnasium.frames": "rgb4",
    "gymnasium.max_episode_steps": 12,
    "supervised.rotations": 9,
    "supervised.split": "first",
    "supervised.held_out_images": "upright",
    "supervised.polarity": "black-ink",
    "supervised.network": "norm-pool",
    "supervised.patience_steps": 40,
    "supervised.validation_interval": 9,
    "supervised.test_learning_rate": 0.5,
    "supervised.test_epochs": 9,
    "supervised.test_interval": 9,
    "early_stopping.interval": 9,
    "early_stopping.patience": 9,
    "early_stopping.task_steps": 5_000,
}
PLACEMENT = {
    "gymnasium.modules": ("here", "there.too"),
    "workers": 77,
    "min_workers": 7,
    "wait_for_nodes": True,
    "worker.labels": ("pool=spot", "zone!=b"),
    "server.storage": "node",
    "meta_updates": 500,
    "address": "auto",
    "insecure": True,
    "data_dir": "elsewhere",
    "worker.device": "cuda",
    "worker.threads": 3,
    "server.pushes_per_second": 7.0,
    "server.busy_share": 0.25,
    "server.gather_seconds": 3.0,
    "worker.cpus": 3.0,
    "worker.gpus": 0.5,
    "worker.mps": "no",
    "worker.push_interval": 999,
    "worker.wire": "int8",
    "worker.heartbeat_seconds": 1.0,
    "worker.state_seconds": 60.0,
    "server.lease_seconds": 99.0,
    "server.keep_checkpoints": 9,
    "telemetry.gif_interval": 3,
    "telemetry.agreement_interval": 3,
    "telemetry.tracker": "wandb",
    "telemetry.project": "another",
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_setting_that_defines_what_is_learned_cannot_change(name):
    context = CONTEXT.get(name, {})
    preset = "paper" if "tasks" in context else "paper-async"
    old, new = resolve(preset, context), resolve(preset, context, {name: OTHER_VALUES[name]})
    assert incompatibilities(old, new) == [f"{name}: {look_up(old, name)} -> {look_up(new, name)}"]
    assert look_up(old, name) != look_up(new, name)


def test_how_long_and_where_a_run_runs_may_change():
    old, new = resolve("paper"), resolve("paper", PLACEMENT)
    assert all(look_up(old, name) != look_up(new, name) for name in PLACEMENT)
    assert incompatibilities(old, new) == []
    assert incompatibilities(old, old) == []


@pytest.mark.parametrize(
    ("old", "now"), [(True, "increments"), ("yes", "increments"), ("True", "increments"), (False, "no"), ("no", "no")]
)
def test_shift_used_to_be_a_switch(old, now):
    assert resolve("smoke", {"mode": "stream", "meta.shift": old}).meta.shift == now
    assert same_setting("meta.shift", old, now)
    assert not same_setting("meta.shift", old, "trajectory")
    assert not same_setting("meta.nesterov", "no", False), "that never was anything but a switch"
    assert "meta.shift: 'always' is not one of no, increments, trajectory" in refusal("smoke", {"meta.shift": "always"})


def test_a_run_begun_when_paper_was_asynchronous_stays_what_it_was(tmp_path):
    before = {"mode": "buffered", "meta.contribution_clip": 3.0, "agent.epsilon_form": "inside"}
    (tmp_path / "config.yaml").write_text(to_yaml(resolve("paper", before)))
    resumed = run_directory.load_config(tmp_path, {}, preset="paper")
    assert {name: look_up(resumed, name) for name in before} == before
    assert before.items().isdisjoint({name: look_up(resolve("paper"), name) for name in before}.items())


def test_a_setting_that_a_file_lacks_has_its_default_and_not_a_presets():
    """The file of a run that is older than the setting: the preset said nothing of it then."""
    saved = {"preset": "paper", "tasks": "omniglot", "games": ["greek"], "supervised.batch": 20}
    assert resolve("paper", saved).supervised.rotations == 36
    assert resolve("paper", completed(saved)).supervised.rotations == 0
    assert completed({**saved, "supervised.rotations": 9})["supervised.rotations"] == 9


def test_all_changes_are_listed():
    together = {name: value for name, value in OTHER_VALUES.items() if name not in CONTEXT} | {"meta.momentum": 0.5}
    changes = incompatibilities(resolve("paper-async"), resolve("paper-async", together, PLACEMENT))
    assert [change.split(":")[0] for change in changes] == [name for name in FIELDS if name in together]


def test_every_setting_is_on_one_side_or_the_other():
    """A new setting has to be thought about."""
    undecided = set(FIELDS) - set(OTHER_VALUES) - set(PLACEMENT)
    # The last one may change, but only in runs on images: tests/worker/test_run_stack.py.
    assert undecided == {"preset", "tasks", "meta_learner", "worker.precision", "server.on_lost", "worker.stack"}
    assert "tasks" in fixed_settings(resolve("paper"))


def test_another_optimizer_does_not_get_the_rates_of_the_one_that_a_choice_brings():
    config = resolve("fast", {"meta_learner": "reptile", "meta.optimizer": "adam"})
    assert (config.meta.optimizer, config.meta.learning_rate) == ("adam", 1e-3)
    config = resolve("fast", {"mode": "stream", "meta.optimizer": "adam"})
    assert (config.meta.learning_rate, config.server.on_lost) == (1e-3, "keep")
    config = resolve("quick", {"meta_learner": "reptile", "meta.optimizer": "sgd"})
    assert config.meta.learning_rate == 0.1
