"""Nodes are asked about themselves before they get workers, and those that cannot run any are left out with a line."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from ray._private import utils

from leap_dist.config.loading import ConfigError, resolve
from leap_dist.driver import node_report, preflight
from leap_dist.driver.errors import ClusterError
from leap_dist.driver.node_report import PACKAGES, Answer, Gpu, Question, judge, report
from leap_dist.driver.nodes import Node
from leap_dist.driver.preflight import NodeChecks
from leap_dist.driver.signals import StopSignal

GB = 2**30
HERE: dict[str, str | None] = {name: metadata.version(name) for name in PACKAGES}
GOOD = Answer("probe", "", platform.python_version(), HERE, True, "", [Gpu("H100", 70 * GB, 80 * GB)], "")
CPU = Node({"CPU": 4.0}, {}, "10.0.0.1")
GPU = Node({"CPU": 4.0, "GPU": 1.0}, {}, "10.0.0.2")


def verdict(node: Node, device: str = "auto", **changes: Any) -> node_report.Verdict:
    return judge(
        node,
        GOOD._replace(**changes),
        content="probe",
        folder=Path("/shared/run"),
        data_dir="/data",
        device=device,
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"content": None}, "run-dir: /shared/run is not shared with node 10.0.0.1; put it on storage"),
        ({"content": "another"}, "run-dir: /shared/run is not shared with node 10.0.0.1; put it on storage"),
        ({"unwritable": "Permission denied"}, "run-dir: /shared/run cannot be written from node 10.0.0.1 (Permission"),
        ({"has_data": False}, "data_dir: node 10.0.0.1 has no /data; put the data sets there"),
        ({"versions": {**HERE, "ale-py": None}}, "address: node 10.0.0.1 lacks ale-py; install this project's"),
        ({"versions": {**HERE, "torch": "1.0.0"}}, f"address: node 10.0.0.1 has torch 1.0.0 (here {HERE['torch']});"),
        ({"versions": {**HERE, "ray": "2.0.0"}}, f"address: node 10.0.0.1 has ray 2.0.0 (here {HERE['ray']}); install"),
        ({"python": "3.11.0"}, f"address: node 10.0.0.1 has Python 3.11.0 (here {platform.python_version()}); install"),
        ({"emulator": "no ROM of pong"}, "address: node 10.0.0.1 cannot start the emulator (no ROM of pong); install"),
    ],
)
def test_a_node_that_cannot_run_workers_is_left_out_with_one_line(changes: dict[str, Any], line: str) -> None:
    node, (said,) = verdict(CPU, **changes)
    assert node is None
    assert said.startswith(line)


def test_another_build_of_torch_and_other_versions_of_the_rest_are_only_mentioned() -> None:
    torch = f"{str(HERE['torch']).partition('+')[0]}+other"
    node, (said,) = verdict(CPU, versions={**HERE, "torch": torch, "numpy": "1.0"})
    assert node == CPU
    assert said == (
        f"node 10.0.0.1 has torch {torch} (here {HERE['torch']}), numpy 1.0 (here {HERE['numpy']}): results may not be "
        "identical to the bit"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"gpus": [], "gpu_problem": "The NVIDIA driver on your system is too old (found version 12040)."},
            "The NVIDIA driver on your system is too old (found version 12040).",
        ),
        ({"gpus": []}, "torch sees only 0 of 1, perhaps because of MIG"),
        ({"gpus": [Gpu("T4", GB // 2, 16 * GB)]}, "GPU 0, T4, has 0.5 of 16 GB free"),
    ],
)
def test_gpus_that_torch_cannot_use_leave_the_processors(changes: dict[str, Any], reason: str) -> None:
    node, (said,) = verdict(GPU, **changes)
    assert node == GPU._replace(resources={"CPU": 4.0, "GPU": 0.0})
    assert said.startswith(f"worker.device: GPUs of node 10.0.0.2 cannot be used ({reason}); ")
    node, (said,) = verdict(GPU, "cuda", **changes)
    assert node is None, "somebody asked for GPUs"
    assert said.endswith("or use --worker.device cpu")
    assert verdict(GPU, "cpu", **changes) == (GPU, []), "nobody needs them"


def test_good_gpus_are_used_as_far_as_their_memory_goes() -> None:
    assert verdict(GPU) == (GPU._replace(gpu_bytes=70 * GB), [])
    assert verdict(CPU, gpus=[]) == (CPU, [])


FOUR = Node({"CPU": 4.0, "GPU": 4.0}, {}, "10.0.0.2")
FREE = [Gpu("H100", 70 * GB, 80 * GB, str(number)) for number in range(4)]


@pytest.mark.parametrize(
    ("number", "gpu", "said"),
    [
        (
            2,
            FREE[2]._replace(free=GB // 2),
            "(GPU 2, H100, has 0.5 of 80 GB free); end the programs that use it, or start Ray there with "
            "CUDA_VISIBLE_DEVICES=0,1,3, which leaves it out",
        ),
        (
            0,
            FREE[0]._replace(problem="no kernel image is available"),
            "(GPU 0, H100: no kernel image is available); see cluster/README.md for what torch supports, or start Ray "
            "there with CUDA_VISIBLE_DEVICES=1,2,3, which leaves it out",
        ),
    ],
)
def test_the_gpu_that_cannot_be_used_is_named_and_how_to_go_on_without_it(number: int, gpu: Gpu, said: str) -> None:
    gpus = [*FREE[:number], gpu, *FREE[number + 1 :]]
    node, (line,) = verdict(FOUR, gpus=gpus)
    assert node is not None
    assert node.resources["GPU"] == 0
    assert line == (f"worker.device: GPUs of node 10.0.0.2 cannot be used {said}. Its processors are used meanwhile")


@pytest.mark.parametrize(
    ("bundles", "free_gb", "gpu_gb"),
    [
        (({"GPU": 1.0},), (0, 60, 70, 0), 70),
        (({"GPU": 1.0}, {"GPU": 0.5}), (0, 60, 70, 0), 60),
        (({"GPU": 0.5}, {"GPU": 0.5}), (0, 60, 0, 0), 60),
        (({"GPU": 3.0},), (0, 60, 70, 0), None),
    ],
)
def test_in_a_reservation_only_so_many_gpus_must_be_good_as_are_reserved(
    bundles: tuple[dict[str, float], ...], free_gb: tuple[int, ...], gpu_gb: int | None
) -> None:
    """The others belong to other programs, which use them."""
    total = sum(bundle["GPU"] for bundle in bundles)
    node = FOUR._replace(resources={"CPU": 4.0, "GPU": total}, bundles=bundles)
    gpus = [gpu._replace(free=free * GB) for gpu, free in zip(FREE, free_gb, strict=True)]
    found, lines = verdict(node, gpus=gpus)
    if gpu_gb is not None:
        assert (found, lines) == (node._replace(gpu_bytes=gpu_gb * GB), [])
        return
    assert found is not None
    assert (found.resources["GPU"], found.bundles) == (0.0, ({"GPU": 0.0},))
    assert lines[0].endswith("GB free); end the programs that use it. Its processors are used meanwhile")


def test_gpus_that_ray_was_not_given_are_not_judged() -> None:
    node = FOUR._replace(resources={"CPU": 4.0, "GPU": 2.0})
    gpus = [*FREE[:2], FREE[2]._replace(free=0), FREE[3]]
    assert verdict(node, gpus=gpus) == (node._replace(gpu_bytes=70 * GB), [])
    found, (line,) = verdict(node, gpus=[FREE[0]._replace(free=0), *FREE[1:]])
    assert found == node.without_gpus(), "Ray gives workers the first two, and the others do not help"
    assert "GPU 0, H100, has 0.0 of 80 GB free" in line


@pytest.mark.parametrize(
    ("cpus", "processors", "counted"),
    [
        (128.0, (8, 128), 8.0),  # srun --cpus-per-task=8 ray start
        (128.0, (128, 128), 128.0),
        (16.0, (8, 128), 16.0),  # ray start --num-cpus=16: somebody wants that
        (128.0, (0, 0), 128.0),
    ],
)
def test_processors_that_a_node_may_not_use_are_not_counted(
    cpus: float, processors: tuple[int, int], counted: float
) -> None:
    node = Node({"CPU": cpus, "memory": 1.0}, {}, "10.0.0.1")
    found, lines = verdict(node, processors=processors)
    assert found == node._replace(resources={"CPU": counted, "memory": 1.0})
    said = ["node 10.0.0.1 may use only 8 of 128 processors, and gets workers for these"]
    assert lines == (said if counted == 8 else [])
    reserved = node._replace(bundles=({"CPU": cpus},))
    assert verdict(reserved, processors=processors) == (reserved, []), "what is reserved is counted"


# What a node reports ------------------------------------------------------------------------------------------------


def test_a_machine_reports_what_it_has(tmp_path: Path) -> None:
    (probe := tmp_path / ".probe").write_text("content")
    question = Question(str(probe), str(tmp_path), ("pong",), "")
    answer = Answer(*report(tuple(question), PACKAGES))
    processors = len(os.sched_getaffinity(0)), utils.get_num_cpus()
    assert answer == GOOD._replace(content="content", gpus=[], processors=processors)
    assert [path.name for path in tmp_path.iterdir()] == [".probe"], "nothing stays behind"
    missing = Question(str(tmp_path / "none"), str(tmp_path / "none"), ("no_such_game",), "")
    answer = Answer(*report(tuple(missing), ("no-such-package",)))
    assert (answer.content, answer.has_data, answer.versions) == (None, False, {"no-such-package": None})
    assert answer.unwritable == "No such file or directory"
    assert answer.emulator


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (probe := tmp_path / ".probe").write_text("content")
    tmp_path.chmod(0o500)
    answer = Answer(*report(tuple(Question(str(probe), "", (), "")), PACKAGES))
    tmp_path.chmod(0o700)
    assert (answer.content, answer.unwritable) == ("content", "Permission denied")


TORCH = """
class cuda:
    init = staticmethod(lambda: {init})
    device_count = staticmethod(lambda: 2)
    get_device_name = staticmethod(lambda index: f"GPU {{index}}")
    mem_get_info = staticmethod(lambda index: (index + 1, 10))
class ones:
    def __init__(self, count, device): self.device = device
    def sum(self): return self
    def item(self):
        if self.device == {bad!r}: raise RuntimeError("no kernel image is available for execution\\nlong advice")
"""


@pytest.mark.parametrize(
    ("init", "bad", "found"),
    [
        ("None", "", ([("GPU 0", 1, 10, "6", ""), ("GPU 1", 2, 10, "7", "")], "")),
        (
            "None",
            "cuda:0",
            ([("GPU 0", 0, 0, "6", "no kernel image is available for execution"), ("GPU 1", 2, 10, "7", "")], ""),
        ),
        ("1 / 0", "", ([], "division by zero")),
    ],
)
def test_each_gpu_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str, bad: str, found: tuple[Any, str]
) -> None:
    """With a torch that pretends to have two."""
    (tmp_path / "torch.py").write_text(TORCH.format(init=init, bad=bad))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    answer = Answer(*report(tuple(Question("", "", (), node_report.GPU_SCRIPT)), PACKAGES))
    assert (answer.gpus, answer.gpu_problem) == found


def test_a_torch_that_does_not_start_is_reported() -> None:
    answer = Answer(*report(tuple(Question("", "", (), "import os; os.abort()")), PACKAGES))
    assert (answer.gpus, answer.gpu_problem) == ([], "torch does not start: CalledProcessError")


def test_a_node_needs_none_of_our_code_to_answer(tmp_path: Path) -> None:
    (tmp_path / "function").write_bytes(cloudpickle.dumps(preflight._shipped(report)))
    script = (
        "import pickle, json; answer = pickle.load(open('function', 'rb'))(('', '', (), ''), ('torch',)); "
        "print(json.dumps(answer[2]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == platform.python_version()


# Asking, waiting, asking again ---------------------------------------------------------------------------------------


class Asking:
    """NodeChecks whose nodes answer as the test says: with an Answer, an error of Ray's, or not at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path | None = None, **settings: Any) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.now = 1000.0
        self.checks = NodeChecks(resolve("smoke", settings), folder)
        monkeypatch.setattr(self.checks, "_ask", self._ask)
        monkeypatch.setattr(preflight.ray, "wait", self._wait)
        monkeypatch.setattr(preflight.ray, "get", self._get)
        monkeypatch.setattr(preflight.ray, "cancel", lambda reference, force: None)
        monkeypatch.setattr(preflight.time, "monotonic", lambda: self.now)

    def _ask(self, name: str, node: Node) -> str:
        self.asked.append(name)
        self.checks._probe_path()
        return name

    def _wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        return (references, []) if references[0] in self.answers else ([], references)

    def _get(self, reference: str) -> Any:
        if isinstance(self.answers[reference], Exception):
            raise self.answers[reference]
        return tuple(self.answers[reference])


NODES = {"a": CPU, "b": CPU._replace(host="10.0.0.3")}


def test_a_node_gets_workers_once_it_has_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = Asking(monkeypatch, tmp_path)
    one.checks.follow(NODES)
    assert one.checks.passed(NODES) == {}
    (probe,) = tmp_path.iterdir()
    one.answers["a"] = GOOD._replace(content=probe.read_text())
    one.checks.follow(NODES)
    assert one.checks.passed(NODES) == {"a": CPU}
    assert list(tmp_path.iterdir()) == [probe], "the other one has not read it yet"
    one.answers["b"] = GOOD._replace(content="stale")
    one.checks.follow(NODES)
    assert one.checks.passed(NODES) == {"a": CPU}
    assert list(tmp_path.iterdir()) == []
    (line,) = one.checks.alerts
    assert line.startswith(f"run-dir: {tmp_path} is not shared with node 10.0.0.3; ")
    assert line.endswith(". The node is left out")
    assert one.asked == ["a", "b"], "each is asked once"


def test_a_node_that_is_left_out_is_asked_again_and_mentioned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Asking(monkeypatch)
    one.answers["a"] = GOOD._replace(emulator="no ROM of pong")
    for _ in range(3):
        one.checks.follow({"a": CPU})
        one.now += preflight.AGAIN_SECONDS
    assert one.asked == ["a"] * 3
    assert len(one.checks.alerts) == 1
    one.answers["a"] = GOOD
    one.checks.follow({"a": CPU})
    assert one.checks.passed({"a": CPU}) == {"a": CPU}
    one.now += preflight.AGAIN_SECONDS
    one.checks.follow({"a": CPU})
    assert one.asked == ["a"] * 4, "a good node is not asked again"


def test_a_node_on_which_workers_fail_is_asked_again_before_it_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Asking(monkeypatch)
    one.answers["a"] = GOOD
    one.checks.follow({"a": GPU})
    one.checks.doubt("a", occupied=True)
    assert one.checks.alerts == ["workers keep failing on node 10.0.0.2, which is checked again"]
    del one.answers["a"]
    one.checks.follow({"a": GPU})
    assert one.checks.is_doubted("a")
    assert list(one.checks.passed({"a": GPU})) == ["a"], "its other workers stay"
    one.answers["a"] = GOOD._replace(gpus=[Gpu("H100", 0, 80 * GB)])
    one.checks.follow({"a": GPU})
    assert not one.checks.is_doubted("a")
    assert one.checks.passed({"a": GPU})["a"].gpu_bytes == 70 * GB, "it is our workers that hold the memory"

    one.checks.doubt("a", occupied=False)
    one.checks.follow({"a": GPU})
    assert one.checks.passed({"a": GPU})["a"].resources["GPU"] == 0
    assert one.asked == ["a"] * 3
    assert "0.0 of 80 GB" in one.checks.alerts[-1]


@pytest.mark.parametrize("answer", [None, GOOD._replace(emulator="no ROM of pong")])
def test_a_node_that_has_not_passed_cannot_be_doubted(monkeypatch: pytest.MonkeyPatch, answer: Answer | None) -> None:
    one = Asking(monkeypatch)
    if answer is not None:
        one.answers["a"] = answer
    one.checks.follow({"a": CPU})
    one.checks.doubt("a", occupied=False)
    one.checks.doubt("unknown", occupied=False)
    one.checks.follow({"a": CPU})
    assert not one.checks.is_doubted("a")
    assert one.asked == ["a"]


def test_gpus_that_come_back_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Asking(monkeypatch)
    one.answers["a"] = GOOD._replace(gpus=[Gpu("T4", 0, 16 * GB)])
    one.checks.follow({"a": GPU})
    assert one.checks.passed({"a": GPU})["a"].resources["GPU"] == 0
    one.answers["a"] = GOOD
    one.now += preflight.AGAIN_SECONDS
    one.checks.follow({"a": GPU})
    assert one.checks.passed({"a": GPU})["a"].resources["GPU"] == 1


def test_a_node_that_does_not_answer_is_left_out_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Asking(monkeypatch)
    one.checks.follow({"a": CPU})
    one.now += preflight.ANSWER_SECONDS + 1
    one.checks.follow({"a": CPU})
    assert one.checks.alerts == [
        "address: node 10.0.0.1 has not answered for 60 s; see Ray's logs there. The node is left out"
    ]
    one.now += preflight.AGAIN_SECONDS
    one.answers["a"] = GOOD
    one.checks.follow({"a": CPU})
    assert one.checks.passed({"a": CPU}) == {"a": CPU}


@pytest.mark.parametrize(
    ("answer", "error", "line"),
    [
        (GOOD._replace(content="x", emulator="no ROM of pong"), ClusterError, "address: node 10.0.0.1 cannot start"),
        (GOOD._replace(has_data=False), ConfigError, "data_dir: node 10.0.0.1 has no data"),
        (preflight.RayError("lost"), ClusterError, r"address: node 10.0.0.1 has not answered \(RayError\)"),
    ],
)
def test_where_no_node_is_left_the_run_ends_with_the_line(
    monkeypatch: pytest.MonkeyPatch, answer: Any, error: type[Exception], line: str
) -> None:
    one = Asking(monkeypatch, tasks="omniglot")
    one.answers["a"] = answer
    with pytest.raises(error, match=line):
        one.checks.wait({"a": CPU}, StopSignal(), others_may_come=False)
    one.checks.wait({"a": CPU}, StopSignal(), others_may_come=True)
    one.answers["b"] = GOOD
    one.checks.wait(NODES, StopSignal(), others_may_come=False)
    assert list(one.checks.passed(NODES)) == ["b"]


def test_a_cluster_is_checked_and_this_machine_only_for_its_gpus() -> None:
    there, local = resolve("smoke", {"address": "auto"}), resolve("smoke")
    for config, node, checked in (
        (there, CPU, True),
        (local, CPU, False),
        (local, GPU, True),
        (resolve("smoke", {"worker.device": "cpu"}), GPU, False),
    ):
        assert isinstance(preflight.checks_for(config, {"a": node}, None), NodeChecks) == checked
