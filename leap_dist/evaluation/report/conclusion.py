"""What an evaluation has shown, in words: the first paragraph of its report."""

from __future__ import annotations

import itertools

from leap_dist.evaluation.results import Against, Results
from leap_dist.evaluation.statistics import Interval

ENOUGH_SEEDS = 5
"""Smallest number of seeds whose result is stated without a warning."""

NEAR_RANDOM = 0.02
"""Human-normalized score below which agents hardly play better than at random, which scores 0."""

OPEN = "not told apart"
"""Verdict on two arms whose difference may be zero."""

UNPAIRED = "not compared"
"""Verdict on two arms with fewer than `ENOUGH_SEEDS` seeds in common, whose difference cannot be taken in pairs."""


def conclusion(results: Results) -> str:
    """Return a comparison of all arms, which begins with a warning if there are too few seeds to conclude anything."""
    seeds = fewest_seeds(results)
    if results.overall:
        found = f"{_scores(results)}{_verdict(results, seeds)}{_near_random(results)}"
    elif results.ranked:
        found = _ranks(results, seeds)
    else:
        return "Nothing can be concluded: there is no game or task with results of every initialization."
    if seeds >= ENOUGH_SEEDS:
        return found[0].upper() + found[1:]
    few = "One seed is" if seeds == 1 else f"{seeds} seeds are"
    return f"{few} too few to conclude anything; run at least {ENOUGH_SEEDS} (--seeds {ENOUGH_SEEDS}). So far, {found}"


def fewest_seeds(results: Results) -> int:
    """Return the smallest number of seeds of any arm on any game that is compared; 0 if there is none."""
    cells = [cell for game in results.ranked for cell in results.cells[game].values()]
    return min((len(set(cell.seeds)) for cell in cells), default=0)


def _scores(results: Results) -> str:
    """Return the score of each arm: "after 1M agent steps leap's IQM is 0.31 [0.22, 0.40], scratch's 0.27 …"."""
    games = results.scoring.human_normalized
    value, aggregate = ("final", "iqm") if games else (next(iter(results.scoring.values)), "mean")
    name = "IQM" if games else f"mean {value.replace('_', ' ')}"
    intervals = {arm: overall.aggregates[value][aggregate] for arm, overall in results.overall.items()}
    points = sorted(interval.point for interval in intervals.values())
    are_close = any(high - low < 0.02 for low, high in itertools.pairwise(points))
    shown = [
        f"{arm}'s {_interval(interval, percent=not games, decimals=3 if are_close else 2)}"
        for arm, interval in intervals.items()
    ]
    first, *others = shown
    first = first.replace("'s ", f"'s {name} is ", 1)
    budgets = sorted(set(results.budgets.values()))
    length = _budget(budgets[0]) + (f" to {_budget(budgets[-1])}" if len(budgets) > 1 else "")
    return f"after {length} {results.scoring.metric.step_unit} {', '.join([first, *others])}"


def _ranks(results: Results, seeds: int) -> str:
    """Return how often each arm beats the baseline, which can be said of games without human scores, too."""
    if not results.against:
        return "there is nothing to compare the returns with."
    name, heading = next(iter(results.scoring.values.items()))
    shown = [
        f"{arm} {_interval(found.improvement[name], percent=False, decimals=2)}"
        for arm, found in results.against.items()
    ]
    verdict = _verdict(results, seeds)
    return (
        "no game with runs of every arm has a published human score, so returns are compared game by game. The "
        "probability that a run has a "
        f"higher {heading} than one of {results.baseline} on the same game is, for {', '.join(shown)}{verdict}"
    )


def _verdict(results: Results, seeds: int) -> str:
    """Return which arms are better or worse than the baseline, as a clause that follows the scores."""
    if not results.against:
        return "; there is nothing to compare it with."
    if seeds < ENOUGH_SEEDS:
        return "."
    by_verdict: dict[str, list[str]] = {}
    for arm, found in results.against.items():
        by_verdict.setdefault(_compared(results, found), []).append(arm)
    if list(by_verdict) == [OPEN]:
        return f": {OPEN}."
    parts = []
    for verdict, arms in by_verdict.items():
        if verdict == OPEN:
            parts.append(f"{_listed([*arms, results.baseline])} are {OPEN}")
        elif verdict == UNPAIRED:
            parts.append(
                f"{_listed(arms)} and {results.baseline} are {UNPAIRED}, because fewer than {ENOUGH_SEEDS} of their "
                "seeds are the same"
            )
        else:
            parts.append(f"{_listed(arms)} {'is' if len(arms) == 1 else 'are'} {verdict} than {results.baseline}")
    return f": {'; '.join(parts)}."


def _listed(names: list[str]) -> str:
    """Return names as people list them: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _near_random(results: Results) -> str:
    """Return a warning if no arm has learned to play, because a difference between them then says little."""
    if not results.scoring.human_normalized:
        return ""
    scores = [overall.aggregates["final"]["iqm"].point for overall in results.overall.values()]
    if max(scores) >= NEAR_RANDOM:
        return ""
    who = "It plays" if len(scores) == 1 else "None of them plays"
    better = "no better" if len(scores) == 1 else "better"
    return f" {who} {better} than random play (0), so this says little about longer training."


def _compared(results: Results, found: Against) -> str:
    """Return the verdict on an arm, from its paired difference to the baseline or, without scores, from its wins."""
    value = next(iter(results.scoring.values))
    if results.overall and found.seeds_in_common < ENOUGH_SEEDS:
        return UNPAIRED
    interval, even = (found.intervals.get(value), 0.0) if results.overall else (found.improvement[value], 0.5)
    if interval is None or interval.low <= even <= interval.high:
        return OPEN
    return "better" if (interval.low > even) == results.scoring.human_normalized else "worse"


def _interval(interval: Interval, *, percent: bool, decimals: int) -> str:
    point, low, high = (f"{100 * x:.1f} %" if percent else f"{x:.{decimals}f}" for x in interval)
    return point if low == high else f"{point} [{low}, {high}]"


def _budget(steps: int) -> str:
    """Return a number of steps in the usual short form: 1M, 200k, 1,234."""
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if steps >= size and steps % (size // 10) == 0:
            return f"{steps / size:,.12g}{letter}"
    return f"{steps:,}"
