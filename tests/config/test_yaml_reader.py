"""Files that are not what they should be, or that expand without end, are refused at once."""

from __future__ import annotations

import os
import re
import socket
import time
import tracemalloc

import pytest

from leap_dist.config.files import MAX_ALIASES, MAX_BYTES, MAX_NODES
from leap_dist.config.loading import ConfigError, read_yaml, resolve


def bomb(line: str, depth: int = 12) -> str:
    """A file in which each line refers nine times to the one before."""
    lines = ["a0: &a0 {" + ", ".join(f"k{n}: 1" for n in range(9)) + "}"]
    for n in range(1, depth):
        lines.append(f"a{n}: &a{n} " + line.format(", ".join([f"*a{n - 1}"] * 9)))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bomb("{{<<: [{}]}}"), f"more than {MAX_NODES} values in a mapping"),
        (bomb("[{}]", 13), f"more than {MAX_ALIASES} aliases"),
        ("a: &a 1\nb: [" + "*a, " * MAX_ALIASES + "*a]", f"more than {MAX_ALIASES} aliases"),
        ("a: [" + "1, " * MAX_NODES + "1]", f"more than {MAX_NODES} values"),
        ("\n".join(f"a{n}: 1" for n in range(MAX_NODES)), f"more than {MAX_NODES} values"),
        ("#" * (MAX_BYTES + 1), f"larger than {MAX_BYTES} bytes"),
    ],
    ids=["merge keys", "aliases", "flat aliases", "values", "names", "bytes"],
)
def test_a_file_that_expands_or_is_too_large_is_refused_at_once(tmp_path, text, reason):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    tracemalloc.start()
    before = time.process_time()
    with pytest.raises(ConfigError, match=re.escape(f"config: cannot read {path}: {reason}")):
        read_yaml(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert time.process_time() - before < 5, "with tracing on, on a busy machine"


def test_a_list_within_the_limits_that_would_print_without_end_is_refused_in_one_short_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(bomb("[{}]", 11) + "\nworkers: *a10")
    with pytest.raises(ConfigError) as caught:
        resolve("smoke", {"workers": read_yaml(path)["workers"]})
    assert str(caught.value).startswith("workers: [[[")
    assert len(str(caught.value)) < 120


def test_anchors_and_merge_keys_still_work(tmp_path):
    path = tmp_path / "fine.yaml"
    path.write_text("agent: &agent {envs: 4, unroll: 5}\nother: {<<: *agent, envs: 8}\n")
    assert read_yaml(path) == {"agent.envs": 4, "agent.unroll": 5, "other.envs": 8, "other.unroll": 5}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "directory", "sparse"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, monkeypatch, kind):
    path = tmp_path / "c.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's name has to be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("c.yaml")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 2**40)
    with pytest.raises(ConfigError, match=r"^config: cannot read .*c\.yaml: .+"):
        read_yaml(path)
