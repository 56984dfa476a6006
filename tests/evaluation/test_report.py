"""The report of an evaluation: its numbers, its pictures, its page, its curves, and what it says of incomplete data."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from leap_dist.config.loading import ConfigError
from leap_dist.envs.games import SETS, human_normalized, reference_scores
from leap_dist.evaluation import results as comparison
from leap_dist.evaluation import statistics
from leap_dist.evaluation.report import build as writer
from leap_dist.evaluation.report import figures
from leap_dist.evaluation.report.build import RETURN_COLUMNS
from leap_dist.evaluation.report.document import Bullets, Heading, Paragraph, Table, Verbatim, markdown, page
from leap_dist.evaluation.results import Results
from leap_dist.evaluation.runs import RunResult, save
from leap_dist.evaluation.scoring import RETURNS
from leap_dist.evaluation.statistics import SEED
from leap_dist.testing import failpoints

FEW = 200
"""Bootstrap samples."""
FILES = {"report.md", "report.html", "results.csv", "results.json", "figures", "tensorboard", "runs"}
PICTURES = {"curves.png", "profiles.png", "aggregates.png", "improvement.png"}


def run(arm: str, game: str, seed: int, level: float = 10.0, budget: int = 1000) -> RunResult:
    """Episodes of 10 agent steps, whose returns rise to about `level`."""
    ended = np.arange(10, budget + 1, 10)
    noise = np.random.default_rng([seed, *arm.encode(), *game.encode()]).normal(size=len(ended))
    return RunResult(arm, game, seed, budget, 2.0, ended, level * ended / budget + noise, ())


def without_episodes(arm: str, game: str, seed: int) -> RunResult:
    return RunResult(arm, game, seed, 1000, 2.0, np.array([], np.int64), np.array([]), ())


def evaluation(
    arms: tuple[str, ...] = ("leap", "scratch"),
    games: tuple[str, ...] = ("breakout", "pong"),
    seeds: tuple[int, ...] = (0, 1, 2),
) -> list[RunResult]:
    """The first arm is the best."""
    return [run(arm, game, seed, 10.0 - 3 * i) for i, arm in enumerate(arms) for game in games for seed in seeds]


def build(out: Path, repetitions: int) -> list[str]:
    return writer.build(out, RETURNS, repetitions)


def compute(runs: list[RunResult], repetitions: int) -> Results:
    return comparison.compute(RETURNS.score_all(runs)[0], RETURNS, repetitions=repetitions)


def write(out: Path, runs: list[RunResult]) -> Path:
    for each in runs:
        save(out, each, {"steps": each.budget})
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def results_json(out: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    data: dict[str, Any] = json.loads((out / "results.json").read_text(), parse_constant=refuse)
    return data


class Page(HTMLParser):
    """What is in a page: tags with attributes, text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip rendering, which takes most of the time of a report, in tests that are not about pictures."""
    monkeypatch.setattr(figures, "png", lambda figure: b"one pixel")


# Numbers ----------------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    """A window of 100 episodes and as many episodes: a curve is the mean of all that have ended."""
    ended = np.arange(10, 1001, 10)
    steady = RunResult("scratch", "pong", 0, 1000, 1.0, ended, np.full(100, -2.0), ())
    rising = RunResult("leap", "pong", 0, 1000, 1.0, ended, np.linspace(-4, 2, 100), ())
    results = compute([rising, steady], FEW)
    fast, slow = results.rows
    assert (*slow.values.values(), slow.steps_to_baseline) == pytest.approx((-2, -2, 10))
    assert fast.values["final"] == pytest.approx(-1)
    assert fast.values["auc"] == pytest.approx((-4 - 1) / 2)  # the mean of what has ended rises evenly from -4 to -1
    assert fast.steps_to_baseline == 670  # -4 + 3 (k - 1) / 99 reaches -2 at the 67th episode
    human, random = (reference_scores()["pong"][name] for name in ("human", "random"))
    assert fast.scores["final"] == pytest.approx((-1 - random) / (human - random))
    assert results.targets == {"pong": -2}
    assert results.against["leap"].improvement == {"final": (1, 1, 1), "auc": (0, 0, 0)}
    assert results.against["leap"].intervals["final"].point == pytest.approx(1 / (human - random))


@pytest.mark.usefixtures("one_pixel")
def test_everything_is_the_statistics_of_the_runs(tmp_path: Path):
    runs = evaluation(("leap", "reptile", "scratch"))
    assert build(write(tmp_path, runs), FEW) == []
    data = results_json(tmp_path)
    grid = statistics.grid(1000)
    assert data["grid"] == grid.tolist()
    finals: dict[tuple[str, str], list[float]] = {}
    for found, row in zip(runs, rows(tmp_path), strict=True):
        curve = statistics.moving_average(found.ended, found.returns, grid)
        assert (row["arm"], row["game"], int(row["seed"])) == (found.arm, found.game, found.seed)
        assert float(row["final_return"]) == curve[-1]
        assert float(row["auc"]) == statistics.area(curve)
        assert float(row["human_normalized_auc"]) == human_normalized(found.game, statistics.area(curve))
        target = data["targets"][found.game]
        assert float(row["steps_to_baseline_final"]) == statistics.steps_to(curve, grid, target)
        assert (int(row["episodes"]), float(row["steps_per_second"])) == (100, 500)
        finals.setdefault((found.arm, found.game), []).append(float(row["final_return"]))
    for (arm, game), values in finals.items():
        wanted = statistics.interval(statistics.mean, [np.array(values)], np.random.default_rng(SEED), FEW)
        assert data["cells"][game][arm]["final"] == wanted._asdict()
        assert data["cells"][game][arm]["seeds"] == [0, 1, 2]
    scores = {
        arm: [np.array([human_normalized(g, x) for x in finals[arm, g]]) for g in ("breakout", "pong")]
        for arm in ("leap", "reptile", "scratch")
    }
    for arm, of_games in scores.items():
        for name, aggregate in RETURNS.aggregates.items():
            wanted = statistics.interval(aggregate, of_games, np.random.default_rng(SEED), FEW)
            assert data["overall"][arm]["aggregates"]["final"][name] == wanted._asdict()
    for arm in ("leap", "reptile"):
        both = scores[arm], scores["scratch"]
        wanted = statistics.probability_of_improvement(*both, np.random.default_rng(SEED), FEW)
        assert data["against"][arm]["improvement"]["final"] == wanted._asdict()
        wanted = statistics.paired_difference(statistics.iqm, *both, np.random.default_rng(SEED), FEW)
        assert data["against"][arm]["iqm_difference"]["final"] == wanted._asdict()
        assert data["against"][arm]["pairs"] == 6
        ratio = statistics.paired_ratio(statistics.iqm, *both, np.random.default_rng(SEED), FEW)
        assert data["against"][arm]["iqm_ratio"]["final"] == (ratio and ratio._asdict())
    pairs = {(one.pop("arm"), one.pop("other")): one for one in data["improvements"]["final"]}
    assert set(pairs) == set(itertools.permutations(("leap", "reptile", "scratch"), 2))
    wanted = statistics.probability_of_improvement(scores["leap"], scores["reptile"], np.random.default_rng(SEED), FEW)
    assert pairs["leap", "reptile"] == wanted._asdict()
    text = (tmp_path / "report.md").read_text()
    assert text.count("Every arm against every other") == 1
    assert "| final return | leap | reptile | scratch |" in text
    assert f"| leap | – | {wanted.point:.3f}" in text
    assert set(data["against"]) == {"leap", "reptile"}
    assert data["bootstrap"] == {"repetitions": FEW, "level": 0.95, "seed": SEED}


def test_an_arm_more_changes_nothing_for_the_others():
    few, more = compute(evaluation(), FEW), compute(evaluation() + evaluation(("another",)), FEW)
    for arm in ("leap", "scratch"):
        assert few.overall[arm].aggregates == more.overall[arm].aggregates
    assert few.cells["pong"]["leap"].intervals == more.cells["pong"]["leap"].intervals
    assert few.against["leap"] == more.against["leap"]


def test_the_baseline_is_scratch_or_the_last_arm():
    assert compute(evaluation(("scratch", "leap")), FEW).baseline == "scratch"
    assert compute(evaluation(("leap", "reptile")), FEW).baseline == "reptile"


# Incomplete data --------------------------------------------------------------------------------------------------


def test_missing_seeds_are_named_and_the_others_count():
    runs = [r for r in evaluation() if (r.arm, r.game, r.seed) not in {("leap", "pong", 1), ("scratch", "pong", 2)}]
    results = compute(runs, FEW)
    assert results.warnings == ("incomplete: missing runs (2): leap/pong seed 1; scratch/pong seed 2",)
    assert results.cells["pong"]["leap"].seeds == (0, 2)
    assert (results.overall["leap"].runs, results.against["leap"].pairs) == (5, 4)


@pytest.mark.usefixtures("one_pixel")
def test_games_that_cannot_count_are_named_with_the_reason(tmp_path: Path):
    runs = [*evaluation(games=("breakout", "air_raid", "pong")), run("leap", "qbert", 0)]
    build(write(tmp_path, runs), FEW)
    data = results_json(tmp_path)
    reason = "no run of scratch in which an episode ended"
    assert data["excluded"] == {"air_raid": "no published human score", "qbert": reason}
    assert data["counted"] == ["breakout", "pong"]
    assert set(data["cells"]) == {"air_raid", "breakout", "pong", "qbert"}
    text = (tmp_path / "report.md").read_text()
    assert "- air_raid: no published human score" in text
    assert "- qbert: no run of scratch in which an episode ended" in text
    assert "| qbert | " in text
    assert [row["human_normalized_auc"] for row in rows(tmp_path) if row["game"] == "air_raid"] == [""] * 6


@pytest.mark.usefixtures("one_pixel")
def test_where_no_game_counts_runs_are_compared_game_by_game(tmp_path: Path):
    """Of games without human scores, the one with runs of all arms is compared by wins."""
    runs = [*evaluation(("leap", "fomaml", "scratch"), games=("air_raid", "carnival")), run("leap", "pooyan", 0)]
    warnings = build(write(tmp_path, runs), FEW)
    assert (
        warnings[-1] == "there are no scores over all games: no game has a published human score and runs of every arm"
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"curves.png", "improvement.png"}
    data = results_json(tmp_path)
    assert (data["overall"], data["thresholds"], data["counted"]) == ({}, {}, [])
    assert data["ranked"] == ["air_raid", "carnival"]
    aucs: dict[str, dict[str, list[float]]] = {}
    for row in rows(tmp_path):
        aucs.setdefault(row["arm"], {}).setdefault(row["game"], []).append(float(row["auc"]))
    raw = {arm: [np.array(aucs[arm][game]) for game in data["ranked"]] for arm in aucs}
    for first, second in itertools.permutations(raw, 2):
        wanted = statistics.probability_of_improvement(raw[first], raw[second], np.random.default_rng(SEED), FEW)
        assert {"arm": first, "other": second, **wanted._asdict()} in data["improvements"]["auc"]
    against = data["against"]["leap"]
    assert against["improvement"]["auc"] == {"point": 1, "low": 1, "high": 1}
    assert (against["pairs"], against["iqm_difference"], against["iqm_ratio"]) == (0, {}, {})
    text = (tmp_path / "report.md").read_text()
    assert "Every game is left out" in text
    assert "here, it is the mean over air_raid, carnival. " in text
    assert "| arm | P(better), final | P(better), area |" in text
    assert text.count("Every arm against every other") == 1


@pytest.mark.usefixtures("one_pixel")
def test_without_a_common_game_nothing_is_compared(tmp_path: Path):
    build(write(tmp_path, [run("leap", "air_raid", 0), run("scratch", "carnival", 0)]), FEW)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"curves.png"}
    data = results_json(tmp_path)
    assert (data["against"], data["improvements"], data["ranked"]) == ({}, {}, [])


@pytest.mark.usefixtures("one_pixel")
def test_a_run_in_which_no_episode_ended_is_named_and_left_out(tmp_path: Path):
    runs = [r for r in evaluation() if (r.arm, r.seed) != ("leap", 1)]
    runs += [without_episodes("leap", "pong", 1), run("leap", "breakout", 1)]
    warnings = build(write(tmp_path, runs), FEW)
    assert warnings == ["left out, because no episode ended in them (1): leap/pong seed 1"]
    assert results_json(tmp_path)["cells"]["pong"]["leap"]["seeds"] == [0, 2]
    (row,) = [row for row in rows(tmp_path) if row["episodes"] == "0"]
    assert (row["auc"], row["final_return"], row["human_normalized_final"]) == ("", "", "")
    assert row["steps_to_baseline_final"] == "inf"


@pytest.mark.usefixtures("one_pixel")
def test_nothing_but_runs_without_episodes(tmp_path: Path):
    runs = [without_episodes("leap", "pong", 0), without_episodes("scratch", "pong", 0)]
    warnings = build(write(tmp_path, runs), FEW)
    assert "no episode ended" in warnings[0]
    assert results_json(tmp_path)["excluded"] == {"pong": "no run of leap, scratch in which an episode ended"}


@pytest.mark.parametrize(
    ("arms", "games", "seeds", "pictures"),
    [
        (("leap",), ("pong",), (0,), PICTURES - {"improvement.png"}),
        (("leap",), ("pong", "breakout"), (0, 1), PICTURES - {"improvement.png"}),
        (("leap", "scratch"), ("pong",), (4,), PICTURES),
    ],
)
@pytest.mark.usefixtures("one_pixel")
def test_one_of_anything_is_enough(
    tmp_path: Path, arms: tuple[str, ...], games: tuple[str, ...], seeds: tuple[int, ...], pictures: set[str]
):
    warnings = build(write(tmp_path, evaluation(arms, games, seeds)), FEW)
    assert any("only one seed" in warning for warning in warnings) == (len(seeds) == 1)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert {path.name for path in (tmp_path / "figures").iterdir()} == pictures
    assert results_json(tmp_path)["overall"]["leap"]["aggregates"]["final"]["iqm"]["point"] > 0


def test_arms_with_different_seeds_are_not_paired():
    runs = evaluation(("leap",), seeds=(0, 1)) + evaluation(("scratch",), seeds=(2, 3, 4))
    against = compute(runs, FEW).against["leap"]
    assert (against.pairs, against.intervals) == (0, {})
    assert 0 <= against.improvement["auc"].low <= against.improvement["auc"].high <= 1


def test_budgets_that_differ_are_compared_over_the_smallest():
    runs = [*evaluation(), run("leap", "pong", 3, budget=2000), run("scratch", "pong", 3), run("leap", "breakout", 3)]
    results = compute([*runs, run("scratch", "breakout", 3)], FEW)
    assert results.budget == results.points["pong"].at[-1] == 1000
    assert results.warnings == (
        "budgets differ: runs of pong are compared over the first 1,000 agent steps only, although some have 2,000",
    )
    long = next(row for row in results.rows if row.run.budget == 2000)
    assert long.values["final"] == pytest.approx(long.run.returns[:100].mean())


def test_games_of_different_lengths_are_compared_over_shares_of_them(tmp_path: Path):
    arms, seeds = ("leap", "scratch"), (0, 1, 2)
    runs = [run(arm, "pong", seed, budget=1000) for arm in arms for seed in seeds]
    runs += [run(arm, "breakout", seed, budget=3000) for arm in arms for seed in seeds]
    results = compute(runs, FEW)
    assert results.budgets == {"breakout": 3000, "pong": 1000}
    assert results.points["pong"].at[-1] == 1000
    assert results.points["breakout"].at[-1] == 3000
    assert results.all_points.at.tolist() == list(range(1, 101))
    assert not [warning for warning in results.warnings if "budgets" in warning]
    pong, breakout = (compute([one for one in runs if one.game == game], FEW) for game in ("pong", "breakout"))
    for name in ("pong", "breakout"):
        alone = {"pong": pong, "breakout": breakout}[name]
        assert results.cells[name]["leap"].intervals == alone.cells[name]["leap"].intervals
    build(write(tmp_path, runs), FEW)
    assert "of 1,000 to 3,000 agent steps each" in " ".join((tmp_path / "report.md").read_text().split())
    assert {game: grid[-1] for game, grid in results_json(tmp_path)["grid"].items()} == {"breakout": 3000, "pong": 1000}


@pytest.mark.usefixtures("one_pixel")
def test_damage_is_named_on_one_line_and_the_rest_reported(tmp_path: Path):
    write(tmp_path, evaluation())
    (tmp_path / "runs/leap/pong/1.json").write_text("{")
    (tmp_path / "runs/leap/pong/.0.json.77.tmp").write_text("{")
    (tmp_path / "config.yaml").symlink_to("/nowhere")
    (tmp_path / "arms.json").write_text(json.dumps({"arms": [{"label": "later"}, {"label": "scratch"}]}))
    warnings = build(tmp_path, FEW)
    assert [warning.split(":")[0] for warning in warnings] == [
        "left out",
        "no run yet of later",
        "config.yaml is left out",
        "incomplete",
    ]
    assert "leap/pong/1.json" in warnings[0]
    assert results_json(tmp_path)["arms"] == ["scratch", "leap"]
    assert results_json(tmp_path)["warnings"] == warnings
    assert all(warning in "".join(Page((tmp_path / "report.html").read_text()).text) for warning in warnings)


@pytest.mark.usefixtures("one_pixel")
def test_without_a_run_there_is_no_report(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no run of an evaluation") as caught:
        build(tmp_path / "nothing", FEW)
    assert "\n" not in str(caught.value)
    write(tmp_path, evaluation(("leap",), ("pong",), (0,)))
    (tmp_path / "runs/leap/pong/0.json").write_text("{")
    with pytest.raises(ConfigError, match=r"holds no run .*leap/pong/0\.json is not a run"):
        build(tmp_path, FEW)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


# Files ------------------------------------------------------------------------------------------------------------


def remove(out: Path, runs: list[RunResult]) -> None:
    for each in runs:
        (out / "runs" / each.arm / each.game / f"{each.seed}.json").unlink()


def test_the_same_runs_give_the_same_report(tmp_path: Path):
    build(write(tmp_path / "a", evaluation()), FEW)
    build(write(tmp_path / "b", list(reversed(evaluation()))), FEW)
    names = ["report.md", "report.html", "results.csv", "results.json", *(f"figures/{name}" for name in PICTURES)]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.usefixtures("one_pixel")
def test_nothing_of_an_older_report_stays(tmp_path: Path):
    build(write(tmp_path / "a", evaluation(("leap", "scratch"))), FEW)
    build(write(tmp_path / "b", evaluation(("leap",))), FEW)
    assert not (tmp_path / "b/figures/improvement.png").exists()
    build(write(tmp_path / "b", evaluation(("scratch",))), FEW)
    remove(tmp_path / "b", evaluation(("scratch",)))
    build(write(tmp_path / "b", evaluation(("leap", "scratch"))), FEW)
    for name in ["report.md", "report.html", "results.csv", "results.json", *(f"figures/{name}" for name in PICTURES)]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    remove(tmp_path / "b", evaluation(("scratch",)))
    build(tmp_path / "b", FEW)
    assert {path.name for path in (tmp_path / "b/figures").iterdir()} == PICTURES - {"improvement.png"}


@pytest.mark.usefixtures("one_pixel")
def test_the_table_has_a_row_for_every_run(tmp_path: Path):
    build(write(tmp_path, evaluation()), FEW)
    found = rows(tmp_path)
    assert tuple(found[0]) == tuple(RETURN_COLUMNS)
    assert len(found) == 12
    assert b"\r" not in (tmp_path / "results.csv").read_bytes()


@pytest.mark.usefixtures("one_pixel")
def test_a_full_disk_leaves_the_old_report(tmp_path: Path):
    build(write(tmp_path, evaluation()), FEW)
    before = (tmp_path / "report.html").read_bytes()
    write(tmp_path, evaluation(seeds=(7,)))
    failpoints.arm("transfer-report.written=full@6")
    try:
        with pytest.raises(OSError, match="No space left"):
            build(tmp_path, FEW)
    finally:
        failpoints.arm("")
    assert (tmp_path / "report.html").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


# Page -------------------------------------------------------------------------------------------------------------

EVIL = '<script>alert(1)</script> & "quoted" \' | ``` $x$'


def evil_report(out: Path) -> Path:
    write(out, evaluation())
    (out / "config.yaml").write_text(f"note: |\n  </pre></details>{EVIL}\n  ````\n")
    (out / "manifest.json").write_bytes(b'{"host": "\xff"}')
    arms = [{"label": "leap", "source": EVIL, "version": 40, "sha256": "ab" * 32}, {"label": "scratch"}]
    (out / "arms.json").write_text(json.dumps({"arms": arms}))
    build(out, FEW)
    return out


def test_the_page_needs_nothing_else(tmp_path: Path):
    text = (evil_report(tmp_path) / "report.html").read_text()
    found = Page(text)
    assert {tag for tag, _ in found.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "ul", "li", "div", "table", "thead"),
        *("tbody", "tr", "th", "td", "figure", "img", "figcaption", "details", "summary", "pre"),
    }
    pictures = []
    for tag, attributes in found.tags:
        assert not set(attributes) & {"href", "srcset", "style", "onload", "onerror", "background"}
        if tag == "img":
            source = attributes["src"] or ""
            assert source.startswith("data:image/png;base64,")
            pictures.append(base64.b64decode(source.partition(",")[2], validate=True))
            assert attributes["alt"]
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    figures = {path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(pictures) == figures
    assert len(figures) == 4


@pytest.mark.usefixtures("one_pixel")
def test_what_files_say_is_shown_as_it_is(tmp_path: Path):
    text = "".join(Page((evil_report(tmp_path) / "report.html").read_text()).text)
    assert f"</pre></details>{EVIL}" in text
    assert f"arm{'source'}" in text.replace("\n", "")
    assert EVIL in text
    assert "abababababab" in text


@pytest.mark.usefixtures("one_pixel")
def test_the_markdown_escapes_too(tmp_path: Path):
    text = (evil_report(tmp_path) / "report.md").read_text()
    table = next(line for line in text.splitlines() if "alert" in line)
    assert "\\<script\\>" in table
    assert table.replace("\\|", "").count("|") == 6
    assert "`````\nnote: |" in text  # a longer fence than the file's own
    for name in PICTURES:
        assert f"](figures/{name})" in text


def test_blocks_as_markdown_and_as_html():
    blocks = [
        Heading("A *title*", 1),
        Paragraph("two\nlines"),
        Bullets(["a", "b<c"]),
        Table(["game", "x"], [["pong", "1"], ["a|b", "2"]]),
        Verbatim("file", "text\n"),
    ]
    assert markdown(blocks) == (
        "# A \\*title\\*\n\ntwo lines\n\n- a\n- b\\<c\n\n"
        "| game | x |\n| --- | ---: |\n| pong | 1 |\n| a\\|b | 2 |\n\nfile:\n\n```\ntext\n```\n"
    )
    found = page("T & t", blocks)
    assert "<title>T &amp; t</title>" in found
    assert '<tr><th scope="row">a|b</th><td>2</td></tr>' in found
    Page(found)


# Pictures ---------------------------------------------------------------------------------------------------------


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def drawn(results: Results) -> Figure:
    return figures.draw_curves(figures.panels(results), figures.styles(results.arms), RETURNS.metric)


@pytest.fixture(scope="module")
def three() -> Results:
    return compute(evaluation(("leap", "reptile", "scratch"), ("pong", "breakout", "air_raid")), FEW)


def test_curves_have_a_panel_for_every_game_and_one_for_all(three: Results):
    figure = drawn(three)
    assert [axes.get_title() for axes in figure.axes] == ["air_raid", "breakout", "pong", "IQM of 2 games"]
    for axes in figure.axes:
        assert axes.get_xlabel() == "agent steps"
        assert axes.get_ylabel() == ("human-normalized return" if "IQM" in axes.get_title() else "return (points)")
        assert axes.get_xlim() == (0, 1000)
        assert len(axes.collections) == 3  # a band for every arm
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["leap", "reptile", "scratch", "random play"]
    pong = figure.axes[2]
    reference, *arms = pong.lines
    assert reference.get_ydata()[0] == reference_scores()["pong"]["random"]
    for arm, line in zip(three.arms, arms, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), three.cells["pong"][arm].curve.point)


@pytest.mark.parametrize(
    ("panels", "grid"), [(1, (1, 1)), (3, (1, 3)), (4, (1, 4)), (5, (2, 3)), (8, (2, 4)), (9, (3, 3)), (17, (4, 5))]
)
def test_the_grid_of_curves_leaves_few_gaps(three: Results, panels: int, grid: tuple[int, int]):
    one = figures.panels(three)[0]
    figure = figures.draw_curves([one] * panels, figures.styles(three.arms), RETURNS.metric)
    assert figure.axes[0].get_gridspec().get_geometry() == grid


def test_arms_are_told_apart_without_colours_too(three: Results):
    looks = list(figures.styles(three.arms).values())
    assert len({look["color"] for look in looks}) == len({look["linestyle"] for look in looks}) == 3
    lines = drawn(three).axes[0].lines
    assert [to_hex(line.get_color()).upper() for line in lines] == [look["color"] for look in looks]
    many = compute(evaluation(tuple(f"arm{i:02}" for i in range(30)), ("pong",), (0,)), 2)
    assert len({str(style) for style in figures.styles(many.arms).values()}) == 30


def test_the_other_pictures_say_what_they_show(three: Results):
    profiles = figures.draw_profiles(three)
    assert [axes.get_title() for axes in profiles.axes] == ["final return", "area under the curve"]
    assert {"human-normalized score τ", "fraction of runs above τ"} <= set(texts(profiles))
    aggregates = figures.draw_aggregates(three)
    assert len(aggregates.axes) == 8
    assert {"IQM", "median", "mean", "optimality gap (less is better)", "human-normalized"} <= set(texts(aggregates))
    improvement = figures.draw_improvement(three)
    assert "P(better than scratch)" in texts(improvement)
    assert {"leap", "reptile"} <= set(texts(improvement))
    (bar, _) = improvement.axes[0].patches
    found = three.against["leap"].improvement["final"]
    assert (bar.get_x(), bar.get_x() + bar.get_width()) == pytest.approx(found[1:])


@pytest.mark.parametrize("games", [("pong",), SETS["seed24"]])
def test_pictures_are_whole_pngs_whatever_the_number_of_games(games: tuple[str, ...]):
    for data in figures.pictures(compute(evaluation(games=games, seeds=(0, 1)), 20)).values():
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width >= 600
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert int((pixels.max(axis=2) - pixels.min(axis=2) > 60).sum()) > 50  # coloured


# TensorBoard ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_pixel")
def test_tensorboard_reads_the_curves_back(tmp_path: Path):
    write(tmp_path, evaluation(games=("pong", "air_raid")))
    for _ in range(2):  # the second time anew
        build(tmp_path, FEW)
    folder = tmp_path / "tensorboard" / "eval"
    assert len(list(folder.iterdir())) == 1
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    charts = ("iqm", "air_raid", "pong")
    tags = {
        f"{chart}/{arm}/{field}"
        for chart in charts
        for arm in ("leap", "scratch")
        for field in ("point", "low", "high")
    }
    assert set(events.Tags()["scalars"]) == tags
    data = results_json(tmp_path)
    for arm in ("leap", "scratch"):
        for chart, curve in (("iqm", data["overall"][arm]["curve"]), ("pong", data["cells"]["pong"][arm]["curve"])):
            for field in ("point", "low", "high"):
                points = events.Scalars(f"{chart}/{arm}/{field}")
                assert [point.step for point in points] == data["grid"]
                np.testing.assert_allclose([point.value for point in points], curve[field], rtol=1e-6, atol=1e-6)
    (tensor,) = events.Tensors("custom_scalars__config__")
    assert events.SummaryMetadata("custom_scalars__config__").plugin_data.plugin_name == "custom_scalars"
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    assert [[chart.title for chart in category.chart] for category in layout.category] == [
        ["iqm"],
        ["air_raid", "pong"],
    ]
    series = [s for category in layout.category for chart in category.chart for s in chart.margin.series]
    assert {tag for s in series for tag in (s.value, s.lower, s.upper)} == tags
    assert all(
        (s.value, s.lower, s.upper) == tuple(f"{s.value[:-5]}{f}" for f in ("point", "low", "high")) for s in series
    )


@pytest.mark.usefixtures("one_pixel")
def test_what_is_not_known_yet_is_no_point(tmp_path: Path):
    late = RunResult("leap", "pong", 0, 1000, 1.0, np.array([500]), np.array([3.0]), ())
    build(write(tmp_path, [late]), FEW)
    events = EventAccumulator(str(tmp_path / "tensorboard/eval"), size_guidance={"scalars": 0}).Reload()
    assert [(point.step, point.value) for point in events.Scalars("pong/leap/point")] == [
        (step, 3.0) for step in range(500, 1001, 10)
    ]
    assert results_json(tmp_path)["cells"]["pong"]["leap"]["curve"]["point"][:50] == [None] * 49 + [3.0]
    assert math.isclose(float(rows(tmp_path)[0]["auc"]), 3.0)
