"""The configuration: frozen dataclasses, presets, validation, YAML in and out.

Every setting is declared once, with its default, its help text and its range. YAML files and command-line flags go
through the same `resolve`, so that a mistake gets the same one-line answer wherever it was made.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from envs import games as atari
from leap_dist.presets import PRESETS


class ConfigError(ValueError):
    """A setting is wrong. The message is one line: the field, the value, and the nearest valid choice."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def setting(
    default: Any, help: str, *, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> Any:
    """A dataclass field with help text and a range: low ≤ value ≤ high, value > above."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "above": above})


@dataclass(frozen=True)
class LeapSettings:
    """The meta-gradient (equations 4 and 8)."""

    metric: Literal["energy", "length"] = setting("energy", "functional of the gradient path to shorten")
    loss_weight: float = setting(1.0, "λ, scale of the loss coordinate; 0 measures the path in parameters only", low=0)
    stabilize: bool = setting(True, "use |Δf| (the regularizer μ of section 2.3) instead of −Δf")
    final_loss: bool = setting(False, "evaluate f(θ_K) on one more rollout, so that the last segment counts too")


@dataclass(frozen=True)
class MetaSettings:
    """The meta-update: how the server turns contributions into a new initialization."""

    batch_size: int = setting(16, "|B|, contributions to a meta-update", low=1, high=100_000)
    optimizer: Literal["adam", "sgd"] = setting("adam", "meta-optimizer (torch.optim)")
    learning_rate: float = setting(1e-3, "β, the meta learning rate", above=0)
    momentum: float = setting(0.0, "momentum of sgd", low=0, high=1)
    staleness: Literal["constant", "polynomial", "hinge", "inverse"] = setting(
        "polynomial", "weight s(τ) of a contribution that is τ versions old (buffered and async)"
    )
    max_staleness: int = setting(0, "refuse contributions staler than this; 0 means 4 × workers", low=0)
    contribution_clip: float = setting(
        3.0, "clip a contribution's norm at this multiple of the running median; 0 turns it off", low=0
    )
    clip_window: int = setting(64, "accepted contributions that the running median looks back on", low=1, high=100_000)


@dataclass(frozen=True)
class AgentSettings:
    """The A2C agent (appendix E, and the Atari part of the defaults)."""

    envs: int = setting(32, "parallel environments", low=1, high=4096)
    unroll: int = setting(5, "steps per environment between two updates", low=1, high=10_000)
    learning_rate: float = setting(1e-4, "α of RMSProp", above=0)
    epsilon: float = setting(1e-4, "ε of RMSProp", above=0)
    epsilon_form: Literal["inside", "outside"] = setting("inside", "√(v+ε), v₀ = 1 (the paper's) or √v+ε, v₀ = 0")
    decay: float = setting(0.99, "decay of RMSProp's mean square", low=0, high=1)
    max_grad_norm: float = setting(0.5, "global gradient clip", above=0)
    discount: float = setting(0.99, "γ", low=0, high=1)
    entropy_cost: float = setting(0.01, "weight of the entropy bonus", low=0)
    value_cost: float = setting(0.5, "weight of the value loss", low=0)
    reward_clip: Literal["bound", "sign", "none"] = setting("bound", "training reward: |r| ≤ 5, sign(r) or raw")


@dataclass(frozen=True)
class AtariSettings:
    """The emulator and what the agent sees of it."""

    frames: Literal["gray4", "rgb1", "rgb4"] = setting(
        "rgb1", "observation: 4 gray frames, 1 RGB frame or 4 RGB frames"
    )
    frame_skip: int = setting(4, "ALE frames per agent step, the last two max-pooled", low=1, high=60)
    noop_max: int = setting(30, "up to this many no-ops at the start of an episode", low=0, high=1000)
    fire_on_reset: bool = setting(True, "press fire at the start of an episode where the game has that button")
    sticky_actions: float = setting(0.0, "probability that the emulator repeats the previous action", low=0, high=1)
    life_loss: bool = setting(True, "a lost life ends the return in training, though not the episode")
    max_episode_frames: int = setting(
        108_000, "truncate episodes after this many ALE frames (30 minutes)", low=100, high=2**31 - 1
    )
    full_actions: bool = setting(False, "all 18 actions instead of the game's minimal set")


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker runs: device, arithmetic, reporting."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where agents train; auto: cuda where there is one")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "arithmetic of the network; auto: bfloat16 autocast where the processor has it"
    )
    threads: int = setting(1, "torch threads per worker", low=1, high=256)
    emulator_threads: int = setting(1, "emulator threads per worker", low=1, high=256)
    cpus: float = setting(1.0, "CPUs that Ray reserves per worker", above=0)
    gpus: float = setting(0.0, "GPUs that Ray reserves per worker; fractions share a GPU", low=0)
    push_interval: int = setting(50_000, "agent steps between two partial contributions", low=1)
    heartbeat_seconds: float = setting(2.0, "seconds between two renewals of the lease", above=0)


@dataclass(frozen=True)
class ServerSettings:
    """Leases and durability."""

    lease_seconds: float = setting(60.0, "a lease not renewed for this long is taken back", above=0)
    on_lost: Literal["retry", "keep"] = setting(
        "retry", "a lost lease's task is trained again, or its last partial contribution counts"
    )
    keep_checkpoints: int = setting(3, "newest checkpoints kept", low=1, high=1000)


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    preset: str = setting("paper", "the preset that the other values started from")
    games: tuple[str, ...] = setting(("seed24",), "games to train on: names, or the sets seed24, camera25")
    workers: int = setting(2, "workers to run; fewer where the cluster has no room", low=1, high=100_000)
    meta_updates: int = setting(100, "meta-updates after which training is done", low=1)
    task_steps: int = setting(1_000_000, "agent steps per task", low=1)
    mode: Literal["sync", "buffered", "async"] = setting("buffered", "when the server makes a meta-update")
    meta_learner: Literal["leap"] = setting("leap", "what a worker returns")
    seed: int = setting(0, "seed of the initialization, of task sampling and of every task", low=0, high=2**31 - 1)
    address: str = setting("local", "Ray cluster: local starts one here, auto joins the running one, or HOST:PORT")
    leap: LeapSettings = LeapSettings()
    meta: MetaSettings = MetaSettings()
    agent: AgentSettings = AgentSettings()
    atari: AtariSettings = AtariSettings()
    worker: WorkerSettings = WorkerSettings()
    server: ServerSettings = ServerSettings()

    @property
    def max_staleness(self) -> int:
        """τ beyond which contributions are refused."""
        return self.meta.max_staleness or 4 * self.workers

    @property
    def updates_per_task(self) -> int:
        """K: inner updates per task; at least one."""
        return max(1, self.task_steps // (self.agent.envs * self.agent.unroll))


# What may change when a run is resumed: how long, where and how it runs. All other settings define what is learned.
_FREE_ON_RESUME = {"preset", "workers", "meta_updates", "address"}
_FREE_SECTIONS_ON_RESUME = {"worker", "server"}


def fields(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yields (dotted name, field, type) of every setting, sections flattened."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from fields(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name, field, kind


def section_help(section: str) -> str:
    """First line of a section's docstring; empty for the top level."""
    for field in dataclasses.fields(Config):
        if field.name == section:
            return (type(field.default).__doc__ or "").splitlines()[0]
    return ""


_FIELDS = {name: (field, kind) for name, field, kind in fields()}


def resolve(preset: str, *overrides: Mapping[str, Any]) -> Config:
    """The preset with overrides (dotted name → value, text or typed) laid over it in order, checked as a whole.

    Raises ConfigError on an unknown preset, an unknown field, a wrong type, a value out of range, or an unknown game.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset: no preset {_shown(preset)}{_nearest(preset, PRESETS)}")
    values: dict[str, Any] = dict(PRESETS[preset])
    for override in overrides:
        values.update({name.replace("-", "_"): value for name, value in override.items()})
    if values.setdefault("preset", preset) != preset:
        raise ConfigError(f"preset: {_shown(values['preset'])} is not {preset!r}, which the settings start from")
    tree: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in _FIELDS:
            raise ConfigError(f"{name[:80]}: no such setting{_nearest(name, _FIELDS)}")
        section, _, leaf = name.rpartition(".")
        tree.setdefault(section, {})[leaf] = _typed(name, value)
    top = tree.pop("", {})
    for section, settings in tree.items():
        top[section] = dataclasses.replace(getattr(Config, section), **settings)
    config = Config(**top)
    _check(config)
    return config


def _check(config: Config) -> None:
    """What no single field shows. Raises ConfigError."""
    try:
        games = atari.expand(config.games)
    except ValueError as error:
        raise ConfigError(f"games: {error}") from None
    object.__setattr__(config, "games", games)
    if config.worker.device == "cpu" and config.worker.gpus > 0:
        raise ConfigError(
            f"worker.gpus: {config.worker.gpus} asked for with worker.device cpu; use device cuda or gpus 0"
        )
    steps = config.agent.envs * config.agent.unroll
    if config.task_steps < 2 * steps:
        raise ConfigError(
            f"task_steps: {config.task_steps} is less than two updates of agent.envs × agent.unroll = {steps} steps; "
            f"a path needs two points, so use at least {2 * steps}"
        )
    if config.server.lease_seconds < 3 * config.worker.heartbeat_seconds:
        raise ConfigError(
            f"server.lease_seconds: {config.server.lease_seconds:g} is under three heartbeats of "
            f"{config.worker.heartbeat_seconds:g} s; use at least {3 * config.worker.heartbeat_seconds:g}"
        )


def _typed(name: str, value: Any) -> Any:
    """`value` as the field's type, checked against its range. Raises ConfigError."""
    field, kind = _FIELDS[name]
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            near = _nearest(value, choices) if isinstance(value, str) else ""
            raise ConfigError(f"{name}: {_shown(value)} is none of {', '.join(choices)}{near}")
        return value
    if get_origin(kind) is tuple:
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not items or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{name}: {_shown(value)} is not a list of names")
        return tuple(items)
    if kind is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        parsed = words.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(parsed, bool):
            raise ConfigError(f"{name}: {_shown(value)} is neither true nor false")
        return parsed
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{name}: {_shown(value)} is not text")
        return value
    return _number(name, value, kind, field.metadata)


def _number(name: str, value: Any, kind: type, limits: Mapping[str, Any]) -> int | float:
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{name}: {_shown(value)} is not {wanted}")
    try:
        number = _parse_number(value) if isinstance(value, str) else value
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise ValueError
    except (ValueError, OverflowError):
        raise ConfigError(f"{name}: {_shown(value)} is not {wanted}") from None
    if number < limits["low"]:
        raise ConfigError(f"{name}: {_shown(number)} is too small; the smallest valid value is {limits['low']}")
    if number <= limits["above"]:
        raise ConfigError(f"{name}: {_shown(number)} is too small; it must be greater than {limits['above']}")
    if number > limits["high"]:
        raise ConfigError(f"{name}: {_shown(number)} is too large; the largest valid value is {limits['high']}")
    return int(number) if kind is int else float(number)


def _shown(value: Any) -> str:
    """A value as it is put into a message: on one line, and not longer than one."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    try:
        text = str(value) if isinstance(value, int | float) else reprlib.repr(value)
    except ValueError:  # a number like that inside a list
        text = f"a {type(value).__name__} with a number too long to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse_number(text: str) -> int | float:
    """A whole number exactly, whatever its size; otherwise a float. Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def _nearest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    if not close:  # a bare field name finds its section
        close = [choice for choice in choices if choice.endswith("." + word)][:1]
    return f"; did you mean {close[0]}?" if close else ""


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain data, as it is written to config.yaml."""
    data = dataclasses.asdict(config)
    data["games"] = list(config.games)
    return data


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, which `read_yaml` and `resolve` turn back into an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Dotted names and values of a YAML file, ready for `resolve`. Raises ConfigError where it is not such a file."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # besides its own errors, PyYAML lets through whatever a malformed scalar runs into
        reason = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
        raise ConfigError(f"config: cannot read {path}: {str(reason)[:200]}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"config: {path} holds {type(data).__name__}, not settings by name")
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{leaf}": inner for leaf, inner in value.items()})
        else:
            flat[str(name)] = value
    return flat


def incompatibilities(old: Config, new: Config) -> list[str]:
    """What stands against resuming a run of `old` as `new`: one "field: old -> new" each, empty where nothing does."""
    before, after = _flat(old), _flat(new)
    fixed = (n for n in before if n not in _FREE_ON_RESUME and n.split(".")[0] not in _FREE_SECTIONS_ON_RESUME)
    return [f"{name}: {before[name]} -> {after[name]}" for name in fixed if before[name] != after[name]]


def _flat(config: Config) -> dict[str, Any]:
    return {name: _lookup(config, name) for name in _FIELDS}


def _lookup(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
