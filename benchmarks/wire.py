"""Measure the cost of a contribution with 32, 16 and 8 bits per number, alone and batched. Runs without Ray.

    python -m benchmarks.wire                       in half a minute
    python -m benchmarks.wire --dir /dev/shm        without the cost of a disk

A push is the work of the server's process: unpickling with out-of-band arrays, as Ray does it, and `MetaServer.push`,
on the plain class in mode buffered with |B| = 16. Pushes with and without a meta-update are listed separately.
"Together" means sixteen final contributions in one `push_together`, including their meta-update.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import clients
from benchmarks.harness import Report, parser, progress
from benchmarks.server import file_system
from leap_dist.protocol.messages import Contribution, Lease
from leap_dist.protocol.quantization import quantize

WIRES = {"float32": 32, "int16": 16, "int8": 8}
TIMES = 30  # number of timed packings and unpackings per repetition
TOGETHER = 16


def main() -> None:
    """Run the benchmark and print the report."""
    arguments = parser(__doc__, repeats=7)
    arguments.add_argument("--dir", type=Path, default=Path(), help="parent of the run directory (default: here)")
    chosen = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for child processes; Ray sets it for its own
    settings = {"numbers": f"{clients.encoder()[1].size:,}", "file system": file_system(chosen.dir)}
    report = Report("Contributions on the wire", settings)
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory(prefix=".benchmark-", dir=chosen.dir) as folder,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        for repetition in range(-1, chosen.repeats):
            for wire in WIRES:
                where = Path(folder).resolve() / f"{wire}-{repetition}"
                figures = pool.apply(measure, (wire, where))
                if wire == "float32":
                    figures += pool.apply(reports, (where.with_name(f"reports-{repetition}"),))
                for name, unit, value in figures:
                    if repetition >= 0:
                        found[f"{wire}: {name}", unit].append(value)
            progress(f"{repetition + 1} of {chosen.repeats}")
    for (name, unit), values in sorted(found.items(), key=lambda item: item[0][0].partition(":")[2]):
        report.add(name, unit, values)
    report.show(chosen.json)


def measure(wire: str, run_dir: Path) -> list[tuple[str, str, float]]:
    """Return the name, unit and value of all figures of one repetition."""
    torch.set_num_threads(1)  # as the server's actor does
    manifest, vector = clients.encoder()
    bits = WIRES[wire]
    figures = []
    if bits < 32:
        packed = quantize(vector, bits)
        figures.append(("pack", "ms", median_ms(lambda: quantize(vector, bits))))
        figures.append(("unpack", "ms", median_ms(lambda: packed.vector)))
    else:
        figures.append(("copy", "ms", median_ms(lambda: np.array(vector))))
    server = clients.plain_server(run_dir, worker__wire=wire, workers=TOGETHER)

    def sent(lease: Lease) -> tuple[bytes, list[pickle.PickleBuffer]]:
        whole = clients.contribution(lease, manifest.digest, vector, 1, final=True)
        buffers: list[pickle.PickleBuffer] = []
        one = whole if bits == 32 else whole.quantized(bits)
        return pickle.dumps(one, protocol=5, buffer_callback=buffers.append), buffers

    def leased(count: int) -> list[tuple[bytes, list[pickle.PickleBuffer]]]:
        leases = [server.lease(f"w{n}", "i") for n in range(count)]
        return [sent(lease) for lease in leases if isinstance(lease, Lease)]

    alone, updating = [], []
    for number in range(2 * TOGETHER):
        (message,) = leased(1)
        started = time.perf_counter()
        assert server.push(received(message)).durable
        (alone if (number + 1) % TOGETHER else updating).append(1e3 * (time.perf_counter() - started))
    messages = leased(TOGETHER)
    started = time.perf_counter()
    acks = server.push_together([received(message) for message in messages])
    together = 1e3 * (time.perf_counter() - started)
    assert all(ack.durable for ack in acks)
    server.close()
    figures += [
        ("on the wire", "bytes", float(len(message[0]) + sum(buffer.raw().nbytes for buffer in message[1]))),
        ("final push", "ms", statistics.median(alone)),
        ("final push with a meta-update", "ms", statistics.median(updating)),
        (f"{TOGETHER} finals one by one, each", "ms", (sum(alone) + sum(updating)) / (2 * TOGETHER)),
        (f"{TOGETHER} finals together, each", "ms", together / TOGETHER),
    ]
    return figures


def reports(run_dir: Path) -> list[tuple[str, str, float]]:
    """Return the figures of a running task's partial contributions, with and without their vectors."""
    manifest, vector = clients.encoder()
    server = clients.plain_server(run_dir)
    lease = server.lease("w", "i")
    assert isinstance(lease, Lease)
    figures = []
    for name, part in (("partial push with its vector", vector), ("partial push without", vector[:0])):
        seconds = []
        for _ in range(TIMES):
            seq = len(figures) * TIMES + len(seconds) + 1
            one = clients.contribution(lease, manifest.digest, part, seq)
            started = time.perf_counter()
            assert server.push(one).accepted
            seconds.append(1e3 * (time.perf_counter() - started))
        figures.append((name, "ms", statistics.median(seconds)))
    server.close()
    return figures


def received(message: tuple[bytes, list[pickle.PickleBuffer]]) -> Contribution:
    """Unpickle a contribution as the server receives it, with arrays that are read-only views."""
    data, buffers = message
    contribution: Contribution = pickle.loads(data, buffers=[buffer.raw().toreadonly() for buffer in buffers])
    return contribution


def median_ms(call: Callable[[], object]) -> float:
    """Return the median milliseconds of a call."""
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    main()
