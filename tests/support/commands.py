"""Commands that run in this process, and what they answer to bad input."""

from __future__ import annotations

import pytest

from leap_dist.cli.main import main
from leap_dist.driver import driver


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Whatever these tests do, Ray must not start."""

    def started(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(driver, "connect", started)


def refused(capsys, *arguments: str) -> str:
    """The one line that a refusal prints."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    return output.err.removeprefix("leap-dist: error: ").rstrip()
