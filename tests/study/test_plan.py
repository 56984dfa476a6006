"""From a command's settings to the configuration of every run of a study."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import ALPHABETS, expand
from leap_dist.storage import run_directory
from leap_dist.storage.locks import RunLock
from leap_dist.study.plan import Cell, Plan, make, merge, parse_of_arms
from leap_dist.study.spec import Study, progress, progress_text


def planned(**changes: Any) -> Plan:
    given = {"tasks": "omniglot", **changes.pop("given", {})}
    settings = {
        "preset": "paper",
        "arms": ["none", "reptile", "leap"],
        "groups": ["4", "20"],
        "seeds": 2,
        "of_arms": {},
        "test_steps": None,
    }
    return make(given=given, **{**settings, **changes})


def test_cells_come_seed_by_seed_and_arms_in_their_order():
    cells = list(planned(given={"seed": "5"}).cells())
    assert [str(cell) for cell in cells[:4]] == [
        "leap, group 4, seed 5",
        "reptile, group 4, seed 5",
        "none, group 4, seed 5",
        "leap, group 20, seed 5",
    ]
    assert len(cells) == 12
    assert {cell.seed for cell in cells} == {5, 6}


def test_a_group_of_omniglot_is_so_many_alphabets_and_the_held_out_ones_are_the_seeds():
    plan = planned()
    by_cell = {cell: plan.training(cell) for cell in plan.cells()}
    for cell, config in by_cell.items():
        assert (config.meta_learner, config.seed) == (cell.arm, cell.seed)
        assert len(config.games) == int(cell.group)
        test = plan.test(cell.group, cell.seed)
        assert test.games == expand("omniglot", ("held_out",), seed=cell.seed, pretraining=1)
        assert not set(test.games) & set(config.games)
        assert (test.meta_learner, test.task_steps) == ("none", config.task_steps)
        assert replace(test.supervised, pretraining=int(cell.group)) == config.supervised


def test_a_group_of_multi_cv_is_what_is_held_out():
    plan = planned(given={"tasks": "multi-cv", "games": "mnist,svhn,cifar10"}, groups=[], test_steps=999)
    assert plan.study.groups == ("mnist", "svhn", "cifar10")
    for cell in plan.cells():
        assert plan.training(cell).games == tuple(name for name in ("mnist", "svhn", "cifar10") if name != cell.group)
        assert plan.test(cell.group, cell.seed).games == (cell.group,)
        assert plan.test(cell.group, cell.seed).task_steps == 999


def test_joint_learning_is_an_arm_with_the_same_budget_in_longer_tasks():
    for given, groups in (({}, ["4"]), ({"tasks": "atari"}, ["camera25"])):
        plan = planned(arms=["leap", "multitask"], given={"mode": "sync", **given}, groups=groups)
        leap, joint = (plan.training(Cell(groups[0], 0, arm)) for arm in plan.study.arms)
        assert (joint.workers, joint.meta.learning_rate, joint.meta.contribution_clip) == (1, 1.0, 0.0)
        assert joint.total_tasks * leap.meta.batch_size == leap.total_tasks
        assert joint.steps_of_task == leap.steps_of_task * leap.meta.batch_size


def test_the_steps_of_a_joint_task_count_as_many_as_a_batch(tmp_path):
    plan = planned(arms=["multitask"], given={"tasks": "atari"}, groups=["camera25"], seeds=1)
    folder = tmp_path / "camera25" / "seed0" / "multitask"
    folder.mkdir(parents=True)
    run_directory.write_summary(folder, {"state": "died", "tasks": 3, "tasks_wanted": 100})
    assert plan.steps_done(tmp_path) == 3 * plan.study.batch_size * plan.study.task_steps


def test_without_arms_given_those_of_the_paper_that_go_with_the_tasks_are_compared():
    assert planned(arms=[]).study.arms == ("leap", "reptile", "fomaml", "finetune-multi", "finetune-single", "none")
    multi_cv = planned(arms=[], given={"tasks": "multi-cv", "games": "mnist,svhn"}, groups=[])
    assert multi_cv.study.arms == ("leap", "reptile", "fomaml", "finetune-multi", "none")


def test_an_arm_may_have_settings_of_its_own():
    plan = planned(
        given={"meta.learning_rate": "0.2"},
        of_arms=parse_of_arms(["reptile:meta.learning-rate=0.5", "reptile:meta.momentum=0.3"]),
    )
    found = {cell.arm: plan.training(cell).meta for cell in plan.cells() if cell.arm != "none"}
    assert (found["leap"].learning_rate, found["leap"].momentum) == (0.2, 0.0)
    assert (found["reptile"].learning_rate, found["reptile"].momentum) == (0.5, 0.3)
    assert "supervised.pretraining" not in plan.study.settings["leap"], "it is the group's"
    assert plan.study.settings["reptile"]["meta.learning_rate"] == 0.5
    assert plan.study.settings["leap"]["leap.metric"] == "length"


def test_a_study_grows_by_arms_groups_and_seeds():
    old, new = planned(seeds=1).study, planned(arms=["fomaml", "leap"], groups=["10"], seeds=3).study
    both = merge(old, new)
    assert both.arms == ("leap", "reptile", "fomaml", "none")
    assert both.groups == ("4", "10", "20")
    assert both.seeds == (0, 1, 2)
    assert set(both.settings) == set(both.arms)
    assert merge(old, old) == old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": {"supervised.learning_rate": 0.5}}, "learning_rate: the study there has 0.1 for tests, not 0.5"),
        ({"given": {"task_steps": 1000}}, "task_steps: the study there has 10000, not 1000"),
        ({"given": {"meta_updates": 9}}, "meta_updates: the study there has 1000, not 9"),
        ({"test_steps": 400}, "task_steps: the study there has 10000 for tests, not 400"),
        ({"arms": ["fomaml"], "given": {"supervised.batch": 5}}, "batch: the study there has 20 for tests, not 5"),
        ({"given": {"worker.precision": "float32"}}, "precision: the study there has auto for tests, not float32"),
        ({"given": {"tasks": "multi-cv", "games": "mnist,svhn"}, "groups": []}, "tasks: the study there has omniglot"),
    ],
)  # fmt: skip
def test_one_folder_has_one_study(change, message):
    with pytest.raises(ConfigError, match=message):
        merge(planned().study, planned(**change).study)


def test_data_sets_of_a_study_do_not_change():
    old = planned(given={"tasks": "multi-cv", "games": "mnist,svhn,cifar10"}, groups=["mnist"]).study
    new = planned(given={"tasks": "multi-cv", "games": "mnist,svhn,gtsrb"}, groups=["mnist"]).study
    with pytest.raises(ConfigError, match="games: the study there has mnist svhn cifar10, not mnist svhn gtsrb"):
        merge(old, new)


OLD = {
    "task_steps": 2000,
    "supervised.rotations": 0,
    "supervised.network": "pool-norm",
    "supervised.patience_steps": 0,
    "early_stopping.interval": 0,
}
"""What the preset `paper` was before it followed appendix C."""
NEW_NAMES = ("rotations", "split", "held_out_images", "polarity", "network", "patience_steps", "test_interval",
             "test_epochs", "validation_interval", "test_learning_rate", "shuffle")  # fmt: skip


def test_tests_of_multi_cv_may_have_more_epochs_than_training():
    """Appendix D: at most ten epochs while an initialization is trained, and at most 100 when it is tested."""
    given = {"tasks": "multi-cv", "games": "mnist,svhn,cifar10"}
    plan = planned(given=given, groups=["mnist"])
    training, test = plan.training(next(iter(plan.cells()))), plan.test("mnist", 0)
    assert (training.supervised.epochs, test.supervised.epochs) == (10, 100)
    assert (training.task_steps, test.task_steps) == (740_000, 7_400_000)
    again = planned(given={"tasks": "multi-cv"}, groups=["mnist"], existing=plan.study)
    assert (again.test("mnist", 0), again.study) == (test, plan.study)
    shorter = planned(given={**given, "supervised.test_epochs": 0}, groups=["mnist"], test_steps=999)
    assert (shorter.test("mnist", 0).supervised.epochs, shorter.test("mnist", 0).task_steps) == (10, 999)


def an_old_study() -> Study:
    study = planned(arms=["leap", "none"], given=OLD, test_steps=1000).study
    for settings in (*study.settings.values(), study.test):
        for name in list(settings):
            if name.startswith("early_stopping.") or name in [f"supervised.{new}" for new in NEW_NAMES]:
                del settings[name]
        if "meta.shift" in settings:
            settings["meta.shift"] = False  # it was a switch
    return study


def test_the_command_that_began_a_study_continues_it_whatever_its_preset_has_become():
    old = an_old_study()
    assert "supervised.rotations" not in old.settings["leap"]
    with pytest.raises(ConfigError, match="there has 2000, not 10000"):
        merge(old, planned(arms=["leap", "none"]).study)
    plan = planned(arms=["leap", "none", "finetune-multi"], seeds=3, existing=old)
    both = merge(old, plan.study)
    assert (both.task_steps, both.meta_updates, both.test["task_steps"], len(both.seeds)) == (2000, 1000, 1000, 3)
    for cell in plan.cells():
        config = plan.training(cell)
        assert (config.supervised.rotations, config.task_steps, config.early_stopping.interval) == (0, 2000, 0)
        assert (config.supervised.learning_rate, config.supervised.test_learning_rate) == (0.1, 0.0)
    assert plan.training(Cell("4", 0, "finetune-multi")).meta.learning_rate == 1.0, "an arm that is added has its own"
    assert plan.test("4", 0).supervised == replace(plan.training(Cell("4", 0, "leap")).supervised, pretraining=20)
    with pytest.raises(ConfigError, match="rotations: the study there has 0 for tests, not 36"):
        merge(old, planned(existing=old, given={"supervised.rotations": "36"}).study)


def test_a_study_that_is_older_than_the_order_of_whole_tasks_continues_in_epochs():
    begun = planned(preset="authors").study
    assert {settings["supervised.shuffle"] for settings in (begun.test, *begun.settings.values())} == {"task"}
    for settings in (begun.test, *begun.settings.values()):
        del settings["supervised.shuffle"]
    again = planned(preset="authors", arms=["none", "reptile", "leap", "fomaml"], existing=begun)
    shuffles = {again.training(cell).supervised.shuffle for cell in again.cells()}
    assert shuffles | {again.test("4", 0).supervised.shuffle} == {"epoch"}
    with pytest.raises(ConfigError, match="shuffle: the study there has epoch for tests, not task"):
        planned(preset="authors", given={"supervised.shuffle": "task"}, existing=begun)


def test_a_study_keeps_the_settings_with_which_it_was_begun():
    begun = planned(given={"supervised.rotations": "9", "meta_updates": "7"}, of_arms={"leap": {"meta.momentum": 0.5}})
    again = planned(arms=["reptile", "leap", "none", "fomaml"], existing=begun.study)
    assert merge(begun.study, again.study).settings["leap"] == begun.study.settings["leap"]
    assert again.training(Cell("4", 0, "leap")).meta.momentum == 0.5
    assert again.training(Cell("4", 0, "reptile")).meta.learning_rate == 0.01
    added = again.training(Cell("4", 0, "fomaml"))
    assert (added.supervised.rotations, added.meta_updates, added.meta.learning_rate) == (9, 7, 0.5)
    finetuned = planned(arms=["finetune-multi"], existing=begun.study).training(Cell("4", 0, "finetune-multi"))
    assert (finetuned.supervised.learning_rate, finetuned.supervised.rotations) == (0.01, 9)


FINETUNE = Cell("4", 0, "finetune-multi")


@pytest.mark.parametrize(
    ("own", "rate"),
    [
        ({}, 0.01),
        ({"supervised.test_learning_rate": "0.03"}, 0.03),
        ({"supervised.test_learning_rate": "0"}, 0.1),
        ({"supervised.test_learning_rate": "0", "supervised.learning_rate": "0.1"}, 0.0),
    ],
)
def test_a_run_is_validated_with_the_rate_of_its_tests(own, rate):
    """Its own test rate, or the one that all tests share, 0.1: 0 would be the rate it is trained with."""
    command = {"arms": ["leap", "finetune-multi"], "of_arms": {"finetune-multi": own}}
    begun = planned(**command)
    assert begun.training(FINETUNE).supervised.test_learning_rate == rate
    assert begun.study.settings["finetune-multi"]["supervised.test_learning_rate"] == rate
    again = planned(**command, existing=begun.study)
    assert merge(begun.study, again.study) == begun.study, "the same command continues the study"
    assert planned(arms=["finetune-multi"], existing=begun.study).training(FINETUNE) == begun.training(FINETUNE)
    unmeasured = planned(**command, given={"early_stopping.interval": 0}).training(FINETUNE)
    assert unmeasured.supervised.test_learning_rate == float(own.get("supervised.test_learning_rate", rate))


def test_a_study_that_was_begun_with_another_rate_of_validation_keeps_it():
    begun = planned(arms=["leap", "finetune-multi"]).study
    begun.settings["finetune-multi"]["supervised.test_learning_rate"] = 0.0
    again = planned(
        arms=["leap", "finetune-multi", "multitask"],
        existing=begun,
        of_arms={"multitask": {"supervised.test_learning_rate": "0"}},
    )
    assert again.training(FINETUNE).supervised.test_learning_rate == 0.0
    assert again.training(Cell("4", 0, "multitask")).supervised.test_learning_rate == 0.1, "of an arm that is added"


def test_data_sets_of_a_study_that_is_continued_need_not_be_named_again():
    begun = planned(given={"tasks": "multi-cv", "games": "mnist,svhn,cifar10"}, groups=["mnist"])
    again = planned(given={"tasks": "multi-cv"}, groups=["svhn"], existing=begun.study)
    assert merge(begun.study, again.study).groups == ("mnist", "svhn")


def test_how_it_runs_may_change():
    assert merge(planned().study, planned(given={"workers": 7, "server.lease_seconds": 99}).study)


def test_a_setting_that_is_younger_than_the_study_had_its_default():
    old, new = planned().study, planned().study
    for settings in old.settings.values():
        del settings["supervised.labels"]
    assert merge(old, new).settings == new.settings


@pytest.mark.parametrize("names", ["mnist,fashion_mnist,cifar10", "MNIST,Fashion-MNIST,cifar10", "all"])
def test_what_is_held_out_is_never_trained_on_however_it_is_typed(names):
    plan = planned(arms=["leap"], given={"tasks": "multi-cv", "games": names}, groups=["Fashion-MNIST", "mnist"])
    assert plan.study.groups == ("fashion_mnist", "mnist")
    for cell in plan.cells():
        config = plan.training(cell)
        assert cell.group not in config.games
        assert len(config.games) == len(plan.study.games) - 1
    assert set(plan.everything().games) == set(plan.study.games)


def test_groups_are_numbers_however_they_are_typed():
    assert planned(groups=["04", "4", "20"]).study.groups == ("4", "20")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds: 0 is not between 1 and 1,000"),
        ({"arms": ["lepa"]}, "arms: no meta-learner 'lepa' among leap, reptile"),
        ({"groups": ["36"]}, "groups: '36' is not a number of alphabets from 1 to 35"),
        ({"groups": ["²"]}, "groups: '²' is not a number"),
        ({"groups": ["9" * 5000]}, "groups: "),
        ({"test_steps": 19}, "test_steps: 19 is less than 20, the steps of one update"),
        ({"given": {"tasks": "images"}}, "tasks: a study needs atari, omniglot or multi-cv"),
        ({"given": {"tasks": "multi-cv", "games": "mnist"}, "groups": []}, "games: mnist alone leaves nothing"),
        ({"given": {"tasks": "multi-cv", "games": "mnist,svhn"}, "groups": ["gtsrb"]}, "'gtsrb' is not one of the"),
        ({"of_arms": {"leap": {"meta.momentun": 1}}}, "meta.momentun: no such setting; did you mean meta.momentum"),
        ({"of_arms": {"none": {}, "lepa": {}}}, "no meta-learner 'lepa'"),
        ({"of_arms": {"fomaml": {"meta.momentum": 0.1}}}, "with: fomaml is not one of the arms"),
        ({"of_arms": {"leap": {"meta_updates": 7}}}, "with: meta_updates is the same for all arms"),
        ({"of_arms": {"leap": {"seed": 7}}}, "with: seed is the same for all arms"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planned(**change)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["leap", "leap:meta.momentum", "meta.momentum=1", ""])
def test_what_is_no_setting_of_an_arm_is_refused(text):
    with pytest.raises(ConfigError, match="is not ARM:SETTING=VALUE"):
        parse_of_arms([text])


def test_progress_is_told_from_what_runs_have_written(tmp_path):
    study = planned().study
    study.write(tmp_path)
    states = {"4/seed0/leap": ("done", 4), "4/seed0/reptile": ("running", 1), "4/seed0/test": ("done", 30)}
    for name in states:
        (tmp_path / name).mkdir(parents=True)
    for arm in study.arms:
        (tmp_path / "4/seed0/test/runs" / arm).mkdir(parents=True)
    lock = RunLock(tmp_path / "4/seed0/reptile")
    for name, (state, done) in states.items():
        run_directory.write_summary(tmp_path / name, {"state": state, "tasks": done, "tasks_wanted": 4})
    found = progress(tmp_path)
    assert (found["trained"], found["to_train"], found["tested"], found["to_test"]) == (1, 8, 1, 4)
    lines = progress_text(found).splitlines()
    assert lines[0] == "omniglot: 1 of 8 trained, 1 of 4 tested"
    assert lines[1] == "group 4, seed 0: leap done, reptile running 1/4, test done"
    assert lines[2] == "group 20, seed 0: leap waiting, reptile waiting, test waiting"
    lock.release()
    (tmp_path / "4/seed0/test/runs/none").rename(tmp_path / "elsewhere")
    lines = progress_text(progress(tmp_path)).splitlines()
    assert lines[1] == "group 4, seed 0: leap done, reptile died 1/4, test waiting"
    with pytest.raises(ConfigError, match="holds no study"):
        progress(tmp_path / "4")


def test_defaults_are_those_of_the_tables():
    assert planned(groups=[]).study.groups == ("4", "10", "20")
    assert len(ALPHABETS) - 10 - 1 == 35
