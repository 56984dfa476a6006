"""Actors of MPS daemons without Ray and without daemons."""

from __future__ import annotations

from typing import Any

import pytest

from leap_dist.driver import mps


class Actors:
    """Stands in for Ray: actors answer what the test says, when it says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[str] = []
        self.answers: dict[str, Any] = {}
        self.ended: list[str] = []
        actors = self

        class Actor:
            def __init__(self, name: str) -> None:
                self.name = name
                for method in ("start", "is_running", "stop"):
                    call = type("Call", (), {"remote": lambda _, method=method: f"{self.name}.{method}"})
                    setattr(self, method, call())

        class Options:
            def options(self, scheduling_strategy: Any) -> Options:
                self.name = scheduling_strategy.node_id
                return self

            def remote(self) -> Actor:
                actors.started.append(self.name)
                return Actor(self.name)

        monkeypatch.setattr(mps, "DAEMON", Options())
        monkeypatch.setattr(
            mps, "NodeAffinitySchedulingStrategy", lambda node_id, soft: type("At", (), {"node_id": node_id})
        )
        monkeypatch.setattr(mps.ray, "wait", lambda answers, timeout: ([a for a in answers if a in self.answers], []))
        monkeypatch.setattr(mps.ray, "get", self._get)
        monkeypatch.setattr(mps.ray, "kill", lambda actor: self.ended.append(actor.name))

    def _get(self, answer: Any, timeout: float = 0.0) -> Any:
        if isinstance(answer, list):
            return [None for _ in answer]
        found = self.answers.pop(answer)
        if isinstance(found, Exception):
            raise found
        return found
