"""Check every node before training starts: shared storage, installed packages, data sets."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leap_dist.config import files
from leap_dist.config.loading import ConfigError
from leap_dist.driver.nodes import Node
from leap_dist.driver.signals import StopSignal
from leap_dist.driver.waiting import wait_for

ANSWER_SECONDS = 60.0  # the first process on a node takes a while to start
PACKAGES = ("torch", "numpy", "ale-py", "gymnasium", "safetensors")
"""Packages whose versions influence what a worker computes."""


class Answer(NamedTuple):
    """What a node reported about itself."""

    content: str | None
    """Content of the probe file, or None where the node cannot read it."""
    versions: dict[str, str | None]
    """Installed version by package, or None where the package is missing."""
    has_data: bool
    """Whether the directory of the data sets exists."""


def check_nodes(nodes: Mapping[str, Node], folder: Path | None, data_dir: Path | None, stop: StopSignal) -> list[str]:
    """Check every node. Returns warnings about what does not keep training from starting.

    Args:
        nodes: the nodes by Ray's ID.
        folder: an existing directory that all nodes must share, or None.
        data_dir: a directory that all nodes must have, or None.
        stop: ends the wait for answers.

    Raises ConfigError where a node does not share the folder, or lacks a package or the data; Stopped.
    """
    here = {name: metadata.version(name) for name in PACKAGES}
    with _probe(folder) as (path, content):
        answers, silent = _ask(list(nodes), path, "/" if data_dir is None else str(data_dir), stop)
    warnings = [f"{nodes[name].host} has not answered for {ANSWER_SECONDS:.0f} s" for name in silent]
    for name, answer in answers.items():
        host = nodes[name].host
        if folder is not None and answer.content != content:
            raise ConfigError(
                f"run-dir: {folder} is not shared with node {host}; put it on storage that every node has, give a URL, "
                "or say --server.storage node, with which only this node can resume the run"
            )
        if not answer.has_data:
            raise ConfigError(f"data_dir: node {host} has no {data_dir}; put the data sets there, or on shared storage")
        if missing := [package for package in PACKAGES if answer.versions[package] is None]:
            raise ConfigError(
                f"address: node {host} lacks {', '.join(missing)}; install this project's requirements.txt there"
            )
        if other := [package for package in PACKAGES if answer.versions[package] != here[package]]:
            theirs = ", ".join(f"{package} {answer.versions[package]} (here {here[package]})" for package in other)
            warnings.append(f"node {host} has {theirs}: the bits may differ")
    return warnings


@contextlib.contextmanager
def _probe(folder: Path | None) -> Iterator[tuple[str, str]]:
    """Create a probe file in the folder for the duration of the context; yields its path and content."""
    content = secrets.token_hex(16)
    if folder is None:
        yield "", content
        return
    path = folder / f".probe-{content[:8]}"
    try:
        with files.create_new(path) as file:
            file.write(content.encode())
    except OSError as error:
        raise ConfigError(f"run-dir: {folder} cannot be written ({error.strerror}); choose another") from None
    try:
        yield str(path), content
    finally:
        path.unlink(missing_ok=True)


def _ask(names: list[str], path: str, data_dir: str, stop: StopSignal) -> tuple[dict[str, Answer], list[str]]:
    """Return the answer of each node, and the nodes that did not answer in time or went away meanwhile."""

    # Defined here so that Ray ships the whole function: a node needs none of our code to answer.
    def report(path: str, data_dir: str, packages: tuple[str, ...]) -> tuple[str | None, dict[str, str | None], bool]:
        import importlib.metadata
        import pathlib

        versions: dict[str, str | None] = {}
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = None
        has_data = pathlib.Path(data_dir).is_dir()
        try:
            return pathlib.Path(path).read_text(), versions, has_data
        except OSError:
            return None, versions, has_data

    remote: Any = ray.remote(num_cpus=0, max_retries=0)(report)
    asked = {
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote(
            path, data_dir, PACKAGES
        ): name
        for name in names
    }
    done = wait_for(list(asked), ANSWER_SECONDS, stop)
    silent = [reference for reference in asked if reference not in done]
    for reference in silent:
        ray.cancel(reference, force=True)
    answers, gone = {}, [asked[reference] for reference in silent]
    for reference in done:
        try:
            answers[asked[reference]] = Answer(*ray.get(reference))
        except RayError:
            gone.append(asked[reference])
    return answers, gone
