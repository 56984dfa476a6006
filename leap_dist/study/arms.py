"""The arms of studies unless others are given: those of the paper's experiments."""

from __future__ import annotations

DEFAULT_ARMS: dict[str, tuple[str, ...]] = {
    "atari": ("leap", "none"),
    "omniglot": ("leap", "reptile", "fomaml", "finetune-multi", "finetune-single", "none"),
    "multi-cv": ("leap", "reptile", "fomaml", "finetune-multi", "none"),
}
"""Meta-learners by kind of tasks. Multi-CV has no `finetune-single`: one head cannot have as many classes as each data
set has."""
