"""Contributions in 16 and 8 bits: how far off they may be, alone and over a whole path, and that they stay the same."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from protocol import INITIAL, Clock, Worker, config, contribution, drive, fast_folder, grant, ledger, serve

from leap_dist.config.loading import ConfigError
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Contribution, Lease, Task
from leap_dist.protocol.quantization import BLOCK, LIMITS, Quantized, quantize
from leap_dist.server.meta_server import MetaServer

HALF = 0.505
"""A step's half, and what float32 rounds of a step."""
TINY = float(np.finfo(np.float32).tiny)
HUGE = np.finfo(np.float32).max
BITS = pytest.mark.parametrize("bits", [16, 8])


def steps(packed: Quantized) -> np.ndarray:
    """The step of each element."""
    return packed.scales.repeat(BLOCK)[: packed.codes.size].astype(np.float64)


@settings(max_examples=200)
@given(
    vector=arrays.arrays(
        np.float32, st.integers(0, 600), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    bits=st.sampled_from([16, 8]),
)
def test_an_element_is_off_by_half_a_step_at_most_and_zeros_stay(vector, bits):
    packed = quantize(vector, bits)
    packed.check()
    found = packed.vector
    assert (found.dtype, found.shape) == (np.float32, vector.shape)
    assert np.isfinite(found).all()
    off = np.abs(found.astype(np.float64) - vector)
    assert (off <= np.maximum(HALF * steps(packed), LIMITS[bits] * TINY)).all()
    assert not found[vector == 0].any()
    for start in range(0, vector.size, BLOCK):
        largest = np.abs(vector[start : start + BLOCK]).max().astype(np.float64)
        step = packed.scales[start // BLOCK]
        assert step <= largest / LIMITS[bits] * (1 + 1e-6), "no coarser than it has to be"
    again = quantize(found, bits)
    assert np.array_equal(again.vector, found) or np.isclose(again.vector, found, rtol=1e-6).all()


@BITS
@pytest.mark.parametrize("value", [HUGE, -HUGE, TINY, 1e-45, -1e-45, 2 * 32767 * TINY, 0.0, 1.0])
def test_the_largest_numbers_stay_finite_and_the_smallest_become_zero_or_stay(bits, value):
    vector = np.full(300, value, np.float32)
    found = quantize(vector, bits).vector
    kept = abs(value) >= LIMITS[bits] * TINY
    np.testing.assert_allclose(found, vector if kept else 0 * vector, rtol=1e-6)


@BITS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 255, 256, 299])
def test_what_is_not_finite_stays_so_and_spoils_its_own_block_only(bits, value, position):
    vector = np.ones(300, np.float32)
    vector[position] = value
    found = quantize(vector, bits).vector
    spoilt = np.arange(300) // BLOCK == position // BLOCK
    assert np.isnan(found[spoilt]).all()
    assert (found[~spoilt] == 1).all()


@pytest.mark.parametrize("vector", [np.ones(3), np.ones((1, 3), np.float32), np.ones(3, np.int8)])
def test_only_flat_float32_is_packed(vector):
    with pytest.raises(ValueError, match="flat float32"):
        quantize(vector, 8)
    with pytest.raises(ValueError, match="4 bits"):
        quantize(np.ones(3, np.float32), 4)


# --- contributions -------------------------------------------------------------------------------------------------

SIZE = 690_000


def one(size: int = 700) -> Contribution:
    vector = np.random.default_rng(0).normal(size=size).astype(np.float32)
    return contribution(Lease("000000-00000000", Task(0, "pong", 0, 1, 100), "w0", "i0", 0, 60.0), vector)


@pytest.mark.parametrize(("bits", "bytes_"), [(32, 4 * SIZE), (16, 2 * SIZE + 4 * 2696), (8, SIZE + 4 * 2696)])
def test_what_travels_is_a_half_or_a_quarter_and_means_the_same_at_both_ends(bits, bytes_):
    sent = one(SIZE) if bits == 32 else one(SIZE).quantized(bits)
    assert sum(array.nbytes for array in sent.arrays().values()) == bytes_
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 2000
    assert sum(buffer.raw().nbytes for buffer in buffers) == bytes_
    got = pickle.loads(data, buffers=[buffer.raw().toreadonly() for buffer in buffers])
    assert got.vector.tobytes() == sent.vector.tobytes()
    assert got.header() == sent.header()
    kept = got.owned()
    assert kept.packed is None
    assert kept.vector.flags.writeable
    assert kept.vector.tobytes() == sent.vector.tobytes()


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("scales", {"scales": np.ones(2, np.float32)}),
        ("scales", {"scales": np.ones(3, np.float64)}),
        ("scales", {"scales": np.ones((3, 1), np.float32)}),
        ("scales", {"scales": -np.ones(3, np.float32)}),
        ("codes", {"codes": np.zeros(700, np.int32)}),
        ("codes", {"codes": np.zeros((700, 1), np.int8)}),
        ("codes", {"codes": np.zeros(700, np.float32)}),
        ("codes", {"codes": np.full(700, -128, np.int8)}),
        ("vector", {"vector": np.zeros(700, np.float32)}),
        ("vector", {"start": np.zeros(700, np.float32)}),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(problem, changes):
    sent = one().quantized(8)
    with pytest.raises(ValueError, match=problem):
        Contribution.from_parts(sent.header(), {**sent.arrays(), **changes})
    with pytest.raises(ValueError, match="no vector"):
        Contribution.from_parts(sent.header(), {"codes": sent.arrays()["codes"]})
    smuggled = {**one().header(), "packed": "anything"}
    assert Contribution.from_parts(smuggled, one().arrays()).packed is None


def test_phi_does_not_travel_packed():
    with pytest.raises(ValueError, match="start"):
        replace(one(), start=np.zeros(700, np.float32)).quantized(8)
    with pytest.raises(ConfigError, match=r"worker\.wire: int8 does not go with mode fedasync.*use float32"):
        config(mode="fedasync", meta_learner="reptile", worker__wire="int8")
    with pytest.raises(ConfigError, match=r"worker\.wire: int16 .*endpoint_correction 0\.5.*use float32"):
        config(meta__endpoint_correction=0.5, meta_learner="reptile", worker__wire="int16")


@BITS
@pytest.mark.parametrize("mode", ["buffered", "stream"])
@pytest.mark.parametrize("final", [True, False])
def test_what_is_not_finite_is_refused_as_ever(tmp_path, bits, mode, final):
    server = serve(tmp_path, config(mode=mode))
    lease = grant(server)
    bad = INITIAL.copy()
    bad[3] = np.inf
    sent = contribution(lease, bad, final=final).quantized(bits)
    assert server.push(pickle.loads(pickle.dumps(sent))).reason == "non-finite"


@pytest.mark.parametrize("wire", ["int16", "int8"])
@pytest.mark.parametrize("mode", ["buffered", "stream"])
def test_the_journal_stores_what_travelled_and_a_restart_reads_the_same_bits(tmp_path, mode, wire):
    """Killed with contributions waiting: the same φ as one that was not, and the files say that they are packed."""
    run = config(mode=mode, worker__wire=wire, meta_updates=3, meta__batch_size=3)
    whole, killed = serve(tmp_path / "whole", run), serve(tmp_path / "killed", run)
    teams = [[Worker(run, f"w{n}", lambda task: 3)] for n in range(2)]
    for server, team in zip((whole, killed), teams, strict=True):
        drive(server, team, 11)
    stored = [killed._state.backlog.journal.read(order)[0] for order in killed._state.backlog.journal.orders()]
    assert stored
    assert {arrays["codes"].dtype.name for arrays in stored} == {wire}
    killed.close()
    again = serve(tmp_path / "killed", run)
    for server, team in zip((whole, again), teams, strict=True):
        drive(server, team)
    assert np.array_equal(whole.snapshot()[1], again.snapshot()[1])
    assert ledger(tmp_path / "whole") == ledger(tmp_path / "killed")
    assert not again.alerts


@pytest.mark.parametrize("wire", ["int16", "int8"])
@pytest.mark.parametrize("learner", ["leap", "finetune-multi"])
def test_sync_is_bit_for_bit_the_same_for_any_number_of_workers(tmp_path, wire, learner):
    run = config(mode="sync", worker__wire=wire, meta_learner=learner, meta_updates=3, meta__batch_size=5)
    ends = []
    for count in (1, 2, 7):
        server = serve(tmp_path / str(count), run)
        drive(server, [Worker(run, f"w{n}") for n in range(count)])
        ends.append((server.snapshot()[1].tobytes(), ledger(tmp_path / str(count))))
    assert ends[0] == ends[1] == ends[2]
    plain = serve(tmp_path / "plain", config(mode="sync", meta_learner=learner, meta_updates=3, meta__batch_size=5))
    drive(plain, [Worker(plain._config)])
    assert plain.snapshot()[1].tobytes() != ends[0][0]
    np.testing.assert_allclose(np.frombuffer(ends[0][0], np.float32), plain.snapshot()[1], rtol=0.02, atol=0.02)


# --- the law: no drift ---------------------------------------------------------------------------------------------

LENGTH = 600
SUM = {
    "mode": "stream",
    "meta__optimizer": "sgd",
    "meta__learning_rate": 1.0,
    "meta__batch_size": 1,
    "meta__staleness": "constant",
    "meta__contribution_clip": 0,
    "meta__max_staleness": 1000,
    "meta__refuse_norm": 0,
}
"""φ₀ − φ is the sum of what was applied."""


def path(seed: int, count: int) -> np.ndarray:
    """G_1 … G_K, which go out and come back, with blocks that differ by orders of magnitude."""
    sizes = np.array([1e-3, 1.0, 1e3], np.float32).repeat(BLOCK)[:LENGTH]
    return np.random.default_rng(seed).normal(size=(count, LENGTH)).astype(np.float32) * sizes


def applied(sent: list[np.ndarray], bits: int | None, order: list[int]) -> np.ndarray:
    """The sum of what a stream's server applied of a lease; `bits` None: the vectors as they are."""
    manifest = Manifest(("weight",), ((LENGTH,),))
    with fast_folder() as folder:
        server = MetaServer(
            config(**SUM), folder, manifest=manifest, initial=np.zeros(LENGTH, np.float32), clock=Clock()
        )
        lease = grant(server)
        for index in order:
            push = contribution(lease, sent[index], seq=index + 1, final=index + 1 == len(sent))
            push = replace(push, manifest=manifest.digest)
            ack = server.push(pickle.loads(pickle.dumps(push if bits is None else push.quantized(bits))))
            assert ack.accepted, ack
        assert server.status()["tasks"] == 1
        server.close()
        return -server.snapshot()[1].astype(np.float64)


def bound(exact: np.ndarray, bits: int) -> np.ndarray:
    """Half a step of the last push, and float32's own rounding of each of the sums on the way."""
    rounding = 4 * len(exact) * 2.0**-24 * np.abs(exact).max(axis=0)
    return HALF * steps(quantize(exact[-1], bits)) + rounding


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31 - 1),
    bits=st.sampled_from([16, 8]),
    before=st.lists(st.integers(0, 28), max_size=50),
)
def test_the_sum_over_a_path_is_off_by_half_a_step_of_the_last_push_however_many_there_were(seed, bits, before):
    """Thirty pushes, of which some are lost, some come twice, some late; the final one comes last."""
    exact = path(seed, 30)
    assert (np.abs(applied(list(exact), bits, [*before, 29]) - exact[-1]) <= bound(exact, bits)).all()


@BITS
def test_packing_the_differences_would_drift(bits):
    """What the law is there to exclude: the same path, each difference packed by itself."""
    exact = path(0, 60)
    differences = np.diff(exact, axis=0, prepend=np.zeros((1, LENGTH), np.float32))
    sent = np.cumsum([quantize(one, bits).vector for one in differences], axis=0, dtype=np.float32)
    off = np.abs(applied(list(sent), None, list(range(60))) - exact[-1])
    assert (off > bound(exact, bits)).mean() > 0.2
    assert (off > 2 * bound(exact, bits)).any()


# --- and it learns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wire", "step"), [("float32", 0.0), ("int16", 1 / 32767), ("int8", 1 / 127)])
def test_the_optimum_of_two_quadratics_is_found_to_within_the_rounding(tmp_path, wire, step):
    """f_j(θ) = ½ (θ−c_j)ᵀ A (θ−c_j), A diagonal; a task's pull is start minus end of gradient descent, as Reptile's.

    φ* = (c_0 + c_1)/2, where the two pulls cancel. There each is off by half a step of its largest element at most, and
    φ by as much over the smallest eigenvalue of the map from φ − φ* to the pull.
    """
    manifest = Manifest(("weight",), ((300,),))
    random = np.random.default_rng(1)
    centres = {"pong": random.normal(size=300), "freeway": random.normal(size=300)}
    lasting = 1 - (1 - 0.1 * random.uniform(0.5, 2.0, 300)) ** 20  # the part of φ − c that twenty steps undo
    sgd = {**SUM, "mode": "sync", "meta__batch_size": 2, "meta__learning_rate": 0.5}
    run = config(**sgd, games=("pong", "freeway"), meta_updates=60, worker__wire=wire)
    initial = np.full(300, 5.0, np.float32)
    server = MetaServer(run, tmp_path, manifest=manifest, initial=initial, clock=Clock())
    while not server.finished:
        lease, (_, start) = grant(server), server.snapshot()
        vector = ((start - centres[lease.task.game]) * lasting).astype(np.float32)
        push = replace(contribution(lease, vector), manifest=manifest.digest)
        assert server.push(push if wire == "float32" else push.quantized(run.wire_bits)).accepted
    off = np.abs(server.snapshot()[1] - sum(centres.values()) / 2).max()
    largest = np.abs((centres["pong"] - centres["freeway"]) / 2 * lasting).max()
    allowed = HALF * step * largest / lasting.min() + 1e-5
    assert off < allowed
    assert allowed < 0.03, "of centres that are one apart"
