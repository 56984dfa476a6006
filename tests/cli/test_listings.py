"""The commands that list games, presets and initializations."""

from __future__ import annotations

import re

import pytest
from initialization_files import written

from leap_dist.cli import listings
from leap_dist.cli.main import main
from leap_dist.config import loading, pretrained
from leap_dist.config.presets import PRESETS, TASKS
from leap_dist.envs import games
from leap_dist.study.games import FIGURE_4
from leap_dist.weights import hub


@pytest.mark.parametrize("command", ["games", "presets", "weights"])
def test_lists_fit_into_eighty_columns(capsys, command):
    assert main([command]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_list_of_games_says_which_are_held_out_and_has_the_reference_scores(capsys):
    main(["games"])
    text = capsys.readouterr().out
    rows = dict(re.findall(r"^([a-z0-9_]+) +(\S.*)$", text.partition("\ngame ")[2], re.MULTILINE))
    assert rows.keys() >= set(games.available())
    assert rows["breakout"].split() == [*["held", "out"] * 3, "1.7", "30.5"]
    assert rows["qbert"].split()[:3] == ["held", "out", "train"]
    assert rows["pong"].split() == ["train", "train", "-", "-20.7", "14.6"]
    assert rows["tutankham"].split() == ["train", "train", "train", "11.4", "167.6"]
    assert rows["air_raid"].split() == ["train", "train", "-", "-", "-"], "no published scores"
    for name, members in games.SETS.items():
        assert f"{name:<10} {len(members)} " in text


def test_what_is_called_held_out_is_in_no_set():
    for name, held_out in listings.HELD_OUT.items():
        assert not set(held_out) & set(games.SETS[name])
        if name != "moving4":
            assert {*held_out, *games.SETS[name]} == set(games.ACTIONS_OF_27)


def test_the_list_of_presets_has_each_of_them_with_all_that_it_changes(capsys):
    main(["presets"])
    text = " ".join(capsys.readouterr().out.split())
    for name, values in [*PRESETS.items(), *(preset for known in TASKS.values() for preset in known.items())]:
        assert name in text
        for setting, value in values.items():
            if isinstance(value, float) and value != loading.default(setting):
                assert f"{setting} {value}" in text, name
    assert "figure4: only for `study --tasks atari`" in text
    for game, steps in FIGURE_4.items():
        assert f"{game} {steps:,}" in text
    assert not re.search(r" ,|,,", text), "an empty value"
    assert "--tasks omniglot --meta-learner reptile, preset paper meta.learning_rate 0.01" in text
    assert "--tasks atari --meta-learner finetune-multi meta.contribution_clip 0.0, meta.staleness constant" in text


def test_every_preset_says_how_long_it_is(capsys):
    main(["presets"])
    text = capsys.readouterr().out
    of_kinds = [("atari", PRESETS), *TASKS.items()]
    lengths = re.findall(r"^    \d\S* meta-updates of \d+ tasks, .* each$", text, re.MULTILINE)
    assert len(lengths) == sum(len(known) for _, known in of_kinds)
    for kind, known in of_kinds:
        for name in known:
            own = {"games": ("x",)} if kind in ("gymnasium", "images") else {}
            config = loading.resolve(name, {"tasks": kind, **own})
            length = lengths.pop(0)
            start = f"    {config.meta_updates:,} meta-updates of {config.batch_tasks} tasks, "
            assert re.fullmatch(rf"{start}(at most )?{config.steps_of_task:,} (agent steps|examples) each", length)


def test_a_list_may_be_of_one_name(capsys):
    main(["presets", "quick"])
    shown = re.findall(r"^quick(?: of --tasks \S+)?(?=\n|:)", capsys.readouterr().out, re.MULTILINE)
    assert shown == ["quick", *(f"quick of --tasks {kind}" for kind in TASKS)]
    main(["games", "moving4"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["game", *games.SETS["moving4"]]
    main(["games", "pong"])
    assert capsys.readouterr().out.splitlines()[1].startswith("pong  ")
    for name in ("leap-omniglot", "pretrained:leap-omniglot"):
        main(["weights", name])
        text = capsys.readouterr().out
        assert "\nleap-omniglot " in text
        assert "\nreptile-atari " not in text


def test_the_list_of_weights_says_where_they_come_from(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    assert main(["weights"]) == 0
    assert "No initialization comes with this version" in capsys.readouterr().out
    hub.save_pretrained(written(tmp_path / "run"), tmp_path / "here" / "leap-small", summary="A toy.", license="mit")
    monkeypatch.setattr(pretrained, "ROOT", tmp_path / "here")
    assert main(["weights"]) == 0
    assert re.search(r"^leap-small +A toy. License: mit.$", capsys.readouterr().out, re.MULTILINE)
