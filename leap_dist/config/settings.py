"""Declarations of all settings: default, help text and range. validation.py checks how they go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leap_dist.config.declaration import setting
from leap_dist.config.image_settings import EarlyStoppingSettings, SupervisedSettings

CURVE_POINTS = 20
"""Maximum number of points in the curve of a supervised task."""
ALL_GAMES = "all_games"
"""Name of the tasks of an agent that learns all games at once."""
ENVIRONMENTS = ("atari", "gymnasium")
"""Kinds of tasks that are environments; all others are image classification."""
EXPECTED_WORKERS = 16
"""Assumed number of workers, on which limits are based while the real number is unknown."""


@dataclass(frozen=True)
class LeapSettings:
    """The meta-gradient (equations 4 and 8)."""

    metric: Literal["energy", "length"] = setting("energy", "measure of the gradient path that Leap shortens")
    loss_weight: float = setting(
        1.0, "λ, weight of the loss in the path metric; 0 measures the path in parameter space only", low=0
    )
    stabilize: bool = setting(True, "use |Δf| instead of −Δf: the regularizer μ of section 2.3")
    loss_smoothing: float = setting(
        0.0, "decay of the moving average that smooths f along the path; 0 uses f itself", low=0, high=0.9999
    )
    loss_warmup: float = setting(
        0.0, "fraction of a task, from its start, in which changes in the loss are ignored", low=0, high=1
    )
    final_loss: bool = setting(
        False, "use a task's last rollout to evaluate f(θ_K), so that the last segment counts too"
    )


@dataclass(frozen=True)
class FomamlSettings:
    """First-order MAML (Finn et al., arXiv 1703.03400, section 5.2)."""

    rollouts: int = setting(
        20, "number of rollouts at the end of a task, at θ_K, over which the gradient is averaged", low=1
    )


@dataclass(frozen=True)
class MetaSettings:
    """Settings of meta-updates, which turn contributions into a new initialization."""

    shared: Literal["encoder", "convolutions", "model"] = setting(
        "encoder",
        "what is meta-learned: the encoder, only its convolutions, or the whole model with its head (omniglot only)",
    )
    batch_size: int = setting(16, "|B|, number of contributions in a meta-update", low=1, high=100_000)
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = setting("adam", "meta-optimizer (from torch.optim)")
    learning_rate: float = setting(
        1e-3, "β, learning rate of the meta-optimizer (α of fedasync, ε of delayed-nesterov)", above=0
    )
    momentum: float = setting(0.0, "momentum of sgd, rmsprop and delayed-nesterov", low=0, high=1)
    nesterov: bool = setting(False, "use Nesterov momentum (sgd and delayed-nesterov)")
    weight_decay: float = setting(0.0, "decoupled weight decay of adamw", low=0)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "meta learning rate over the tasks of the run: constant, or falling to 0 (linear, cosine)"
    )
    max_norm: float = setting(0.0, "clip the norm of the meta-gradient at this value; 0: do not clip", low=0)
    staleness: Literal["constant", "polynomial", "hinge", "inverse"] = setting(
        "polynomial", "weight s(τ) of a contribution that is τ versions old; sync does not use it"
    )
    max_staleness: int = setting(
        0,
        "refuse contributions older than this many versions; 0: 4 × workers × worker.stack (in stream, also × pushes "
        "per task)",
        low=0,
    )
    contribution_clip: float = setting(
        3.0, "clip the norm of a contribution at this multiple of the running median; 0: do not clip", low=0
    )
    refuse_norm: float = setting(
        1e9, "refuse a contribution whose norm exceeds this multiple of the running median or of |φ|; 0: never", low=0
    )
    normalize: bool = setting(
        False, "scale every contribution to the running median norm, instead of clipping large ones"
    )
    clip_window: int = setting(64, "number of accepted contributions in the running median", low=1, high=100_000)
    endpoint_correction: float = setting(0.0, "ρ, add ρ(φ_now − φ_lease) to each contribution", low=0, high=1)
    shift: Literal["no", "increments", "trajectory"] = setting(
        "no",
        "shift running tasks when φ moves (stream only). increments: each push adds only its new part to φ, and shifts "
        "are limited; trajectory: each push adds its whole path, and nothing is limited, as in arXiv 2102.07215",
        switch=("no", "increments"),
    )
    max_shift: float = setting(
        0.01, "largest norm of a shift, relative to the norm of the encoder (meta.shift increments)", above=0
    )


@dataclass(frozen=True)
class AgentSettings:
    """The A2C agent (appendix E)."""

    envs: int = setting(32, "number of parallel environments", low=1, high=4096)
    unroll: int = setting(5, "steps in each environment between two updates", low=1, high=10_000)
    learning_rate: float = setting(1e-4, "learning rate α of RMSProp", above=0)
    epsilon: float = setting(1e-4, "ε of RMSProp's denominator", above=0)
    epsilon_form: Literal["inside", "outside"] = setting(
        "outside",
        "denominator of RMSProp: √v+ε with v₀ = 0 (outside, as in PyTorch) or √(v+ε) with v₀ = 1 (inside, as in "
        "TensorFlow)",
    )
    decay: float = setting(0.99, "decay of RMSProp's running mean square", low=0, high=1)
    max_grad_norm: float = setting(0.5, "clip the global norm of the gradient at this value", above=0)
    discount: float = setting(0.99, "discount factor γ", low=0, high=1)
    entropy_cost: float = setting(0.01, "weight of the entropy bonus", low=0)
    value_cost: float = setting(0.5, "weight of the value loss", low=0)
    reward_clip: Literal["bound", "sign", "none"] = setting(
        "bound", "reward for training: clipped to [−5, 5] (bound), its sign, or unchanged (none)"
    )


@dataclass(frozen=True)
class AtariSettings:
    """The Atari emulator and the agent's observations."""

    frames: Literal["gray4", "rgb1", "rgb4"] = setting(
        "rgb1", "observation: four gray frames, one RGB frame or four RGB frames"
    )
    frame_skip: int = setting(4, "emulator frames per agent step; the last two are max-pooled", low=1, high=60)
    noop_max: int = setting(30, "largest number of random no-ops at the start of an episode", low=0, high=1000)
    fire_on_reset: bool = setting(True, "press FIRE at the start of an episode, in games that have it")
    sticky_actions: float = setting(0.0, "probability that the emulator repeats the previous action", low=0, high=1)
    life_loss: bool = setting(True, "in training, end the return when a life is lost, without resetting the game")
    max_episode_frames: int = setting(
        108_000,
        "truncate episodes after this many emulator frames; the default is 30 minutes of play",
        low=100,
        high=2**31 - 1,
    )
    full_actions: bool = setting(False, "use all 18 actions instead of the minimal set of the game")


@dataclass(frozen=True)
class GymnasiumSettings:
    """Gymnasium environments with images and discrete actions (docs/own-tasks.md)."""

    modules: tuple[str, ...] = setting(
        (), "modules that register the environments when they are imported, such as my_package.envs"
    )
    frames: Literal["gray4", "rgb1", "rgb4"] = setting(
        "gray4", "observation: four gray frames, one RGB frame or four RGB frames, resized to 84 × 84"
    )
    max_episode_steps: int = setting(
        0, "truncate episodes after this many steps; 0: the limit that an environment was registered with", low=0
    )


@dataclass(frozen=True)
class WorkerSettings:
    """Workers: device, arithmetic and reporting."""

    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "device on which agents train; auto: cuda if the node has a GPU, else cpu"
    )
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "arithmetic of the network; auto: bfloat16 if the device supports it in hardware"
    )
    threads: int = setting(1, "number of PyTorch threads per worker", low=1, high=256)
    stack: int = setting(
        1, "number of image tasks that a worker trains in lockstep; a GPU computes them together", low=1, high=1000
    )
    cpus: float = setting(1.0, "number of CPUs that Ray reserves per worker", above=0)
    gpus: float = setting(
        0.0, "number of GPUs that Ray reserves per worker; with a fraction, workers share a GPU", low=0
    )
    mps: Literal["auto", "no"] = setting(
        "auto",
        "NVIDIA's MPS daemon, which lets workers that share a GPU compute at the same time; auto: start it on nodes "
        "where it is installed and not yet running",
    )
    labels: tuple[str, ...] = setting(
        (), "labels that a node must have to run workers, such as pool=spot or pool!=stable"
    )
    wire: Literal["float32", "int16", "int8"] = setting(
        "float32", "number format in which contributions are sent and stored; int16 and int8 round them"
    )
    push_interval: int = setting(50_000, "agent steps between two partial contributions of a task", low=1)
    heartbeat_seconds: float = setting(2.0, "seconds between two renewals of a lease", above=0)
    state_seconds: float = setting(
        300.0,
        "seconds between saves of the state of an agent in an evaluation, from which it continues after a stop",
        above=0,
    )


@dataclass(frozen=True)
class ServerSettings:
    """The server: leases, load and durability."""

    lease_seconds: float = setting(60.0, "seconds without renewal after which a lease expires", above=0)
    on_lost: Literal["retry", "keep"] = setting(
        "retry",
        "if a lease is lost: train its task again (retry), or count the task's last partial contribution (keep)",
    )
    pushes_per_second: float = setting(
        100.0, "limit on partial contributions per second; beyond it, workers are told to wait", above=0
    )
    storage: Literal["shared", "node"] = setting(
        "shared", "where the run directory is: on storage shared by all nodes, or on the driver's node only"
    )
    gather_seconds: float = setting(
        0.0,
        "seconds for which a node collects the reports of its workers before it sends them to the server together; 0: "
        "each worker sends its own",
        low=0,
    )
    busy_share: float = setting(
        0.5,
        "largest fraction of time that the server may be busy; beyond it, workers are told to report less often",
        above=0,
        high=1,
    )
    keep_checkpoints: int = setting(3, "number of checkpoints to keep", low=1, high=1000)


@dataclass(frozen=True)
class TelemetrySettings:
    """Videos and heat maps in TensorBoard, and other trackers (docs/monitoring.md)."""

    gif_interval: int = setting(5, "record a video of play at every N-th task of a game; 0: none", low=0)
    agreement_interval: int = setting(
        5, "minimum number of meta-updates between two heat maps of gradient agreement; 0: none", low=0
    )
    tracker: Literal["none", "wandb", "mlflow", "trackio"] = setting(
        "none", "experiment tracker that receives all curves in addition to TensorBoard"
    )
    project: str = setting("leap-dist", "project (or experiment) of the tracker")


@dataclass(frozen=True)
class Config:
    """All settings of a run, resolved and immutable."""

    preset: str = setting("paper", "preset that the other values were based on")
    tasks: Literal["atari", "omniglot", "multi-cv", "gymnasium", "images"] = setting(
        "atari",
        "kind of tasks: Atari games, alphabets of Omniglot, image data sets of Multi-CV, your own environments "
        "(gymnasium) or your own image data sets (images)",
    )
    games: tuple[str, ...] = setting(
        ("seed24",),
        "names of the tasks. atari: games, or the sets seed24, camera25 and moving4; omniglot: alphabets, or the sets "
        "pretraining, validation, held_out and all; multi-cv: data sets, or all; gymnasium: IDs of environments; "
        "images: names of files NAME.npz in data_dir",
    )
    data_dir: str = setting("data", "directory of the image data sets (docs/data.md, docs/own-tasks.md)")
    workers: int | Literal["auto"] = setting(
        "auto",
        "number of workers; auto: as many as the nodes' processors and GPUs allow, adjusted as nodes join and leave. "
        "Fewer run while not all of them fit",
        low=1,
        high=100_000,
    )
    min_workers: int = setting(1, "number of workers that must fit before training starts", low=1, high=100_000)
    meta_updates: int = setting(
        100,
        "length of the run, in meta-updates of |B| tasks; modes without batches train the same number of tasks",
        low=1,
    )
    task_steps: int = setting(1_000_000, "length of a task in agent steps, or in examples for supervised tasks", low=1)
    mode: Literal["sync", "buffered", "async", "fedasync", "delayed-nesterov", "stream"] = setting(
        "buffered", "rule for when and how the server makes a meta-update (docs/algorithm.md)"
    )
    meta_learner: Literal["leap", "reptile", "fomaml", "finetune-multi", "finetune-single", "multitask", "none"] = (
        setting("leap", "algorithm that turns the training of a task into a contribution")
    )
    init: str = setting(
        "", "initialization to start from: a file, a run directory, a URL or pretrained:NAME; empty: a random one"
    )
    sampling: Literal["shuffled", "replacement"] = setting(
        "shuffled", "order of tasks: each game once before any is repeated (shuffled), or drawn with replacement"
    )
    seed: int = setting(0, "seed of the initialization, the sampling of tasks, and every task", low=0, high=2**31 - 1)
    address: str = setting(
        "local", "Ray cluster: local starts one on this machine, auto joins the running one, HOST:PORT joins that one"
    )
    insecure: bool = setting(False, "join a cluster that does not use token authentication (docs/security.md)")
    wait_for_nodes: bool = setting(
        False,
        "wait for nodes to join a cluster if too few workers fit; always on with a detected autoscaler, and without "
        "effect on a cluster of this machine alone",
    )
    leap: LeapSettings = LeapSettings()
    fomaml: FomamlSettings = FomamlSettings()
    meta: MetaSettings = MetaSettings()
    agent: AgentSettings = AgentSettings()
    atari: AtariSettings = AtariSettings()
    gymnasium: GymnasiumSettings = GymnasiumSettings()
    supervised: SupervisedSettings = SupervisedSettings()
    early_stopping: EarlyStoppingSettings = EarlyStoppingSettings()
    worker: WorkerSettings = WorkerSettings()
    server: ServerSettings = ServerSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def expected_workers(self) -> int:
        """Number of workers that limits are based on before the real number is known."""
        return EXPECTED_WORKERS if self.workers == "auto" else self.workers

    def max_staleness(self, workers: int) -> int:
        """Return the largest staleness τ at which contributions are accepted while this many workers run."""
        pushes = self.task_steps // self.worker.push_interval + 1 if self.mode == "stream" else 1
        return self.meta.max_staleness or 4 * workers * self.worker.stack * pushes

    @property
    def is_joint(self) -> bool:
        """Whether one learner learns all games at once. A task then covers all games and is as long as a batch."""
        return self.meta_learner == "multitask"

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names that tasks may have: games, alphabets or data sets, or the one name for all games together."""
        return (ALL_GAMES,) if self.is_joint else self.games

    @property
    def batch_tasks(self) -> int:
        """Number of tasks in a meta-update of a mode with batches: |B|, or 1 if a task is as long as a whole batch."""
        return 1 if self.is_joint else self.meta.batch_size

    @property
    def steps_of_task(self) -> int:
        """Agent steps (or examples) in a task that is leased to a worker."""
        return self.task_steps * (self.meta.batch_size if self.is_joint else 1)

    @property
    def total_tasks(self) -> int:
        """Number of tasks in the whole run, the same in every mode."""
        return self.meta_updates * self.batch_tasks

    @property
    def rollouts_per_task(self) -> int:
        """Number K of rollouts (or batches) in a task, including those held back at its end; at least one."""
        return max(1, self.steps_of_task // self.steps_per_update)

    @property
    def steps_per_update(self) -> int:
        """Agent steps in a rollout (of all games, if one agent learns them), or examples in a batch."""
        if self.is_supervised:
            return self.supervised.batch
        return self.agent.envs * self.agent.unroll * (len(self.games) if self.is_joint else 1)

    @property
    def is_supervised(self) -> bool:
        """Whether the tasks are image classification rather than games or other environments."""
        return self.tasks not in ENVIRONMENTS

    @property
    def curve_interval(self) -> int:
        """Steps between two points of a task's curve. The curve of a supervised task has up to 20 points."""
        if not self.is_supervised:
            return self.steps_of_task
        return -(-self.rollouts_per_task // CURVE_POINTS) * self.steps_per_update

    @property
    def held_back(self) -> int:
        """Number of rollouts at the end of a task that only the meta-learner uses, without training on them."""
        if self.meta_learner == "fomaml":
            return self.fomaml.rollouts
        return int(self.meta_learner == "leap" and self.leap.final_loss)

    @property
    def scope(self) -> str:
        """Part of the network that all tasks share: "convolutions", "encoder", or "model" with one head for all."""
        if self.keeps_heads and self.meta.shared == "model":
            return "encoder"
        return "model" if self.meta_learner == "finetune-single" else self.meta.shared

    @property
    def corrects_endpoint(self) -> bool:
        """Whether the server needs the start of a contribution's path."""
        return self.mode == "fedasync" or self.meta.endpoint_correction > 0

    @property
    def wire_bits(self) -> int:
        """Bits per number in the contributions that a worker sends."""
        return {"float32": 32, "int16": 16, "int8": 8}[self.worker.wire]

    @property
    def prefixes_count(self) -> bool:
        """Whether partial contributions may enter φ, so that workers must send their vectors."""
        return self.mode == "stream" or self.server.on_lost == "keep"

    @property
    def keeps_heads(self) -> bool:
        """Whether each game has its own head that is kept from task to task."""
        return self.meta_learner in ("finetune-multi", "multitask")
