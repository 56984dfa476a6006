"""All TensorBoard tags of a run, and the layout of its custom scalars. docs/monitoring.md explains them."""

from __future__ import annotations

from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary as summaries

from leap_dist.config.registry import ERROR, RETURN, Metric
from leap_dist.nn.features import STATISTICS

META = (
    "loss",
    "error",
    "score_human_normalized",
    "score_iqm",
    "score_lower_quartile",
    "score_upper_quartile",
    "update_norm",
    "gradient_norm",
    "path_length",
    "path_energy",
    "loss_term_norm",
    "path_term_norm",
    "term_cosine",
    "staleness",
    "staleness_weight",
    "clip",
    "agreement",
    *(f"features/{name}" for name in STATISTICS),
)
"""Tags meta/… and meta_frames/… of run `server`."""

CURVE = ("return", "human_normalized", "error", "loss", "policy_loss", "value_loss", "entropy")
"""Tags task/… of a game's run, written at several points of a task."""

PATH = ("path_length", "path_energy", "loss_term_norm", "path_term_norm", "term_cosine", "pull_norm")
"""Tags task/… of a game's run, written at the end of a task."""

OPS = (
    "steps_per_second",
    "pushes_per_second",
    "push_ms_p50",
    "push_ms_p99",
    "pace_seconds",
    "busy_share",
    "update_ms_p50",
    "update_ms_p99",
    "workers_alive",
    "workers_wanted",
    "restarts",
    "server_restarts",
    "contributions_waiting",
    "duplicates",
    "partials",
    "leases_lost",
    "clipped",
    "all_zero",
    "checkpoint_age",
    "write_failures",
)
"""Tags ops/… of run `server`; there are also ops/refused/<reason>, ops/time_share/<part> and ops/start/<part>."""

AGREEMENT = "meta/agreement_between_games"
"""Tag of the heat map of run `server`."""

PLAY = "play"
"""Prefix of the tag play/<game> of a game's videos."""

_EVERY_GAME = {
    RETURN: {
        "return": "task/return$",
        "human-normalized score": "task/human_normalized$",
        "entropy": "task/entropy$",
        "value loss": "task/value_loss$",
        "loss": "task/loss$",
    },
    ERROR: {"training error": "task/error$", "loss": "task/loss$"},
}
_OVER_GAMES: dict[Metric, dict[str, list[Any]]] = {
    RETURN: {
        "human-normalized score over all games: interquartile mean and quartiles": [
            "Margin",
            ["meta/score_iqm", "meta/score_lower_quartile", "meta/score_upper_quartile"],
        ]
    },
    ERROR: {"training error, mean of a task": ["Multiline", ["meta/error$"]]},
}
_OF_STARTS: dict[Metric, dict[str, dict[str, list[Any]]]] = {
    RETURN: {
        "starting point": {
            "norm of φ relative to a fresh one": ["Multiline", ["meta/features/norm_ratio$"]],
            "share of dead units": ["Multiline", ["meta/features/dead_units$"]],
            "effective rank of the features": ["Multiline", ["meta/features/effective_rank$"]],
            "entropy of the policy, at the start and after 1,000 updates": [
                "Multiline",
                ["meta/features/entropy$", "meta/features/entropy_later$"],
            ],
            "norm of the first gradient": ["Multiline", ["meta/features/gradient_norm$"]],
        }
    },
    ERROR: {},
}
_EVERY_PATH = {
    "length": "task/path_length$",
    "energy": "task/path_energy$",
    "loss term": "task/loss_term_norm$",
    "path term": "task/path_term_norm$",
    "cosine between loss term and path term": "task/term_cosine$",
    "norm of the pull": "task/pull_norm$",
}


def custom_scalars(metric: Metric) -> Summary:
    """Return the layout: categories of charts, each with some tags.

    Charts of kind "Multiline" select tags by regular expressions; those of kind "Margin" name them.
    """

    def lines(*patterns: str) -> list[Any]:
        return ["Multiline", list(patterns)]

    layout = {
        "meta-learning": {
            **_OVER_GAMES[metric],
            "loss": lines("meta/loss$"),
            "mean norm of a pull": lines("meta/gradient_norm$"),
            "norm of the update": lines("meta/update_norm$"),
            "agreement within a meta-update": lines("meta/agreement$"),
            "staleness": lines("meta/staleness$"),
            "staleness weight": lines("meta/staleness_weight$"),
            "factor of the norm clip": lines("meta/clip$"),
        },
        "path geometry": {
            "mean length": lines("meta/path_length$"),
            "mean energy": lines("meta/path_energy$"),
            "mean norm of the loss term": lines("meta/loss_term_norm$"),
            "mean norm of the path term": lines("meta/path_term_norm$"),
            "mean cosine between loss term and path term": lines("meta/term_cosine$"),
            **{f"per game: {title}": lines(pattern) for title, pattern in _EVERY_PATH.items()},
        },
        **_OF_STARTS[metric],
        "per game": {title: lines(pattern) for title, pattern in _EVERY_GAME[metric].items()},
        "operations": {
            f"{metric.step_unit} per second": lines("ops/steps_per_second$"),
            "pushes per second": lines("ops/pushes_per_second$"),
            "milliseconds of a push": lines("ops/push_ms_p(50|99)$"),
            "share of time in which the server is busy": lines("ops/busy_share$"),
            "seconds that workers wait between reports": lines("ops/pace_seconds$"),
            "milliseconds of a meta-update": lines("ops/update_ms_p(50|99)$"),
            "workers: alive, wanted": lines("ops/workers_(alive|wanted)$"),
            "restarts: of workers, of the server": lines("ops/(server_)?restarts$"),
            "leases lost, duplicates": lines("ops/(leases_lost|duplicates)$"),
            "contributions waiting": lines("ops/contributions_waiting$"),
            "refused, by reason": lines("ops/refused/"),
            "seconds since the last checkpoint": lines("ops/checkpoint_age$"),
            "where the workers' time goes": lines("ops/time_share/"),
            "seconds of the start": lines("ops/start/"),
        },
    }
    summary: Summary = summaries.custom_scalars(layout)
    return summary
