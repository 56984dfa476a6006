"""Names of what can be learned, and who is for what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leap_dist.config.registry import ALPHABETS, DATA_SETS, expand, normalize
from leap_dist.datasets.multicv import SOURCES

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_data_sets_are_those_that_can_be_read():
    assert tuple(SOURCES) == DATA_SETS


@pytest.mark.skipif(not (SHARED / "omniglot").is_dir(), reason="needs the real files")
def test_alphabets_are_those_with_enough_characters_in_the_order_of_their_names():
    table = json.loads((SHARED / "omniglot" / "alphabets.json").read_text())
    published = sorted(entry["alphabet"] for entry in table if entry["last"] - entry["first"] + 1 >= 20)
    assert tuple(map(normalize, published)) == ALPHABETS
    assert len(ALPHABETS) == 46


def test_sets_of_alphabets_are_drawn_by_seed_and_do_not_overlap():
    drawn = {
        name: expand("omniglot", (name,), seed=1, pretraining=20) for name in ("pretraining", "validation", "held_out")
    }
    assert [len(names) for names in drawn.values()] == [20, 10, 10]
    assert len({name for names in drawn.values() for name in names}) == 40
    assert drawn["held_out"] == expand("omniglot", ("held_out",), seed=1, pretraining=4)
    assert drawn["held_out"] != expand("omniglot", ("held_out",), seed=2, pretraining=20)


def test_names_may_be_typed_as_they_are_published_and_come_once():
    found = expand("omniglot", ("Japanese_(hiragana)", "greek", "japanese_hiragana"), seed=0, pretraining=4)
    assert found == ("japanese_hiragana", "greek")
    assert expand("multi-cv", ("mnist", "all"), seed=0, pretraining=4)[0] == "mnist"
    assert set(expand("multi-cv", ("all",), seed=0, pretraining=4)) == set(DATA_SETS)
    assert expand("atari", ("pong", "pong"), seed=0, pretraining=4) == ("pong",)


@pytest.mark.parametrize(
    ("tasks", "name", "message"),
    [
        ("omniglot", "grek", "no alphabet 'grek'; the nearest are greek"),
        ("omniglot", "pong", "no alphabet 'pong'"),
        ("omniglot", "braile", "the nearest are braille"),
        ("multi-cv", "mnits", "no data set 'mnits'; the nearest are mnist"),
        ("multi-cv", "greek", "no data set 'greek'"),
        ("atari", "greek", "no game 'greek'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(tasks, name, message):
    with pytest.raises(ValueError) as caught:
        expand(tasks, (name,), seed=0, pretraining=4)
    assert message in str(caught.value)
