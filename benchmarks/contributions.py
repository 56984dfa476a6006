"""Measure which form of the pull-forward gradient carries a signal on Atari: are two of the same game alike?

    python -m benchmarks.contributions record --games assault asterix ms_pacman --seeds 2 --out contributions
    python -m benchmarks.contributions compare contributions

`record` trains every game from one random encoder, or from the initialization given as `--init`, with several seeds
for heads, actions and environments. While a task trains, it accumulates the pull-forward gradient in many forms at
once, so that all of them describe the same path. `compare` prints for each form the mean cosine between contributions
of the same game with different seeds, between different games, and between vectors whose entries were shuffled, and
the range of norms: for the first tenth of the path, the rest and the whole, and for the convolutions and the linear
layer. Means have 95 % intervals, for which games are drawn with replacement. `compare --csv FILE` also writes the
cosine of every pair to a file. If contributions of the same game are no more similar than those of different games, a
form carries no signal of the game. If those of different games are no more similar than shuffled vectors, it carries
no signal that games share, and an initialization can learn no other.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoder_features import features_of, frames
from benchmarks.harness import progress
from leap_dist.config.loading import resolve
from leap_dist.envs.games import HELD_OUT
from leap_dist.evaluation.statistics import Interval
from leap_dist.leap.path_statistics import Metric
from leap_dist.leap.pull_forward import PullForward
from leap_dist.nn import actor_critic
from leap_dist.nn.flat_vector import Manifest, flatten
from leap_dist.protocol.messages import Lease, Task
from leap_dist.protocol.seeds import derived_seed
from leap_dist.tasks.atari.a2c import A2C
from leap_dist.tasks.atari.rollout import a2c_loss, n_step_returns
from leap_dist.weights.initialization import read_initialization
from leap_dist.worker.start import Start, make_learner

SMOOTHING = 0.99
"""Decay of the moving average in the smoothed forms: about a hundred rollouts."""


@dataclass(frozen=True)
class Form:
    """A form of the pull-forward gradient."""

    metric: Metric
    loss_weight: float = 1.0
    smoothing: float = 0.0
    loss: str = "batch"
    """What is used as f in Δf: the loss of the sampled "batch", of a "fixed" batch, or minus the mean "reward"."""
    stabilize: bool = True


FORMS: dict[str, Form] = {
    "energy, λ = 1": Form("energy"),
    "energy, smoothed": Form("energy", smoothing=SMOOTHING),
    "energy, fixed batch": Form("energy", loss="fixed"),
    "energy, reward": Form("energy", loss="reward", smoothing=SMOOTHING),
    "length, λ = 1": Form("length"),
    "length, λ = 0.01": Form("length", loss_weight=0.01),
    "length, λ = 0": Form("length", loss_weight=0.0),
    "length, smoothed": Form("length", smoothing=SMOOTHING),
    "length, fixed batch": Form("length", loss="fixed"),
    "length, reward": Form("length", loss="reward", smoothing=SMOOTHING),
    "length, −Δf": Form("length", stabilize=False),
}
"""All recorded forms, by their names in the table."""
FIRST = 0.1
"""Initial part of the path whose terms are kept apart, because it starts with a random value function."""
REPTILE = "energy, λ = 0"
"""Path term of the energy, θ_0 − θ_K, which is Reptile's gradient."""


class FixedBatch:
    """The A2C loss on the states, actions and returns of a task's first rollout, at the current parameters.

    Create it before the first rollout, and complete it with `freeze` afterwards.
    """

    def __init__(self, learner: A2C) -> None:
        self._learner = learner
        self._frames: list[Tensor] = [learner._rollout._frames.clone()]
        self._set_frames = learner._rollout.set_frames
        learner._rollout.set_frames = self._keep  # type: ignore[method-assign]

    def _keep(self, observations: np.ndarray) -> None:
        self._set_frames(observations)
        self._frames.append(torch.from_numpy(observations.copy()))

    def freeze(self) -> None:
        """Keep the states, actions and returns of the first rollout."""
        rollout = self._learner._rollout
        rollout.set_frames = self._set_frames  # type: ignore[method-assign]
        self._states = torch.cat(self._frames[:-1]).float() / 255
        rewards, discounts = rollout._outcome
        self._returns = n_step_returns(rewards, discounts, rollout._last_value).reshape(-1).clone()
        self._actions = rollout._actions.view(-1, 1).clone()

    @torch.no_grad()
    def loss(self) -> float:
        """Return the loss at the current parameters."""
        logits, values = self._learner._model(self._states)
        return float(a2c_loss(logits, values, self._returns, self._actions, self._learner._agent)[0])


def start_vector(init: str) -> np.ndarray:
    """Return the encoder that tasks start from, flat float32: that of an initialization, or a random one for ""."""
    if not init:
        return actor_critic.initialization(4, 0)[1]
    return flatten(read_initialization(init).encoder().parameters()).numpy()


def record(
    game: str, seed: int, task_steps: int, preset: str, forms: Mapping[str, Form], init: str = ""
) -> dict[str, np.ndarray]:
    """Train one task and return, for each form, both terms of the pull-forward gradient for two parts of the path.

    These are the first tenth and the rest: (2 parts, 2 terms, parameters), float32. `init` is as in `start_vector`.
    """
    config = resolve(preset, {"games": [game], "task_steps": task_steps, "workers": 1})
    torch.set_num_threads(config.worker.threads)
    vector = start_vector(init)
    own_seed = derived_seed(1_000 + seed, game)
    task = Task(seed, game, 0, seed=own_seed, steps=task_steps)
    learner = make_learner(config, Lease("record", task, "record", "record", 0, 60.0), Start(vector))
    assert isinstance(learner, A2C)
    try:
        paths = {
            name: PullForward(
                learner.shared.values(),
                metric=form.metric,
                loss_weight=form.loss_weight,
                loss_smoothing=form.smoothing,
                stabilize=form.stabilize,
            )
            for name, form in forms.items()
        }
        fixed = FixedBatch(learner)
        updates, first = task_steps // learner.steps_per_update, {}
        for number in range(updates):
            if number == int(FIRST * updates):
                first = {name: torch.stack(path.terms()) for name, path in paths.items()}
            losses = {"batch": float(learner.backward())}
            if not number:
                fixed.freeze()
            losses["fixed"] = fixed.loss()
            losses["reward"] = -float(learner._rollout.rewards.mean())
            for name, path in paths.items():
                path.observe(losses[forms[name].loss])
            learner.step()
        whole = {name: torch.stack(path.terms()) for name, path in paths.items()}
        return {name: torch.stack([first[name], whole[name] - first[name]]).numpy() for name in paths}
    finally:
        learner.close()


# Comparison -------------------------------------------------------------------------------------------------------

Contributions = dict[tuple[str, int], dict[str, np.ndarray]]
"""What `record` returns, by game and seed."""
PARTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "first tenth": lambda parts: parts[0],
    "the rest": lambda parts: parts[1],
    "all": lambda parts: parts.sum(axis=0),
}
"""Functions from the two parts of a path to both terms, (2, parameters), by name."""
_CONVOLUTIONS = Manifest.of(actor_critic.ActorCritic(actor_critic.Encoder(4), 1).parameters_of("convolutions")[0]).size
LAYERS: dict[str, slice] = {
    "all": slice(None),
    "convolutions": slice(0, _CONVOLUTIONS),
    "linear": slice(_CONVOLUTIONS, None),
}
"""Parts of the encoder's flat vector, for four gray frames."""


def load(folder: Path) -> Contributions:
    """Return everything that `record` has written to a folder."""
    found: Contributions = {}
    for path in sorted(folder.glob("*/*.npz")):
        with np.load(path) as file:
            found[path.parent.name, int(path.stem)] = {name: file[name] for name in file.files}
    return found


def gradients(found: Contributions, part: str, layer: str) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Return the contributions of each form, and separately its loss term, as vectors by game and seed."""
    names = list(next(iter(found.values())))
    columns: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {
        REPTILE: lambda terms: terms["energy, λ = 1"][1],
    }
    for name in names:
        columns[name] = lambda terms, name=name: terms[name].sum(axis=0)  # type: ignore[misc]
        if FORMS[name].loss_weight:
            columns[f"{name}: loss term"] = lambda terms, name=name: terms[name][0]  # type: ignore[misc]
    chosen = {
        key: {name: PARTS[part](parts)[:, LAYERS[layer]] for name, parts in forms.items()}
        for key, forms in found.items()
    }
    return {title: {key: of(terms) for key, terms in chosen.items()} for title, of in columns.items()}


Pairs = dict[tuple[tuple[str, int], tuple[str, int]], float]
"""Cosine of each pair of contributions, which are named by game and seed."""
RESAMPLES = 2_000
"""Number of bootstrap samples of games."""


def cosines(vectors: Mapping[tuple[str, int], np.ndarray]) -> Pairs:
    """Return the cosines of all pairs of vectors; that of a zero vector is 0."""
    exact = {key: vector.astype(np.float64) for key, vector in vectors.items()}
    unit = {key: vector / max(float(np.linalg.norm(vector)), 1e-30) for key, vector in exact.items()}
    return {(a, b): float(unit[a] @ unit[b]) for a, b in itertools.combinations(unit, 2)}


def mean_of(pairs: Pairs, *, same_game: bool) -> Interval:
    """Return the mean cosine of pairs of the same game, or of different games, with a 95 % interval.

    The interval resamples games: a game that is drawn twice brings its pairs twice, but is no other game than itself.
    """
    games = sorted({key[0] for pair in pairs for key in pair})
    number = {game: index for index, game in enumerate(games)}
    total, count = np.zeros((2, len(games), len(games)))
    for ((a, _), (b, _)), cosine in pairs.items():
        if (a == b) == same_game:
            at = tuple(sorted((number[a], number[b])))
            total[at] += cosine
            count[at] += 1
    drawn = np.random.default_rng(0).multinomial(len(games), [1 / len(games)] * len(games), size=RESAMPLES)
    weights = np.apply_along_axis(np.diag, 1, drawn) if same_game else drawn[:, :, None] * drawn[:, None, :]
    counts = (weights * count).sum(axis=(1, 2))
    means = (weights * total).sum(axis=(1, 2))[counts > 0] / counts[counts > 0]
    return Interval(float(total.sum() / count.sum()), *(float(end) for end in np.percentile(means, (2.5, 97.5))))


def compare(found: Contributions, part: str = "all", layer: str = "all") -> list[dict[str, Any]]:
    """Return a row of the table for each form, for a part of the path and of the encoder."""
    rng = np.random.default_rng(0)
    rows = []
    for title, vectors in gradients(found, part, layer).items():
        pairs = cosines(vectors)
        shuffled = cosines({key: rng.permutation(vector) for key, vector in vectors.items()})
        norms = [float(np.linalg.norm(vector)) for vector in vectors.values()]
        rows.append(
            {
                "form": title,
                "same game": mean_of(pairs, same_game=True),
                "other game": mean_of(pairs, same_game=False),
                "shuffled": mean_of(shuffled, same_game=False),
                "smallest norm": min(norms),
                "largest norm": max(norms),
            }
        )
    return rows


FRAMES_OF = HELD_OUT["seed24"]
"""Games whose frames, in random play, show how a step affects the encoder. None of them is recorded."""
STEPS = (0.01, 0.03, 0.1)
"""Lengths of that step, as shares of the encoder's norm."""


def moved(found: Contributions, forms: Sequence[str], initial: np.ndarray) -> list[str]:
    """Return lines of a table: statistics of the encoder before a step, and after one against the mean contribution.

    `initial` is the flat vector of the encoder that the contributions belong to.
    Each cell has the mean norm of the features, the share of dead units and the effective rank. Contributions
    are scaled to length 1 for the mean, so that each task has the same weight.
    """
    seen, vectors = frames(FRAMES_OF), gradients(found, "all", "all")

    def after(step: np.ndarray) -> str:
        found = features_of(initial - step, seen)
        return f"{found.norm:.2g}, {found.dead:.2f}, {found.rank:.1f}"

    lines = [f"| a step against | {' | '.join(f'{length:.0%}' for length in STEPS)} |", "|---" * (1 + len(STEPS)) + "|"]
    lines.append(f"| nothing | {' | '.join([after(np.zeros_like(initial))] * len(STEPS))} |")
    for form in forms:
        mean = np.mean([vector / np.linalg.norm(vector) for vector in vectors[form].values()], axis=0)
        direction = np.linalg.norm(initial) * mean / np.linalg.norm(mean)
        lines.append(f"| {form} | {' | '.join(after(length * direction) for length in STEPS)} |")
    return lines


def shown(mean: Interval) -> str:
    """Return a mean with its interval as text."""
    return f"{mean.point:.2f} [{mean.low:.2f}, {mean.high:.2f}]"


def write_pairs(found: Contributions, path: Path) -> None:
    """Write the cosine of every pair to a CSV file, for each form, part of the path and part of the encoder."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("form", "part", "layers", "game", "seed", "other_game", "other_seed", "cosine"))
        for part, layer in itertools.product(PARTS, LAYERS):
            for form, vectors in gradients(found, part, layer).items():
                for (one, other), cosine in cosines(vectors).items():
                    writer.writerow((form, part, layer, *one, *other, f"{cosine:.4f}"))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| form | same game, other seed | other game | shuffled | norms |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = " | ".join(shown(row[name]) for name in ("same game", "other game", "shuffled"))
        lines.append(f"| {row['form']} | {numbers} | {row['smallest norm']:.3g} … {row['largest norm']:.3g} |")
    return "\n".join(lines)


def main() -> None:
    """Record contributions, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train tasks and write their contributions")
    recording.add_argument("--games", nargs="+", required=True)
    recording.add_argument("--seeds", type=int, default=2)
    recording.add_argument("--task-steps", type=int, default=100_000)
    recording.add_argument("--preset", default="fast")
    recording.add_argument("--init", default="", help="start: a run, its init.safetensors or pretrained:NAME")
    recording.add_argument("--out", type=Path, required=True)
    comparing = commands.add_parser("compare", help="print the table")
    comparing.add_argument("folder", type=Path)
    comparing.add_argument("--init", default="", help="the same as for record")
    comparing.add_argument("--csv", type=Path, help="also write the cosine of every pair to this file")
    given = parser.parse_args()
    if given.command == "compare":
        found = load(given.folder)
        if not found:
            parser.error(f"there are no contributions in {given.folder}")
        for part, layer in itertools.product(PARTS, LAYERS):
            print(f"\npart of the path: {part}; layers: {layer}\n\n{table(compare(found, part, layer))}")
        loss_terms = [f"{name}: loss term" for name in FORMS if FORMS[name].loss_weight]
        print()
        print("\n".join(moved(found, (REPTILE, *loss_terms), start_vector(given.init))))
        if given.csv is not None:
            write_pairs(found, given.csv)
        return
    for seed, game in itertools.product(range(given.seeds), given.games):
        path = given.out / game / f"{seed}.npz"
        if path.exists():
            continue
        terms = record(game, seed, given.task_steps, given.preset, FORMS, given.init)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **terms)
        unfinished.replace(path)
        progress(f"{game}, seed {seed}: done")


if __name__ == "__main__":
    main()
