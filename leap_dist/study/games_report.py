"""Writes the report of a study of Atari games: the counterpart of the paper's figure 4, and all arms compared.

table.md      report for people     results.csv     one row per run
figures/*.png its pictures          results.json    every number, with its interval
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from leap_dist.config.loading import ConfigError
from leap_dist.evaluation.report import figures, text
from leap_dist.evaluation.report.build import RETURN_COLUMNS, ReportFolder, returns_numbers
from leap_dist.evaluation.report.document import Block, Heading, Paragraph, Picture, markdown
from leap_dist.evaluation.results import Results, compute
from leap_dist.evaluation.runs import RunResult, load_all
from leap_dist.evaluation.scoring import RETURNS, Row
from leap_dist.study.settings_of_arms import settings_of_arms
from leap_dist.study.spec import Study, evaluation_of

COLUMNS: dict[str, Callable[[Row], Any]] = {
    "group": lambda row: row.group,
    **RETURN_COLUMNS,
    "agent_seed": lambda row: row.run.seed,
}
"""Columns of results.csv; `seed` is that of the meta-training."""
CURVES = "figure4.png"
"""Name of the picture with the learning curves."""


def build(out: Path, study: Study, repetitions: int) -> list[str]:
    """Write the report, as far as there are results, and return warnings of one line each.

    Raises ConfigError if there is no finished run yet, and OSError if the report cannot be written.
    """
    by_group, warnings = _load(out, study)
    if not by_group:
        damaged = f"; {warnings[0]}" if warnings else ""
        raise ConfigError(f"out: {out} holds no results of the study yet{damaged}")
    folder = ReportFolder(out, "study-report")
    blocks: list[Block] = [Heading("Atari: transfer to games", 1), Paragraph(_training(study))]
    pictures: dict[str, bytes] = {}
    numbers: dict[str, Any] = {}
    rows: list[Row] = []
    for group, found in by_group.items():
        results = compute(found, RETURNS, warnings if group == next(iter(by_group)) else (), repetitions)
        drawn = figures.pictures(results)
        pictures |= {_name(name, group, study): data for name, data in drawn.items()}
        blocks += _section(results, group, study, drawn, repetitions)
        numbers[group] = returns_numbers(results)
        rows += results.rows
    every = [_name(name, group, study) for group in study.groups for name in figures.NAMES]
    blocks += settings_of_arms(study)
    folder.write_pictures(pictures, every)
    folder.write("table.md", markdown(blocks))
    folder.write_table(COLUMNS, rows)
    folder.write_numbers({"study": study, "groups": numbers, "warnings": warnings}, repetitions)
    return [*warnings, *dict.fromkeys(w for one in numbers.values() for w in one["warnings"] if w not in warnings)]


def _load(out: Path, study: Study) -> tuple[dict[str, list[Row]], list[str]]:
    """Return the scored runs of each group that has any, in the order of the arms, and warnings."""
    found: dict[str, list[Row]] = {}
    warnings: list[str] = []
    for group, seed in study.comparisons():
        folder = evaluation_of(out, group, seed)
        runs, wrong = load_all(folder)
        if others := sorted({run.arm for run in runs} - set(study.arms)):
            wrong.append(f"left out, because the study does not name them: {', '.join(others)}")
        rows, more = RETURNS.score_all([run for run in runs if run.arm in study.arms], group, seed)
        if rows:
            found.setdefault(group, []).extend(rows)
        warnings += [f"{folder.relative_to(out)}: {warning}" for warning in (*wrong, *more)]
        if lacking := _missing(runs, study, seed):
            warnings.append(f"{folder.relative_to(out)}: incomplete: {lacking}")
    for rows in found.values():
        rows.sort(key=lambda row: (study.arms.index(row.run.arm), row.run.game, row.seed, row.run.seed))
    return found, warnings


def _missing(runs: Sequence[RunResult], study: Study, seed: int) -> str:
    """Return in words which of the runs that the study plans for one of its seeds are missing, or ""."""
    first = seed * study.test["seeds"]
    agents = range(first, first + study.test["seeds"])
    present = {(run.arm, run.game, run.seed) for run in runs}
    planned = itertools.product(study.arms, study.test["games"], agents)
    lacking = Counter((arm, game) for arm, game, agent in planned if (arm, game, agent) not in present)
    if not lacking:
        return ""
    places = ", ".join(f"{arm}/{game}" + (f" ({count})" if count > 1 else "") for (arm, game), count in lacking.items())
    return f"{lacking.total()} of {len(study.arms) * len(study.test['games']) * len(agents)} runs are missing: {places}"


def _section(results: Results, group: str, study: Study, pictures: dict[str, bytes], repetitions: int) -> list[Block]:
    """Return the part of the report on one training set."""
    body = text.blocks(results, [], results.warnings, pictures, [], repetitions)
    return [Heading(f"Trained on {group}"), *(_renamed(block, group, study) for block in body[1:])]


def _renamed(block: Block, group: str, study: Study) -> Block:
    """Return a block of an evaluation's report with the path that its picture has in the study."""
    if not isinstance(block, Picture):
        return block
    return replace(block, path=f"figures/{_name(Path(block.path).name, group, study)}")


def _training(study: Study) -> str:
    return (
        f"Meta-training: {study.meta_updates:,} meta-updates of {study.batch_size} tasks, {study.task_steps:,} agent "
        f"steps each; seeds {', '.join(map(str, study.seeds))}. Counterpart of the paper's figure 4."
    )


def _prefix(group: str, study: Study) -> str:
    """Return the prefix of the names of a group's pictures: empty in a study with a single group."""
    return "" if len(study.groups) == 1 else f"{group}-"


def _name(name: str, group: str, study: Study) -> str:
    """Return the file name of a picture of an evaluation in the study."""
    return _prefix(group, study) + (CURVES if name == "curves.png" else name)
