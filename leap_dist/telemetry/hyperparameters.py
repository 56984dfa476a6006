"""A run's settings as hyperparameters in TensorBoard, by which runs can be compared."""

from __future__ import annotations

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary as summaries

from leap_dist.config import metrics
from leap_dist.config.loading import fixed_settings
from leap_dist.config.metrics import ERROR, RETURN
from leap_dist.config.settings import Config

_OF_EVERY_RUN = ("meta/loss", "meta/path_length", "meta/agreement", "ops/steps_per_second")
METRICS = {
    RETURN: ("meta/score_human_normalized", "meta/score_iqm", *_OF_EVERY_RUN),
    ERROR: ("meta/error", *_OF_EVERY_RUN),
}
"""Tags whose last values are shown beside the settings."""


def session_start(config: Config) -> list[Summary.Value]:
    """Return the values that declare the hyperparameters and give this run's settings that cannot change."""
    settings = {
        # Booleans would be taken for numbers, and lists are not accepted; both become text.
        name: value if isinstance(value, int | float) and not isinstance(value, bool) else _text(value)
        for name, value in fixed_settings(config).items()
    }
    experiment, start, _ = summaries.hparams(settings, dict.fromkeys(METRICS[metrics.for_config(config)]))
    return [*experiment.value, *start.value]


def session_end() -> list[Summary.Value]:
    """Return the values that mark the run as successful."""
    return list(summaries.hparams({}, {})[2].value)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
