"""Warnings tell the readers of a report, before its numbers, which runs are missing or silent and what is uncertain."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Sequence

from leap_dist.evaluation.scoring import Row, Scoring


def caveats(rows: Sequence[Row], scoring: Scoring, excluded: Collection[str], *, counts_any: bool) -> list[str]:
    """Return the warnings of a report, one line each.

    Args:
        rows: all scored runs, at least one.
        scoring: how they are scored.
        excluded: games left out of the scores over all games.
        counts_any: whether any game is included.
    """
    runs = [row.run for row in rows]
    games, seeds = sorted({run.game for run in runs}), sorted({(row.seed, row.run.seed) for row in rows})
    found = []
    for game in games if scoring.human_normalized else []:
        budget, *others = sorted({run.budget for run in runs if run.game == game})
        if others:
            more = ", ".join(f"{other:,}" for other in others)
            found.append(
                f"budgets differ: runs of {game} are compared over the first {budget:,} agent steps only, although "
                f"some have {more}"
            )
    if silent := [(row.run.arm, row.run.game, row.run.seed) for row in rows if row.silent]:
        found.append(f"left out, because no episode ended in them ({len(silent)}): {_places(silent)}")
    present = {(row.run.arm, row.run.game, row.seed, row.run.seed) for row in rows}
    wanted = itertools.product(dict.fromkeys(run.arm for run in runs), games, seeds)
    if missing := [(arm, game, seed) for arm, game, (of, seed) in wanted if (arm, game, of, seed) not in present]:
        found.append(f"incomplete: missing runs ({len(missing)}): {_places(missing)}")
    if excluded and not scoring.human_normalized:
        found.append(f"left out of the means over all tasks, because an arm has no run there: {', '.join(excluded)}")
    if len(seeds) == 1:
        found.append("there is only one seed: intervals have no width, and do not show the influence of chance")
    if not counts_any and scoring.human_normalized:
        found.append("there are no scores over all games: no game has a published human score and runs of every arm")
    return found


def _places(runs: list[tuple[str, str, int]]) -> str:
    """Return where runs belong, each given as (arm, game, seed)."""
    by_place: defaultdict[str, list[str]] = defaultdict(list)
    for arm, game, seed in runs:
        by_place[f"{arm}/{game}"].append(str(seed))
    return "; ".join(f"{place} seed {', '.join(of_place)}" for place, of_place in by_place.items())
