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


DECISIVE = "auc"
"""Value whose probability of improvement decides between arms on games: the area under the curve of returns.

The interquartile mean over games does not, because a game with high human-normalized scores outweighs the others.
"""


def conclusion(results: Results) -> str:
    """Return a comparison of all arms, which begins with a warning if there are too few seeds to conclude anything."""
    seeds = fewest_seeds(results)
    if not results.ranked:
        return "Nothing can be concluded: there is no game or task with results of every initialization."
    found = _of_games(results, seeds) if results.scoring.human_normalized else _of_errors(results, seeds)
    if seeds >= ENOUGH_SEEDS:
        return found[0].upper() + found[1:]
    few = "One seed is" if seeds == 1 else f"{seeds} seeds are"
    return f"{few} too few to conclude anything; run at least {ENOUGH_SEEDS} (--seeds {ENOUGH_SEEDS}). So far, {found}"


def fewest_seeds(results: Results) -> int:
    """Return the smallest number of seeds of any arm on any game that is compared; 0 if there is none."""
    cells = [cell for game in results.ranked for cell in results.cells[game].values()]
    return min((len(set(cell.seeds)) for cell in cells), default=0)


def _of_errors(results: Results, seeds: int) -> str:
    """Return the error of each arm and the verdict: "after 2,000 examples the mean test error of leap is 12.0 % …"."""
    value = next(iter(results.scoring.values))
    shown = (
        f"of {arm} {'is ' if not place else ''}{_interval(overall.aggregates[value]['mean'], percent=True, decimals=1)}"
        for place, (arm, overall) in enumerate(results.overall.items())
    )
    return f"after {_length(results)} the mean {value.replace('_', ' ')} {', '.join(shown)}{_verdict(results, seeds)}"


def _of_games(results: Results, seeds: int) -> str:
    """Return how often each arm beats the baseline, the verdict, and beside it the IQM, if games have human scores."""
    if not results.against:
        if not results.overall:
            return "there is nothing to compare the returns with."
        return f"over {_length(results)}, {_iqm(results)}. There is nothing to compare it with.{_near_random(results)}"
    shown = [
        f"{_interval(found.improvement[DECISIVE], percent=False, decimals=2)} for {arm}"
        for arm, found in results.against.items()
    ]
    compared = (
        f"over {_length(results)}, the probability that a run has a larger {results.scoring.values[DECISIVE]} than one "
        f"of {results.baseline} on the same game is {_listed(shown)}{_verdict(results, seeds)}"
    )
    if results.overall:
        iqm = _iqm(results)
        return f"{compared} {iqm[0].upper()}{iqm[1:]}.{_disagreement(results, seeds)}{_near_random(results)}"
    start = "no game with runs of every arm has a published human score, so returns are compared game by game."
    return f"{start} {compared[0].upper()}{compared[1:]}"


def _iqm(results: Results) -> str:
    """Return the IQM of each arm: "the IQM of human-normalized areas is 0.31 [0.22, 0.40] for leap and …"."""
    intervals = {arm: overall.aggregates[DECISIVE]["iqm"] for arm, overall in results.overall.items()}
    points = sorted(interval.point for interval in intervals.values())
    decimals = 3 if any(high - low < 0.02 for low, high in itertools.pairwise(points)) else 2
    shown = [f"{_interval(found, percent=False, decimals=decimals)} for {arm}" for arm, found in intervals.items()]
    return f"the IQM of human-normalized areas is {_listed(shown)}"


def _disagreement(results: Results, seeds: int) -> str:
    """Return a sentence about the arms on which the IQM has another verdict than the probability, or ""."""
    if seeds < ENOUGH_SEEDS:
        return ""
    by_verdict: dict[str, list[str]] = {}
    for arm, found in results.against.items():
        interval = found.intervals.get(DECISIVE)
        verdict = OPEN if interval is None else _side_of(interval, 0.0)
        if _compared(results, found) not in (verdict, UNPAIRED):
            by_verdict.setdefault(verdict, []).append(arm)
    if not by_verdict:
        return ""
    return (
        " The paired difference in IQM, in which games with high scores weigh most, disagrees: by it, "
        f"{_clauses(by_verdict, results.baseline)}."
    )


def _verdict(results: Results, seeds: int) -> str:
    """Return which arms are better or worse than the baseline, as the end of the sentence that compares them."""
    if not results.against:
        return "; there is nothing to compare it with."
    if seeds < ENOUGH_SEEDS:
        return "."
    by_verdict: dict[str, list[str]] = {}
    for arm, found in results.against.items():
        by_verdict.setdefault(_compared(results, found), []).append(arm)
    return f": {OPEN}." if list(by_verdict) == [OPEN] else f": {_clauses(by_verdict, results.baseline)}."


def _clauses(by_verdict: dict[str, list[str]], baseline: str) -> str:
    """Return a clause for each verdict: "leap is better than scratch; fomaml and scratch are not told apart"."""
    parts = []
    for verdict, arms in by_verdict.items():
        if verdict == OPEN:
            parts.append(f"{_listed([*arms, baseline])} are {OPEN}")
        elif verdict == UNPAIRED:
            parts.append(
                f"{_listed(arms)} and {baseline} are {UNPAIRED}, because fewer than {ENOUGH_SEEDS} of their "
                "seeds are the same"
            )
        else:
            parts.append(f"{_listed(arms)} {'is' if len(arms) == 1 else 'are'} {verdict} than {baseline}")
    return "; ".join(parts)


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
    """Return the verdict on an arm: on games from how often it wins, on images from its paired difference in error."""
    if results.overall and found.seeds_in_common < ENOUGH_SEEDS:
        return UNPAIRED
    if results.scoring.human_normalized:
        return _side_of(found.improvement[DECISIVE], 0.5)
    interval = found.intervals.get(next(iter(results.scoring.values)))
    return OPEN if interval is None else _side_of(interval, 0.0, less_is_better=True)


def _side_of(interval: Interval, even: float, *, less_is_better: bool = False) -> str:
    """Return the verdict for an interval that lies above, below or around the value at which arms are equal."""
    if interval.low <= even <= interval.high:
        return OPEN
    return "better" if (interval.low > even) != less_is_better else "worse"


def _interval(interval: Interval, *, percent: bool, decimals: int) -> str:
    point, low, high = (f"{100 * x:.1f} %" if percent else f"{x:.{decimals}f}" for x in interval)
    return point if low == high else f"{point} [{low}, {high}]"


def _length(results: Results) -> str:
    """Return how long runs are: "1,000,000 agent steps", or "2,000 to 4,000 examples"."""
    budgets = sorted(set(results.budgets.values()))
    length = f"{budgets[0]:,}" + (f" to {budgets[-1]:,}" if len(budgets) > 1 else "")
    return f"{length} {results.scoring.metric.step_unit}"
