"""Every setting of a run, declared once: default, help text, range. What they mean together is in validation.py."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

CURVE_POINTS = 20
"""Of a supervised task's curve."""


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
    loss_smoothing: float = setting(
        0.0, "smooth f along the path by a moving average with this decay; 0 is f itself", low=0, high=0.9999
    )
    final_loss: bool = setting(False, "keep a task's last rollout to evaluate f(θ_K): the last segment counts too")


@dataclass(frozen=True)
class FomamlSettings:
    """First-order MAML (Finn et al., arXiv 1703.03400, section 5.2)."""

    rollouts: int = setting(20, "a task's last rollouts, at θ_K, that the gradient is averaged over", low=1)


@dataclass(frozen=True)
class MetaSettings:
    """The meta-update: how the server turns contributions into a new initialization."""

    shared: Literal["encoder", "convolutions", "model"] = setting(
        "encoder",
        "what is meta-learned: the encoder; its convolutions without the linear layer; or the head too (omniglot)",
    )
    batch_size: int = setting(16, "|B|, contributions to a meta-update", low=1, high=100_000)
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = setting("adam", "meta-optimizer (torch.optim)")
    learning_rate: float = setting(1e-3, "β, the meta learning rate (α of fedasync, ε of delayed-nesterov)", above=0)
    momentum: float = setting(0.0, "momentum of sgd, rmsprop and delayed-nesterov", low=0, high=1)
    nesterov: bool = setting(False, "Nesterov's momentum (sgd)")
    weight_decay: float = setting(0.0, "decoupled weight decay (adamw)", low=0)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "how the meta learning rate falls to 0 over the run's tasks"
    )
    max_norm: float = setting(0.0, "clip the norm of the meta-gradient; 0 turns it off", low=0)
    staleness: Literal["constant", "polynomial", "hinge", "inverse"] = setting(
        "polynomial", "weight s(τ) of a contribution that is τ versions old (in every mode but sync)"
    )
    max_staleness: int = setting(
        0, "refuse contributions staler than this; 0 means 4 × workers (times the pushes of a task in stream)", low=0
    )
    contribution_clip: float = setting(
        3.0, "clip a contribution's norm at this multiple of the running median; 0 turns it off", low=0
    )
    refuse_norm: float = setting(
        1e6, "refuse a contribution whose norm is this multiple of the running median, or of φ's; 0 turns it off", low=0
    )
    normalize: bool = setting(
        False, "bring every contribution's norm to the running median, instead of clipping the large ones"
    )
    clip_window: int = setting(64, "accepted contributions that the running median looks back on", low=1, high=100_000)
    endpoint_correction: float = setting(0.0, "ρ, adds ρ(φ_now − φ_lease) to each contribution", low=0, high=1)
    shift: bool = setting(False, "continual trajectory shifting of the running workers (stream)")
    max_shift: float = setting(0.01, "largest shift of an encoder, relative to its norm", above=0)


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
class SupervisedSettings:
    """Tasks omniglot and multi-cv: a classifier and what it learns from (appendices C and D)."""

    batch: int = setting(20, "examples per update", low=1, high=100_000)
    learning_rate: float = setting(0.1, "α of gradient descent", above=0)
    augmentation: Literal["none", "affine", "rotations", "turned"] = setting(
        "none",
        "images: as they are; each turned, shifted and scaled anew; each turned anew by one of 36 angles; or a task's "
        "all turned by the same one",
    )
    pretraining: int = setting(20, "omniglot: alphabets that games pretraining draws by seed", low=1, high=35)
    labels: Literal["fixed", "drawn"] = setting(
        "fixed",
        "omniglot: which class a character is, the same at every visit of its alphabet, or drawn anew, so that a head "
        "cannot know it by heart",
    )
    resampling: Literal["lanczos", "nearest"] = setting("lanczos", "omniglot: from 105 × 105 pixels to 28 × 28")
    epochs: int = setting(0, "passes over its images after which a task ends, before task_steps; 0: no limit", low=0)
    patience: int = setting(
        0,
        "end a task when for so many epochs its error on validation images was not the lowest; 0: do not",
        low=0,
    )
    validation: float = setting(
        0.15, "part of a task's training images that patience keeps for validation", above=0, high=0.5
    )


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker runs: device, arithmetic, reporting."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where agents train; auto: cuda where there is one")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "arithmetic of the network; auto: bfloat16 where the processor multiplies it"
    )
    threads: int = setting(1, "torch threads per worker", low=1, high=256)
    cpus: float = setting(1.0, "CPUs that Ray reserves per worker", above=0)
    gpus: float = setting(0.0, "GPUs that Ray reserves per worker; fractions share a GPU", low=0)
    labels: tuple[str, ...] = setting((), "labels that a node must have to get workers: pool=spot, or pool!=stable")
    wire: Literal["float32", "int16", "int8"] = setting(
        "float32", "how a contribution travels and is stored: in fewer bits it is rounded, by half a step at most"
    )
    push_interval: int = setting(50_000, "agent steps between two partial contributions", low=1)
    heartbeat_seconds: float = setting(2.0, "seconds between two renewals of the lease", above=0)


@dataclass(frozen=True)
class ServerSettings:
    """Leases and durability."""

    lease_seconds: float = setting(60.0, "a lease not renewed for this long is taken back", above=0)
    on_lost: Literal["retry", "keep"] = setting(
        "retry", "a lost lease's task is trained again, or its last partial contribution counts"
    )
    pushes_per_second: float = setting(
        100.0, "partial contributions that are taken; workers that push more are told to wait", above=0
    )
    storage: Literal["shared", "node"] = setting(
        "shared", "where the run directory is: on storage that every node of a cluster shares, or on the driver's alone"
    )
    gather_seconds: float = setting(
        0.0,
        "seconds for which what the workers of a node report is gathered, to go to the server together; 0: each worker "
        "talks to the server itself",
        low=0,
    )
    busy_share: float = setting(
        0.5,
        "part of the server's time that its work may take; beyond it running tasks are told to report more rarely",
        above=0,
        high=1,
    )
    keep_checkpoints: int = setting(3, "newest checkpoints kept", low=1, high=1000)


@dataclass(frozen=True)
class TelemetrySettings:
    """Pictures in TensorBoard (docs/monitoring.md)."""

    gif_interval: int = setting(5, "visits of a game from one GIF of play to the next; 0 for none", low=0)
    agreement_interval: int = setting(
        5, "meta-updates from one heat map of the agreement between games to the next, at least; 0 for none", low=0
    )


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    preset: str = setting("paper", "the preset that the other values started from")
    tasks: Literal["atari", "omniglot", "multi-cv"] = setting(
        "atari",
        "what a task is: to play an Atari game, or to tell apart an alphabet's characters, a data set's classes",
    )
    games: tuple[str, ...] = setting(
        ("seed24",),
        "what to train on, by name: games, or seed24, camera25; alphabets, or pretraining, held_out, validation; data "
        "sets, or all",
    )
    data_dir: str = setting("data", "omniglot, multi-cv: directory with a folder for each data set (docs/data.md)")
    workers: int = setting(2, "workers to run at most; fewer while the cluster has no room", low=1, high=100_000)
    min_workers: int = setting(1, "workers that must fit before training starts", low=1, high=100_000)
    meta_updates: int = setting(
        100, "length of the run: this many times |B| tasks, which sync and buffered make as many meta-updates of", low=1
    )
    task_steps: int = setting(1_000_000, "agent steps per task; of supervised tasks, examples", low=1)
    mode: Literal["sync", "buffered", "async", "fedasync", "delayed-nesterov", "stream"] = setting(
        "buffered", "when the server makes a meta-update, and by which rule"
    )
    meta_learner: Literal["leap", "reptile", "fomaml", "finetune-multi", "finetune-single", "none"] = setting(
        "leap", "what a worker returns"
    )
    sampling: Literal["shuffled", "replacement"] = setting(
        "shuffled", "how games are drawn: each once before any comes again, or with replacement"
    )
    seed: int = setting(0, "seed of the initialization, of task sampling and of every task", low=0, high=2**31 - 1)
    address: str = setting("local", "Ray cluster: local starts one here, auto joins the running one, or HOST:PORT")
    insecure: bool = setting(False, "join a cluster that runs without token authentication (docs/security.md)")
    wait_for_nodes: bool = setting(
        False, "wait for nodes to join while too few workers fit (an autoscaler that is known of is always waited for)"
    )
    leap: LeapSettings = LeapSettings()
    fomaml: FomamlSettings = FomamlSettings()
    meta: MetaSettings = MetaSettings()
    agent: AgentSettings = AgentSettings()
    atari: AtariSettings = AtariSettings()
    supervised: SupervisedSettings = SupervisedSettings()
    worker: WorkerSettings = WorkerSettings()
    server: ServerSettings = ServerSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def max_staleness(self) -> int:
        """τ beyond which contributions are refused."""
        pushes = self.task_steps // self.worker.push_interval + 1 if self.mode == "stream" else 1
        return self.meta.max_staleness or 4 * self.workers * pushes

    @property
    def total_tasks(self) -> int:
        """Tasks in the whole run, the same in every mode."""
        return self.meta_updates * self.meta.batch_size

    @property
    def rollouts_per_task(self) -> int:
        """K, with the rollouts (or batches) at the end that a meta-learner holds back; at least one."""
        return max(1, self.task_steps // self.steps_per_update)

    @property
    def steps_per_update(self) -> int:
        """Agent steps of a rollout; of supervised tasks, examples of a batch."""
        return self.supervised.batch if self.is_supervised else self.agent.envs * self.agent.unroll

    @property
    def is_supervised(self) -> bool:
        """Tasks are data sets of images."""
        return self.tasks != "atari"

    @property
    def curve_interval(self) -> int:
        """Steps between two points of a task's curve, however rarely it reports: a supervised task has 20."""
        if not self.is_supervised:
            return self.task_steps
        return -(-self.rollouts_per_task // CURVE_POINTS) * self.steps_per_update

    @property
    def held_back(self) -> int:
        """A task's last rollouts that do not train, but are measured by the meta-learner."""
        if self.meta_learner == "fomaml":
            return self.fomaml.rollouts
        return int(self.meta_learner == "leap" and self.leap.final_loss)

    @property
    def scope(self) -> str:
        """What is shared by all tasks: "convolutions", "encoder", or "model", with one head for all games."""
        if self.keeps_heads and self.meta.shared == "model":
            return "encoder"
        return "model" if self.meta_learner == "finetune-single" else self.meta.shared

    @property
    def corrects_endpoint(self) -> bool:
        """The server needs to know where a contribution's path started."""
        return self.mode == "fedasync" or self.meta.endpoint_correction > 0

    @property
    def wire_bits(self) -> int:
        """Of a number that a worker sends."""
        return {"float32": 32, "int16": 16, "int8": 8}[self.worker.wire]

    @property
    def prefixes_count(self) -> bool:
        """What a task has so far may come into φ, so that the server needs the vectors of partial contributions."""
        return self.mode == "stream" or self.server.on_lost == "keep"

    @property
    def keeps_heads(self) -> bool:
        """Each game has a head of its own that lasts from task to task."""
        return self.meta_learner == "finetune-multi"
