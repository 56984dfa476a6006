"""Validation of combinations of settings. Each message has the field, its value, the reason, and what to use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from leap_dist.config import labels
from leap_dist.config.settings import Config

SMALLEST_SHARE = 0.0001
"""Smallest fraction of a GPU that Ray can reserve."""
LONGEST_ORDER = 100_000_000
"""Largest number of visits of images that are permuted together; they take 8 bytes each."""
GOOD = 0.6
"""Smallest similarity at which a single suggestion is worth making."""


def nearest(word: str, choices: Iterable[str], *, count: int = 1, cutoff: float = GOOD) -> list[str]:
    """Return up to `count` choices that resemble `word`, most similar first; similarities are between 0 and 1."""
    ranked = sorted(((similarity(word, choice), choice) for choice in choices), key=lambda pair: -pair[0])
    return [choice for score, choice in ranked[:count] if score >= cutoff]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean CHOICE?" for the nearest choice, or "" if none is near."""
    found = nearest(word[:200], choices)
    return f"; did you mean {found[0]}?" if found else ""


def similarity(word: str, choice: str) -> float:
    """Return how well `word` may stand for `choice`, between 0 and 1.

    Case, dashes and underscores do not matter. A dotted choice is also compared by its last part alone, where an
    abbreviation counts, so that `agent.lr` resembles `agent.learning_rate`.
    """
    word, choice = _plain(word), _plain(choice)
    section, _, leaf = word.rpartition(".")
    of_section, _, of_leaf = choice.rpartition(".")
    ratio = difflib.SequenceMatcher(None, leaf, of_leaf).ratio()
    if _abbreviates(leaf, of_leaf) or set(of_leaf.split("_")) < set(leaf.split("_")):
        ratio = max(ratio, 0.9)
    if section == of_section:
        return ratio
    # A name in the section that was typed comes before the same name in another one.
    return 0.95 * ratio if not section else max(0.85 * ratio, difflib.SequenceMatcher(None, word, choice).ratio())


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("-", "_").replace(" ", "_")


def _abbreviates(short: str, name: str) -> bool:
    """Return whether `short` is the start of a name, or made of the starts of all its words (as their initials are)."""
    if len(short) < 2:
        return False
    words = [re.escape(word) for word in name.split("_") if word]
    starts = "_?".join("(?:" + "|".join(word[:end] for end in range(len(word), 0, -1)) + ")" for word in words)
    return name.startswith(short) or re.fullmatch(starts, short) is not None


def conflicts(config: Config) -> Iterator[str]:
    """Yield one line for each combination of settings that does not work."""
    yield from _address(config.address)
    yield from _data_dir(config.data_dir)
    yield from _running(config)
    yield from _images(config)
    yield from _modules(config)
    yield from _early_stopping(config)
    yield from _meta_learner(config)
    yield from _multitask(config)
    yield from _endpoint(config)
    yield from _meta_optimizer(config)


def _address(address: str) -> Iterator[str]:
    host, _, port = address.rpartition(":")
    if "@" in address or "://" in address:  # the value is not repeated: it may contain a password
        yield "address: takes no URL, user or password; use local, auto or HOST:PORT"
    elif address not in ("local", "auto") and not (host.strip() and port.isascii() and port.isdecimal()):
        yield f"address: {address[:80]!r} is not one of local, auto and HOST:PORT"
    elif address not in ("local", "auto") and not 1 <= int(port[:6]) <= 65535:
        yield f"address: {address[:80]!r} has no valid port; ports are between 1 and 65535, and 6379 by default"


def _data_dir(data_dir: str) -> Iterator[str]:
    if "://" in data_dir:
        yield f"data_dir: {data_dir[:80]!r} is a URL; give a directory that every node has"
    elif data_dir.startswith("~"):
        yield f"data_dir: {data_dir[:80]!r} begins with the home directory of an unknown user; give the full path"
    elif not data_dir or not data_dir.isprintable():
        yield f"data_dir: {data_dir[:80]!r} is not the name of a directory"


def _running(config: Config) -> Iterator[str]:
    worker, server = config.worker, config.server
    if config.workers != "auto" and config.min_workers > config.workers:
        yield f"min_workers: {config.min_workers} is more than workers ({config.workers}); use at most {config.workers}"
    try:
        labels.parse(worker.labels)
    except ValueError as error:
        yield f"worker.labels: {error}; write, for example, pool=spot"
    yield from _gpus(worker.gpus)
    if worker.device == "cpu" and worker.gpus > 0:
        yield f"worker.gpus: {worker.gpus} does not go with worker.device cpu; use worker.device cuda or worker.gpus 0"
    if worker.stack > 1 and not config.is_supervised:
        yield f"worker.stack: {worker.stack} is for tasks with images, not {config.tasks}; use 1 with more workers"
    steps = config.steps_per_update
    rollouts = max(2, config.held_back + 1)
    if config.steps_of_task < rollouts * steps:
        needed = f"a path needs two points, so use at least {rollouts * steps}"
        if config.held_back > 1:
            needed = (
                f"{config.meta_learner} keeps the last {config.held_back} rollouts of a task for its gradient, so use "
                f"at least {rollouts * steps}, or fewer fomaml.rollouts"
            )
        of_steps = f"rollouts of agent.envs × agent.unroll = {steps} steps"
        if config.is_supervised:
            of_steps = f"batches of supervised.batch = {steps} examples"
        yield f"task_steps: {config.task_steps} is less than {rollouts} {of_steps}; {needed}"
    if server.gather_seconds > server.lease_seconds / 4:
        yield (
            f"server.gather_seconds: {server.gather_seconds:.12g} is more than a quarter of server.lease_seconds "
            f"({server.lease_seconds:.12g}), so leases could expire before a renewal arrives; use at most "
            f"{server.lease_seconds / 4:.12g}"
        )
    if server.lease_seconds < 3 * worker.heartbeat_seconds * (1 - 1e-9):
        yield (
            f"server.lease_seconds: {server.lease_seconds:.12g} is less than three heartbeats of "
            f"{worker.heartbeat_seconds:.12g} s; use at least {3 * worker.heartbeat_seconds:.12g}"
        )


_DIFFER = {
    "atari": "games have different actions",
    "multi-cv": "data sets have different classes",
    "gymnasium": "environments have different actions",
    "images": "data sets have different classes",
}
"""Why tasks of a kind cannot share a head."""


def _images(config: Config) -> Iterator[str]:
    given = config.supervised
    if given.patience and given.patience_steps:
        yield (
            f"supervised.patience_steps: {given.patience_steps} does not go with supervised.patience "
            f"({given.patience} epochs), which ends a task too; use supervised.patience 0"
        )
    if config.is_supervised and given.shuffle == "task" and config.steps_of_task > LONGEST_ORDER:
        yield (
            f"supervised.shuffle: task keeps the order of {config.steps_of_task} images in memory, and {LONGEST_ORDER} "
            "are the most; use epoch, or fewer task_steps"
        )
    if config.tasks != "omniglot":
        for name in ("rotations", "split", "held_out_images", "polarity", "labels", "resampling"):
            value, usual = getattr(given, name), getattr(Config.supervised, name)
            if config.is_supervised and value != usual:
                yield f"supervised.{name}: {value} is for tasks omniglot, not {config.tasks}; use {usual}"
    elif given.split == "image" and not given.rotations:
        yield "supervised.split: image divides the rotations of a drawing, but there are none; use drawing"
    elif given.split in ("image", "training") and given.held_out_images == "upright":
        yield f"supervised.held_out_images: upright does not go with supervised.split {given.split}; use rotated"
    elif given.held_out_images == "upright" and not given.rotations:
        yield "supervised.held_out_images: upright applies only with supervised.rotations, which is 0; use rotated"


def _modules(config: Config) -> Iterator[str]:
    for module in config.gymnasium.modules:
        if not all(part.isidentifier() for part in module.split(".")):
            yield f"gymnasium.modules: {module[:80]!r} is not the name of a module, such as my_package.envs"


def _early_stopping(config: Config) -> Iterator[str]:
    interval, steps = config.early_stopping.interval, config.early_stopping.task_steps
    if interval and config.tasks != "omniglot":
        yield (
            f"early_stopping.interval: {interval} needs the validation alphabets of tasks omniglot, not "
            f"{config.tasks}; use 0"
        )
    elif interval and config.meta.schedule != "constant":
        yield (
            f"meta.schedule: {config.meta.schedule} needs a known end, which a run with early_stopping.interval "
            f"{interval} does not have; use constant"
        )
    if 0 < steps < config.steps_per_update:
        yield (
            f"early_stopping.task_steps: {steps} is less than a batch of {config.steps_per_update} examples; use at "
            f"least {config.steps_per_update}, or 0"
        )


def _gpus(gpus: float) -> Iterator[str]:
    """Check the GPUs of a worker: Ray assigns whole GPUs, or a fraction of one in steps of 1/10,000."""
    if 0 < gpus < SMALLEST_SHARE:
        yield f"worker.gpus: {gpus:g} is less than the smallest share of a GPU; use {SMALLEST_SHARE:g}"
    if gpus > 1 and gpus != int(gpus):
        yield (
            f"worker.gpus: {gpus:g} is neither a share of one GPU nor a whole number of GPUs; use {int(gpus)} or "
            f"{int(gpus) + 1}"
        )


def _meta_learner(config: Config) -> Iterator[str]:
    learner, mode, meta = config.meta_learner, config.mode, config.meta
    if meta.shared == "model" and config.tasks != "omniglot":
        yield f"meta.shared: model has one head for all tasks, but {_DIFFER[config.tasks]}; use encoder"
    if learner == "finetune-single" and config.tasks not in ("atari", "omniglot"):
        yield f"meta_learner: finetune-single has one head, but {_DIFFER[config.tasks]}; use finetune-multi"
    if config.keeps_heads and config.supervised.labels == "drawn":
        yield f"supervised.labels: drawn changes the classes for which {learner} keeps heads; use fixed"
    if learner == "finetune-single" and meta.shared == "convolutions":
        yield (
            f"meta.shared: {meta.shared} leaves the linear layer to each task, but finetune-single shares the head "
            "after it; use encoder"
        )
    if mode == "stream" and learner == "fomaml":
        yield (
            "meta_learner: fomaml has no increments to stream, because its gradient at θ_K is not a sum along the "
            "path; use mode buffered"
        )
    if mode == "stream" and config.server.on_lost == "retry":
        yield "server.on_lost: retry is impossible in mode stream: pushes of a lost worker are in φ already; use keep"
    if meta.shift != "no" and mode != "stream":
        yield (
            f"meta.shift: {meta.shift} needs mode stream, not {mode}: only in stream does φ change with each push of a "
            "running worker; use meta.shift no"
        )
    if meta.shift == "trajectory" and config.keeps_heads:
        yield (
            f"meta.shift: trajectory adds up whole paths, but the heads of {learner} must count every step once; use "
            "meta.shift increments"
        )


def _multitask(config: Config) -> Iterator[str]:
    """Check the baseline in which one agent learns all games, and continues with each task where the last one ended."""
    if not config.is_joint:
        return
    wanted: dict[str, tuple[object, object]] = {
        "mode": (config.mode, "sync"),
        "meta.optimizer": (config.meta.optimizer, "sgd"),
        "meta.learning_rate": (config.meta.learning_rate, 1.0),
        "meta.momentum": (config.meta.momentum, 0.0),
        "meta.schedule": (config.meta.schedule, "constant"),
        "meta.max_norm": (config.meta.max_norm, 0.0),
        "meta.contribution_clip": (config.meta.contribution_clip, 0.0),
        "meta.normalize": (config.meta.normalize, False),
        "meta.endpoint_correction": (config.meta.endpoint_correction, 0.0),
        "worker.wire": (config.worker.wire, "float32"),
    }
    for name, (value, needed) in wanted.items():
        if value != needed:
            shown, use = (f"{one:g}" if isinstance(one, float) else str(one).lower() for one in (value, needed))
            yield (
                f"{name}: {shown} does not go with meta_learner multitask, whose learner continues exactly where "
                f"it stopped; use {use}"
            )


def _endpoint(config: Config) -> Iterator[str]:
    """Check fedasync and the endpoint correction, which require that G = φ_lease − θ_K (plus the loss term)."""
    learner, mode, leap, rho = config.meta_learner, config.mode, config.leap, config.meta.endpoint_correction
    if mode == "fedasync" and rho > 0:
        yield f"meta.endpoint_correction: {rho:g} does not go with mode fedasync, which includes ρ = 1; use 0"
    if mode == "fedasync" or rho > 0:
        asked = "mode: fedasync" if mode == "fedasync" else f"meta.endpoint_correction: {rho:g}"
        reason = f"{asked} needs contributions that reach from φ to the end of the path, unlike"
        if learner in ("fomaml", "none"):
            yield f"{reason} those of meta_learner {learner}; use meta_learner reptile"
        if learner == "leap" and leap.metric == "length":
            yield f"{reason} those of leap.metric length, whose segments do not telescope; use leap.metric energy"
        if mode == "stream":
            yield f"{reason} the increments of mode stream; use mode async, or meta.shift instead"
    if config.corrects_endpoint and config.worker.wire != "float32":
        asked = "mode fedasync" if mode == "fedasync" else f"meta.endpoint_correction {rho:g}"
        yield (
            f"worker.wire: {config.worker.wire} does not go with {asked}, where each contribution includes φ, whose "
            "rounding error the next one cannot correct; use float32"
        )
    if mode == "fedasync" and learner == "leap" and leap.loss_weight != 0:
        yield (
            "mode: fedasync mixes φ with the end point θ_K and has no place for the loss term of leap; use "
            "leap.loss_weight 0, meta_learner reptile, or mode async with meta.endpoint_correction 1"
        )


def _meta_optimizer(config: Config) -> Iterator[str]:
    mode, meta = config.mode, config.meta
    sgd = meta.optimizer == "sgd"
    if mode == "fedasync" and not (sgd and meta.momentum == 0 and meta.learning_rate <= 1):
        yield (
            f"meta.optimizer: {meta.optimizer} with learning rate {meta.learning_rate:g} and momentum "
            f"{meta.momentum:g} does not compute mode fedasync, φ ← (1−α)φ + αθ_K; use sgd, a meta.learning_rate (α) "
            "of at most 1, and momentum 0"
        )
    if mode == "delayed-nesterov" and not (sgd and meta.nesterov):
        yield (
            f"meta.optimizer: {meta.optimizer}{' without meta.nesterov' if sgd else ''} does not go with mode "
            "delayed-nesterov, which is SGD with Nesterov momentum; use sgd and meta.nesterov true"
        )
    if mode == "fedasync" and meta.nesterov:
        yield "meta.nesterov: true does not go with mode fedasync, φ ← (1−α)φ + αθ_K; use meta.nesterov false"
    if meta.nesterov and not sgd and mode != "delayed-nesterov":
        yield f"meta.nesterov: true does not go with {meta.optimizer}; use meta.optimizer sgd"
    if meta.nesterov and meta.momentum == 0:
        yield "meta.nesterov: true needs a momentum; use meta.momentum 0.9"
    if meta.momentum > 0 and meta.optimizer.startswith("adam"):
        yield f"meta.momentum: {meta.momentum:g} does not go with {meta.optimizer}; use meta.optimizer sgd or rmsprop"
    if meta.weight_decay > 0 and meta.optimizer != "adamw":
        yield (
            f"meta.weight_decay: {meta.weight_decay:g} does not go with {meta.optimizer}; use meta.weight_decay 0, or "
            "meta.optimizer adamw"
        )
