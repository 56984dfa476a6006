"""Our update against the one the authors published (support/published_leap.py): a path, and whole meta-trainings."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import published_leap
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from protocol import INITIAL, config, contribution, grant, serve
from published_leap import Observation
from pull_forward_oracle import pull_forward
from torch import Tensor, nn

from leap_dist.leap.pull_forward import PullForward

TOLERANCE = 1e-6  # of a difference's norm
METRICS = ("energy", "length")
OPTIMIZERS = ("sgd", "momentum", "adam")
CLIPS = ("none", "in place", "replaced")
MAX_GRAD_NORM = 0.3  # clips most gradients of these tasks


class Task:
    """Regression on noise, drawn from a seed; the encoder is meta-learned, the head is the task's own.

    With the default widths the encoder is that of tests/support/protocol.py.
    """

    def __init__(self, seed: int, widths: Sequence[int] = (3, 2)) -> None:
        self._random = torch.Generator().manual_seed(seed)
        layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.Tanh())]
        self.encoder = nn.Sequential(*layers).double()
        self.head = nn.Linear(widths[-1], 1).double()
        self._target = self._noise(widths[0], 1)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.copy_(self._noise(*parameter.shape))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.head.parameters()]

    def start_from(self, phi: np.ndarray) -> None:
        nn.utils.vector_to_parameters(torch.from_numpy(phi.astype(np.float64)), self.encoder.parameters())

    def batch(self) -> Tensor:
        return self._noise(16, len(self._target))

    def loss(self, batch: Tensor) -> Tensor:
        """Scaled such that a step changes the parameters about as much as the loss: both then count in n_i."""
        return 0.25 * (self.head(self.encoder(batch)) - torch.sin(2 * batch @ self._target)).square().mean()

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, dtype=torch.float64)


@dataclass
class Recording:
    """Of one training: what the published loop observes, and what it does not look at."""

    observations: list[Observation] = field(default_factory=list)
    clipped: list[list[np.ndarray]] = field(default_factory=list)
    """The gradients that went into the steps."""
    same_batch: list[float] = field(default_factory=list)
    """f(θ_{i+1}) on the batch of step i."""
    end: Observation | None = None
    """θ_K, the loss there on one more batch, and nothing for a gradient."""


def arrays(tensors) -> list[np.ndarray]:
    return [np.array(tensor.detach()) for tensor in tensors]


def flat(parts) -> np.ndarray:
    return np.concatenate([part.reshape(-1) for part in parts])


def learn(
    task: Task,
    updates: int,
    *,
    optimizer: str = "sgd",
    clip: str = "none",
    observe: Callable[[Tensor], None] = lambda loss: None,
) -> Recording:
    """Trains as the published loop does."""
    if optimizer == "adam":
        # With torch's ε the first step is lr in each coordinate, up or down: two tasks may cancel to rounding errors,
        # which Adam as the meta-optimizer blows up to full steps.
        inner: torch.optim.Optimizer = torch.optim.Adam(task.parameters, lr=0.03, eps=0.01)
    else:
        inner = torch.optim.SGD(task.parameters, lr=0.3, momentum=0.5 if optimizer == "momentum" else 0.0)
    watched = list(task.encoder.parameters())
    record = Recording()
    for _ in range(updates):
        batch = task.batch()
        inner.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        record.observations.append(Observation(arrays(watched), loss.item(), arrays(p.grad for p in watched)))
        observe(loss)
        if clip == "in place":
            nn.utils.clip_grad_norm_(task.parameters, MAX_GRAD_NORM)
        elif clip == "replaced":
            norm = nn.utils.get_total_norm([p.grad for p in task.parameters])
            for parameter in task.parameters:
                parameter.grad = parameter.grad * (MAX_GRAD_NORM / norm).clamp(max=1)
        record.clipped.append(arrays(p.grad for p in watched))
        inner.step()
        record.same_batch.append(task.loss(batch).item())
    nowhere = [np.full(p.shape, np.nan) for p in watched]
    record.end = Observation(arrays(watched), task.loss(task.batch()).item(), nowhere)
    return record


def apart(ours: np.ndarray, published: np.ndarray) -> float:
    """Relative to what was published; 0 where both are zero."""
    difference = np.linalg.norm(ours.astype(np.float64) - published)
    return difference and difference / np.linalg.norm(published)


def cancels(observations: list[Observation], metric: str, with_loss: bool, stabilize: bool) -> bool:
    """Whether the two terms of G, each rounded to float32 (6e-8), cancel so far that rounding alone nears 1e-6."""
    thetas, losses = [flat(o.theta) for o in observations], [o.loss for o in observations]
    gradients = [flat(o.gradient) for o in observations]
    whole = pull_forward(thetas, losses, gradients, metric=metric, loss_weight=float(with_loss), stabilize=stabilize)
    terms = np.linalg.norm(whole.loss_term) + np.linalg.norm(whole.path_term)
    return np.linalg.norm(whole.gradient) < 0.1 * terms


def watch(task: Task, *, metric: str, with_loss: bool, stabilize: bool, copy_gradients: bool = False) -> PullForward:
    return PullForward(
        task.encoder.parameters(),
        metric=metric,
        loss_weight=1.0 if with_loss else 0.0,
        stabilize=stabilize,
        copy_gradients=copy_gradients,
    )


any_flags = st.fixed_dictionaries(
    {"metric": st.sampled_from(METRICS), "with_loss": st.sampled_from([True, True, False]), "stabilize": st.booleans()}
)
seeds = st.integers(0, 2**31 - 1)
widths = st.lists(st.integers(1, 5), min_size=2, max_size=3)


# One path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@given(any_flags, seeds, widths, st.integers(1, 12), st.booleans())
@settings(max_examples=20)
def test_one_path(optimizer, clip, flags, seed, widths, updates, with_final_loss):
    task = Task(seed, widths)
    pull = watch(task, **flags, copy_gradients=clip == "in place")
    record = learn(task, updates, optimizer=optimizer, clip=clip, observe=pull.observe)
    observations = record.observations
    if with_final_loss:
        pull.close(record.end.loss)
        observations = [*observations, record.end]
    else:
        pull.close()
    assume(not cancels(observations, **flags))
    assert apart(pull.gradient().numpy(), published_leap.path(observations, **flags)) < TOLERANCE


def clipped_gradient(record: Recording, **flags: object) -> np.ndarray:
    return published_leap.path(
        [o._replace(gradient=g) for o, g in zip(record.observations, record.clipped, strict=True)], **flags
    )


def all_k_segments(record: Recording, **flags: object) -> np.ndarray:
    return published_leap.path([*record.observations, record.end], **flags)


def same_batch(record: Recording, **flags: object) -> np.ndarray:
    pairs = zip(record.observations, record.observations[1:], record.same_batch, strict=False)
    return sum(published_leap.segment(here, there._replace(loss=loss), **flags) for here, there, loss in pairs)


def gradient_at_the_end(record: Recording, **flags: object) -> np.ndarray:
    later = [o.gradient for o in record.observations[1:]]
    shifted = [o._replace(gradient=g) for o, g in zip(record.observations, later, strict=False)]
    return published_leap.path([*shifted, record.observations[-1]], **flags)


def without_the_first_segment(record: Recording, **flags: object) -> np.ndarray:
    return published_leap.path(record.observations[1:], **flags)


def other_stabilizer(record: Recording, *, stabilize: bool, **flags: object) -> np.ndarray:
    return published_leap.path(record.observations, stabilize=not stabilize, **flags)


def other_metric(record: Recording, *, metric: str, **flags: object) -> np.ndarray:
    return published_leap.path(record.observations, metric=METRICS[METRICS.index(metric) - 1], **flags)


def without_loss(record: Recording, **flags: object) -> np.ndarray:
    return published_leap.path(record.observations, with_loss=False, **flags)


def one_norm_per_parameter(record: Recording, **flags: object) -> np.ndarray:
    parts = []
    for i in range(len(record.end.theta)):
        alone = [o._replace(theta=[o.theta[i]], gradient=[o.gradient[i]]) for o in record.observations]
        parts.append(published_leap.path(alone, **flags))
    return flat(parts)


def with_the_paper_s_factor(record: Recording, *, metric: str, **flags: object) -> np.ndarray:
    return published_leap.EQUATION_8_FACTOR[metric] * published_leap.path(record.observations, metric=metric, **flags)


MISTAKES = [
    clipped_gradient,
    all_k_segments,
    same_batch,
    gradient_at_the_end,
    without_the_first_segment,
    other_stabilizer,
    other_metric,
    without_loss,
    one_norm_per_parameter,
    with_the_paper_s_factor,
]


@pytest.mark.parametrize("stabilize", [True, False])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_one_path_would_show(mistake, metric, stabilize):
    flags = {"metric": metric, "stabilize": stabilize}
    task = Task(3, (3, 4, 2))
    pull = watch(task, with_loss=True, **flags, copy_gradients=True)
    record = learn(task, 8, clip="in place", observe=pull.observe)
    ours = pull.gradient().numpy()
    assert apart(ours, published_leap.path(record.observations, **flags)) < TOLERANCE
    # What makes no difference: norms under the energy, and the factor of the length, which is 1.
    same = (mistake, metric) in [(one_norm_per_parameter, "energy"), (with_the_paper_s_factor, "length")]
    assert (apart(ours, mistake(record, **flags)) > 1000 * TOLERANCE) != same


@pytest.mark.parametrize("metric", METRICS)
def test_the_factor_of_equation_8_that_neither_has(metric):
    """Of the first segment J is exactly the identity: the published sum times p is the derivative of n^p there."""
    random = np.random.default_rng(0)
    theta, frozen, root = random.normal(size=4), random.normal(size=4), random.normal(size=(4, 4))
    p = published_leap.EQUATION_8_FACTOR[metric]

    def f(x: np.ndarray) -> float:
        return np.sum((root @ x) ** 2)

    def n_to_the_p(x: np.ndarray) -> float:
        return (np.sum((frozen - x) ** 2) + (f(frozen) - f(x)) ** 2) ** (p / 2)

    h = 1e-6
    differences = np.array([(n_to_the_p(theta + h * e) - n_to_the_p(theta - h * e)) / (2 * h) for e in np.eye(4)])
    here = Observation([theta], f(theta), [2 * root.T @ root @ theta])
    there = Observation([frozen], f(frozen), [np.full(4, np.nan)])
    assert apart(differences, p * published_leap.path([here, there], metric=metric, stabilize=False)) < TOLERANCE


@pytest.mark.parametrize("metric", METRICS)
def test_where_nothing_moved_the_published_length_is_not_a_number_and_ours_is(metric):
    theta = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    pull = PullForward([theta], metric=metric)
    observations = []
    for step in (0.5, 0.0, 0.25):  # the second segment is a point, with the same loss at both ends
        theta.grad = torch.tensor([1.0, -1.0], dtype=torch.float64)
        observations.append(Observation(arrays([theta]), 3.0, arrays([theta.grad])))
        pull.observe(3.0)
        with torch.no_grad():
            theta += step
    pull.close(3.0)
    observations.append(Observation(arrays([theta]), 3.0, arrays([theta.grad])))
    assert np.isnan(published_leap.path(observations, metric=metric)).all() == (metric == "length")
    without_the_point = [observations[i] for i in (0, 1, 3)]
    assert apart(pull.gradient().numpy(), published_leap.path(without_the_point, metric=metric)) < TOLERANCE


def test_the_published_norm_counts_a_tensor_once_for_each_name_and_ours_once():
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    tied[1].weight = tied[0].weight
    names = tied.state_dict(keep_vars=True)  # what the published code goes by
    assert (len(names), len(list(tied.parameters()))) == (2, 1)
    weight = tied[0].weight
    for metric in METRICS:
        pull = PullForward(tied.parameters(), metric=metric)
        observations = []
        for loss in (3.0, 1.0):
            weight.grad = torch.arange(4.0, dtype=torch.float64).reshape(2, 2)
            observations.append(Observation(arrays(names.values()), loss, arrays(p.grad for p in names.values())))
            pull.observe(loss)
            with torch.no_grad():
                weight -= 0.5
        # One step of 0.5 in each of 4 coordinates, Δf = −2: n² is 1 + 4 once, and 2 + 4 with the step counted twice.
        ratio = np.sqrt(6 / 5) if metric == "length" else 1.0
        published = published_leap.path(observations, metric=metric)[: weight.numel()]
        assert apart(pull.gradient().numpy(), ratio * published) < TOLERANCE


# Meta-training ---------------------------------------------------------------------------------------------------


def length_of(seed: int) -> int:
    """Tasks of a batch differ in length; with a single observation a task adds nothing, but counts."""
    return 1 + seed % 7


def served(settings_of_run, *, optimizer: str, clip: str, **flags: object) -> tuple[list[np.ndarray], list[list[int]]]:
    """φ after each meta-update of a server whose workers train for real, and the seeds of the tasks that went in."""
    phis, batches = [], []
    with tempfile.TemporaryDirectory() as folder:
        server = serve(Path(folder), settings_of_run)
        while not server.finished:
            leases = [grant(server, f"w{i}") for i in range(settings_of_run.meta.batch_size)]
            batches.append([lease.task.seed for lease in leases])
            start = server.snapshot()[1]
            for lease in reversed(leases):
                task = Task(lease.task.seed)
                task.start_from(start)
                pull = watch(task, **flags, copy_gradients=clip == "in place")
                learn(task, length_of(lease.task.seed), optimizer=optimizer, clip=clip, observe=pull.observe)
                pull.close()
                assert server.push(contribution(lease, pull.gradient().numpy())).durable
            phis.append(server.snapshot()[1])
        server.close()
    return phis, batches


def published(
    meta: published_leap.SGD | published_leap.Adam,
    batches: list[list[int]],
    *,
    optimizer: str,
    clip: str,
    mistake: str = "",
    **flags: object,
) -> list[np.ndarray]:
    """The same tasks by the published rules, in float64 from beginning to end, from its own φ all along."""
    phi, phis = INITIAL.astype(np.float64), []
    for seeds_of_batch in batches:
        recordings: list[Recording] = []
        for seed in seeds_of_batch:
            task = Task(seed)
            chained = mistake == "tasks start where the last one ended" and recordings
            task.start_from(flat(recordings[-1].end.theta) if chained else phi)
            recordings.append(learn(task, length_of(seed), optimizer=optimizer, clip=clip))
        tasks = [record.observations for record in recordings]
        if mistake == "all K segments":
            tasks = [[*record.observations, record.end] for record in recordings]
        if mistake == "short tasks do not count":
            tasks = [task for task in tasks if len(task) > 1]
        gradient = published_leap.meta_gradient(tasks, **flags)
        if mistake == "not divided by the number of tasks":
            gradient = gradient * len(tasks)
        if mistake == "the meta-optimizer is new each time":
            meta = type(meta)(meta.learning_rate)
        phi = meta.step(phi, gradient)
        phis.append(phi)
    return phis


def run_settings(optimizer: str, learning_rate: float, **more: object):
    return config(
        mode="sync",
        meta__optimizer=optimizer,
        meta__learning_rate=learning_rate,
        meta__momentum=0,
        meta__contribution_clip=0,
        **more,
    )


RULES = {"sgd": (published_leap.SGD, 0.1), "adam": (published_leap.Adam, 0.01)}


@pytest.mark.parametrize("meta", RULES)
@given(
    any_flags,
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from(OPTIMIZERS),
    st.sampled_from(CLIPS),
)
@settings(max_examples=12)
def test_meta_training(meta, flags, seed, batch_size, meta_updates, optimizer, clip):
    rule, learning_rate = RULES[meta]
    run = run_settings(meta, learning_rate, seed=seed, meta__batch_size=batch_size, meta_updates=meta_updates)
    flags = {**flags, "optimizer": optimizer, "clip": clip}
    ours, batches = served(run, **flags)
    expected = published(rule(learning_rate), batches, **flags)
    assert len(ours) == meta_updates
    for one, other in zip(ours, expected, strict=True):
        assert apart(one, other) < TOLERANCE


FLAGS_OF_MISTAKES = {"with_loss": True, "stabilize": True, "optimizer": "momentum", "clip": "in place"}


@functools.cache
def served_once(meta: str, metric: str) -> tuple[list[np.ndarray], list[list[int]]]:
    run = run_settings(meta, RULES[meta][1], seed=6, meta__batch_size=4, meta_updates=3)
    return served(run, metric=metric, **FLAGS_OF_MISTAKES)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("mistake", "meta"),
    [
        ("all K segments", "sgd"),
        ("all K segments", "adam"),
        ("short tasks do not count", "sgd"),
        ("not divided by the number of tasks", "sgd"),  # Adam would not notice
        ("tasks start where the last one ended", "sgd"),
        ("tasks start where the last one ended", "adam"),
        ("the meta-optimizer is new each time", "adam"),
    ],
)
def test_a_mistake_in_meta_training_would_show(mistake, meta, metric):
    rule, learning_rate = RULES[meta]
    flags = {**FLAGS_OF_MISTAKES, "metric": metric}
    ours, batches = served_once(meta, metric)
    assert min(length_of(seed) for seeds_of_batch in batches for seed in seeds_of_batch) == 1
    assert apart(ours[-1], INITIAL.astype(np.float64)) > 0.01, "otherwise agreement would prove little"
    assert apart(ours[-1], published(rule(learning_rate), batches, **flags)[-1]) < TOLERANCE
    assert apart(ours[-1], published(rule(learning_rate), batches, mistake=mistake, **flags)[-1]) > 1000 * TOLERANCE
