"""The promise of docs/monitoring.md: event files are read back with TensorBoard's own loader, and held against it."""

from __future__ import annotations

import io
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_files import ALPHABETS, GAMES, ledger, merge, summary
from PIL import Image
from protocol import config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata

from leap_dist.config.loading import fixed_settings, resolve
from leap_dist.config.registry import ERROR, RETURN, Metric, for_config
from leap_dist.envs.games import reference_scores
from leap_dist.nn.features import STATISTICS
from leap_dist.tasks.atari.video import LARGEST, Clip, encode
from leap_dist.telemetry.overview import MARKS, OF_SERVER, about
from leap_dist.telemetry.tags import CURVE, META, OPS, PATH, custom_scalars
from leap_dist.telemetry.tensorboard import METRICS, TensorBoard

ROOT = Path(__file__).parents[2]
PARTS = ("emulator", "waiting", "other")
EVERYTHING = {"scalars": 0, "images": 0, "tensors": 0}
AGREEMENT = {"games": ["freeway", "pong"], "cosines": [[1.0, -0.25], [-0.25, 1.0]]}
NAMES = {"atari": GAMES, "omniglot": ALPHABETS}
ONLY = {
    "atari": {
        "meta/score_human_normalized", "meta/score_iqm", "meta/score_lower_quartile", "meta/score_upper_quartile",
        "task/return", "task/human_normalized", "task/policy_loss", "task/value_loss", "task/entropy",
        *(f"meta/features/{name}" for name in STATISTICS),
    },
    "omniglot": {"meta/error", "task/error"},
}  # fmt: skip
"""Tags that runs of one kind of task have, and others do not."""
GIF = encode([np.full((1, 84, 84), shade, np.uint8) for shade in (0, 100, 200)], 130)


def documented() -> set[str]:
    """Tags of the tables in docs/monitoring.md, with what stands for several of them filled in."""
    found = set(re.findall(r"^\| `([a-z_]+/[^`]+)` \|", (ROOT / "docs" / "monitoring.md").read_text(), re.MULTILINE))
    found.remove("meta_frames/…")
    found |= {tag.replace("meta/", "meta_frames/") for tag in found if tag.startswith("meta/")}
    several = {
        "ops/refused/<reason>": ("stale", "manifest"),
        "ops/time_share/<part>": PARTS,
        "ops/start/<part>": ("ray", "nodes", "server", "workers", "loading"),
    }
    for pattern, names in several.items():
        found.remove(pattern)
        found |= {f"{pattern.rpartition('/')[0]}/{name}" for name in names}
    return found


def tags_of(tasks: str) -> set[str]:
    """Of a run of such tasks."""
    others = {tag for kind, tags in ONLY.items() if kind != tasks for tag in tags}
    return {tag for tag in documented() if tag.replace("meta_frames/", "meta/") not in others}


def promised(tasks: str) -> set[tuple[str, str]]:
    """(run, tag) of every curve of a run of all NAMES of such tasks."""
    tags = tags_of(tasks)
    shown = {"path_length", "steps_per_second", {"atari": "human_normalized_score"}.get(tasks, "error")}
    server = {("server", tag) for tag in tags if not tag.startswith("task/")}
    server |= {("server", f"_overview/{name}") for name in shown}
    if tasks == "atari":
        known = [game for game in GAMES if game in reference_scores()]
        server |= {(f"game/{game}", f"_overview/return_{game}") for game in GAMES}
        server |= {(run, f"_overview/return_{game}") for game in known for run in ("mark/random", "mark/human")}
    games = {(f"game/{game}", tag) for game in NAMES[tasks] for tag in tags if tag.startswith("task/")}
    return server | games - {("game/air_raid", "task/human_normalized")}


def told(second: float, version: int, **values: Any) -> dict[str, Any]:
    """A summary with something of everything."""
    shares = [{"time_share": dict.fromkeys(PARTS, 1 / 3)}]
    return summary(second, meta_updates=version, workers=shares, agreement_between_games=AGREEMENT, **values)


def read(run_dir: Path) -> dict[str, EventAccumulator]:
    """By run, what TensorBoard's loader finds, nothing sampled away."""
    root = run_dir / "tensorboard"
    runs = {path.parent for path in root.rglob("events.*")}
    return {r.relative_to(root).as_posix(): EventAccumulator(str(r), EVERYTHING).Reload() for r in runs}


def launch(run_dir: Path, updates: list[Any], *, first: int, states: list[str], tasks: str = "atari") -> TensorBoard:
    """One launch as launch.py does it, from the ledger's first line; it made meta-updates from `first` on."""
    board = TensorBoard(run_dir, agreement_interval=1)
    board.about(about(config(tasks=tasks), ["launch.py", "train"]))
    board.text("config", "```yaml\nseed: 1\n```")
    board.text("manifest", "{}")
    board.begin(config(tasks=tasks))
    done = updates[:first]
    for version, state in enumerate(states, first):
        plays = [Clip(game, 300 * version, GIF) for game in NAMES[tasks]]
        board.record(
            merge(done) if version == first else updates[version - 1], told(version, version, state=state), plays
        )
    return board


@pytest.fixture(scope="module", params=list(NAMES))
def tasks(request: pytest.FixtureRequest) -> str:
    """What the run's tasks are."""
    return str(request.param)


@pytest.fixture(scope="module", params=["in one go", "resumed"])
def board(
    request: pytest.FixtureRequest, tasks: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EventAccumulator]:
    """A run of eight meta-updates; "resumed": killed after five, of the last of which some did not reach the disk."""
    run_dir = tmp_path_factory.mktemp("run")
    updates = ledger(8, names=NAMES[tasks])
    if request.param == "resumed":
        launch(run_dir, updates, first=1, states=["running"] * 5, tasks=tasks)
        for path in (run_dir / "tensorboard").rglob("events.*"):
            path.write_bytes(path.read_bytes()[:-5])
        launch(run_dir, updates, first=5, states=["running"] * 3 + ["done"], tasks=tasks).close()
    else:
        launch(run_dir, updates, first=1, states=["running"] * 7 + ["done"], tasks=tasks).close()
    return read(run_dir)


def test_every_promised_curve_is_there_and_nothing_else_finite_and_rising(
    tasks: str, board: dict[str, EventAccumulator]
) -> None:
    assert {(run, tag) for run, events in board.items() for tag in events.Tags()["scalars"]} == promised(tasks)
    for run, tag in promised(tasks):
        points = board[run].Scalars(tag)
        steps = [point.step for point in points]
        assert steps == sorted(set(steps)), (run, tag)
        assert all(math.isfinite(point.value) for point in points), (run, tag)
        if tag.startswith("meta/") and "score" not in tag:  # without an episode that ended there is none
            assert steps == list(range(1, 9)), (run, tag)


def test_the_first_screen_shows_the_curves_beside_marks(tasks: str, board: dict[str, EventAccumulator]) -> None:
    def points(run: str, tag: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in board[run].Scalars(tag)]

    for source, name in OF_SERVER.items():
        if source in board["server"].Tags()["scalars"]:
            assert points("server", f"_overview/{name}") == points("server", source)
    first = min(tag for events in board.values() for tag in events.Tags()["scalars"])
    assert first.startswith("_overview/"), "sorted before all others"
    if tasks == "atari":
        returns = points("game/pong", "task/return")
        assert points("game/pong", "_overview/return_pong") == returns
        for kind, run in MARKS.items():
            score = pytest.approx(reference_scores()["pong"][kind])
            assert points(run, "_overview/return_pong") == [(step, score) for step, _ in returns]


def test_the_text_says_what_run_it_is_and_how_to_read_it() -> None:
    text = about(resolve("quick", {"meta_learner": "reptile"}), ["launch.py", "train"])
    for words in ("reptile on 3 tasks", "assault, asterix, ms_pacman", "preset quick", "`launch.py train`", "a saw"):
        assert words in text
    text = about(resolve("quick", {"tasks": "omniglot"}), ["launch.py", "train"])
    assert "`error` is the mean training error" in text
    assert "human" not in text


def test_who_listens_hears_every_curve_once(tmp_path: Path) -> None:
    heard: list[str] = []
    board = TensorBoard(tmp_path, listener=lambda event: heard.extend(value.tag for value in event.values))
    board.record(merge(ledger(2)), told(2, 2))
    board.close()
    assert "task/return" in heard
    assert not [tag for tag in heard if tag.startswith("_overview/")]


def test_the_code_has_the_names_of_the_page() -> None:
    code = {f"meta/{name}" for name in META} | {f"meta_frames/{name}" for name in META}
    code |= {f"task/{name}" for name in (*CURVE, *PATH)} | {f"ops/{name}" for name in OPS}
    assert code == {
        tag for tag in documented() if not tag.startswith(("ops/refused/", "ops/time_share/", "ops/start/"))
    }


def test_the_layout_shows_every_group_and_each_chart_has_curves(tasks: str, board: dict[str, EventAccumulator]) -> None:
    (event,) = board["server"].Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    starts = ["starting point"] * (tasks == "atari")
    assert [category.title for category in layout.category] == [
        "meta-learning", "path geometry", *starts, "per game", "operations"
    ]  # fmt: skip
    shown = set()
    for category in layout.category:
        for chart in category.chart:
            margins = {getattr(s, part) for s in chart.margin.series for part in ("value", "lower", "upper")}
            assert margins <= tags_of(tasks), chart.title
            for pattern in chart.multiline.tag:
                matched = {tag for tag in tags_of(tasks) if re.match(pattern, tag)}
                assert matched, (chart.title, pattern)
                shown |= matched
            shown |= margins
    left_out = {"meta/score_human_normalized", "task/policy_loss", "ops/partials", "ops/clipped", "ops/all_zero"}
    frames = {tag for tag in documented() if tag.startswith("meta_frames/")}
    assert tags_of(tasks) - shown == (left_out | frames | {"ops/write_failures"}) & tags_of(tasks)


def test_the_settings_are_comparable_and_the_session_ends_once(tasks: str, board: dict[str, EventAccumulator]) -> None:
    data = {
        tag: metadata.parse_session_end_info_plugin_data(content) if tag == metadata.SESSION_END_INFO_TAG
        else metadata.parse_session_start_info_plugin_data(content) if tag == metadata.SESSION_START_INFO_TAG
        else metadata.parse_experiment_plugin_data(content)
        for tag, content in board["server"].PluginTagToContent("hparams").items()
    }  # fmt: skip
    assert set(data) == {metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG}
    start, end = data[metadata.SESSION_START_INFO_TAG], data[metadata.SESSION_END_INFO_TAG]
    settings = config(tasks=tasks)
    assert set(start.hparams) == set(fixed_settings(settings))
    assert start.hparams["meta.batch_size"].number_value == 2
    assert start.hparams["meta_learner"].string_value == "leap"
    assert start.hparams["games"].string_value == ", ".join(settings.games)
    assert start.hparams["leap.stabilize"].string_value == "yes"
    assert end.status == api_pb2.STATUS_SUCCESS
    assert [info.name.tag for info in data[metadata.EXPERIMENT_TAG].metric_infos] == list(METRICS[for_config(settings)])
    assert set(METRICS[for_config(settings)]) <= tags_of(tasks)
    assert (tasks == "omniglot") == ("meta/error" in METRICS[for_config(settings)])


def test_the_text_is_there_once(board: dict[str, EventAccumulator]) -> None:
    for name in ("about", "config", "manifest"):
        assert [event.step for event in board["server"].Tensors(f"{name}/text_summary")] == [0]


def test_the_pictures_are_pictures(tasks: str, board: dict[str, EventAccumulator]) -> None:
    heat_maps = board["server"].Images("meta/agreement_between_games")
    assert [event.step for event in heat_maps] == list(range(1, 9))
    for event in heat_maps:
        with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
            assert (picture.format, picture.size) == ("PNG", (event.width, event.height))
    for game in NAMES[tasks]:
        films = board[f"game/{game}"].Images(f"play/{game}")
        assert [event.step for event in films] == [300 * version for version in range(1, 9)]
        assert {(event.width, event.height, event.encoded_image_string) for event in films} == {(84, 84, GIF)}


def test_the_first_screen_says_which_run_it_is(board: dict[str, EventAccumulator]) -> None:
    """There, TensorBoard shows curves and pictures only. The run was launched several times."""
    (picture,) = board["server"].Images("_overview/about")
    assert picture.step == 0
    with Image.open(io.BytesIO(picture.encoded_image_string)) as image:
        assert (image.format, image.size) == ("PNG", (picture.width, picture.height))


def test_that_picture_does_not_delay_the_first_step(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.about(about(config(), ["launch.py", "train"]))
    board.record([], told(1, 0, steps_per_second=0.0))
    board.flush()
    assert "_overview/about" not in read(tmp_path)["server"].Tags()["images"]
    board.record([], told(2, 0, steps_per_second=500.0))
    board.close()
    assert "_overview/about" in read(tmp_path)["server"].Tags()["images"]


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_what_can_be_gone_on_with_has_no_end_yet(tmp_path: Path, state: str) -> None:
    launch(tmp_path, ledger(2), first=1, states=["running", state]).close()
    assert metadata.SESSION_END_INFO_TAG not in read(tmp_path)["server"].PluginTagToContent("hparams")


def test_heat_maps_come_now_and_then_further_apart_in_long_runs_and_at_the_end(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, agreement_interval=5)
    for version in (0, 1, 4, 5, 9, 11, 15, 300, 314, 315):
        board.record([], told(version, version))
    board.record([], told(400, 316, state="interrupted"))
    board.record([], told(401, 316, state="interrupted"))
    board.close()
    TensorBoard(tmp_path, agreement_interval=0).record([], told(500, 900, state="done"))
    found = [event.step for event in read(tmp_path)["server"].Images("meta/agreement_between_games")]
    assert found == [5, 11, 300, 315, 316]


def test_one_game_alone_makes_no_heat_map(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, agreement_interval=1)
    for agreement in ({"games": [], "cosines": []}, {"games": ["pong"], "cosines": [[1.0]]}):
        board.record([], summary(1, meta_updates=5, state="done", agreement_between_games=agreement))
    board.close()
    assert not read(tmp_path)["server"].Tags()["images"]


BAD_FILMS = {
    "html": b"<script>alert(1)</script>;",
    "empty": b"",
    "no end": GIF[:-1],
    "no content": b"GIF89a;",
    "another format": b"GIF87a" + GIF[6:],
    "too large": GIF[:-1] + bytes(LARGEST) + b";",
    "too wide": GIF[:6] + b"\xff\xff" + GIF[8:],
    "no height": GIF[:8] + b"\0\0" + GIF[10:],
}


@pytest.mark.parametrize("case", BAD_FILMS)
def test_what_is_no_film_is_left_out(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    board = TensorBoard(tmp_path)
    with caplog.at_level(logging.WARNING):
        board.record([], summary(1), [Clip("pong", 300, BAD_FILMS[case]), Clip("freeway", 300, GIF)])
    board.close()
    assert "a video of 'pong' is left out" in caplog.text
    assert set(read(tmp_path)) == {"server", "game/freeway"}


@pytest.mark.parametrize("game", ["../../etc", "", "pong/../x", "Pong", "a" * 81])
def test_a_film_of_no_game_is_left_out(tmp_path: Path, game: str) -> None:
    board = TensorBoard(tmp_path)
    board.record([], summary(1), [Clip(game, 300, GIF)])
    board.close()
    assert set(read(tmp_path)) == {"server"}


def test_before_anything_was_timed_there_are_no_times(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.record([], summary(1, push_ms={}, update_ms={}))
    board.close()
    found = {tag for tag in read(tmp_path)["server"].Tags()["scalars"] if "_ms_" in tag}
    assert found == set()


@pytest.mark.parametrize(("measure", "steps"), [(RETURN, "agent steps"), (ERROR, "examples")])
def test_the_layout_is_one_summary_that_the_plugin_can_read(measure: Metric, steps: str) -> None:
    made = custom_scalars(measure)
    assert isinstance(made, Summary)
    assert [value.tag for value in made.value] == ["custom_scalars__config__"]
    layout = layout_pb2.Layout.FromString(made.value[0].tensor.string_val[0])
    assert layout.category[-1].chart[0].title == f"{steps} per second"
