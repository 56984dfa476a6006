"""TensorBoard's first screen: which run this is, and the few curves that show whether it works.

Groups of charts are sorted by name, and one that begins with an underscore comes first. The curves are copies of
others, next to marks for random play and for a person.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorboard.compat.proto.summary_pb2 import Summary

from leap_dist.config.plurals import counted
from leap_dist.config.settings import Config
from leap_dist.envs.games import reference_scores
from leap_dist.telemetry.projection import SERVER, Event

GROUP = "_overview"
"""Prefix of the tags of all charts of the first screen."""
ABOUT = f"{GROUP}/about"
"""Tag of the picture of the run's description. It is a picture because the first screen shows no text."""
OF_SERVER = {
    "meta_frames/score_human_normalized": "human_normalized_score",
    "meta_frames/error": "error",
    "meta/path_length": "path_length",
    "ops/steps_per_second": "steps_per_second",
}
"""Charts of run `server`, by the tag that they copy."""
RETURN = "task/return"
MARKS = {"random": "mark/random", "human": "mark/human"}
"""TensorBoard runs that hold reference scores, by the kind of score."""


def overview(event: Event) -> Iterator[Event]:
    """Yield the part of an event that the first screen shows."""
    if event.run == SERVER:
        copies = [
            Summary.Value(tag=f"{GROUP}/{OF_SERVER[value.tag]}", simple_value=value.simple_value)
            for value in event.values
            if value.tag in OF_SERVER
        ]
        if copies:
            yield Event(SERVER, event.step, copies)
    for value in event.values:
        if value.tag == RETURN:
            game = event.run.removeprefix("game/")
            tag = f"{GROUP}/return_{game}"
            yield Event(event.run, event.step, [Summary.Value(tag=tag, simple_value=value.simple_value)])
            for kind, score in reference_scores().get(game, {}).items():
                yield Event(MARKS[kind], event.step, [Summary.Value(tag=tag, simple_value=score)])


def about(config: Config, command: Sequence[str]) -> str:
    """Return a description of the run and its curves, as Markdown. `command` must hold no secrets."""
    names = ", ".join(config.games)
    steps = "examples" if config.is_supervised else "agent steps"
    score = (
        "`error` is the mean training error over a task; it should fall, as tasks take fewer examples to learn."
        if config.is_supervised
        else "`human_normalized_score` is the score at the end of a task, where 0 is random play and 1 is a person; it "
        "should rise slowly. `return_GAME` has the shape of a saw, because each task of a game starts again from the "
        "initialization; the teeth should get taller. The marks show random play and a human player."
    )
    return (
        f"**{config.meta_learner} on {counted(len(config.games), 'task')}** ({names})\n\n"
        f"- preset {config.preset}, mode {config.mode}, {config.meta_updates:,} meta-updates of "
        f"{counted(config.batch_tasks, 'task')} of {config.steps_of_task:,} {steps}\n"
        f"- started with `{' '.join(command)}`\n\n"
        f"How to read the charts under `{GROUP}`: {score} `path_length` is what Leap minimizes, over meta-updates; it "
        f"should fall. `steps_per_second` is the speed, over seconds.\n"
    )
