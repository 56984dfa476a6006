"""`completion`: what a real shell completes with the script that is printed."""

from __future__ import annotations

import builtins
import subprocess
from typing import Any

import pytest
from commands import no_ray, refused  # noqa: F401

from leap_dist.cli.main import main


def completed(script: str, *words: str) -> set[str]:
    """The words that bash offers for the last one."""
    program = f"""{script}
COMP_WORDS=({" ".join(repr(word) for word in words)})
COMP_CWORD={len(words) - 1}
function=$(complete -p leap-dist | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function leap-dist
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {word.strip() for word in done.stdout.splitlines() if word.strip()}


def test_bash_completes_commands_flags_and_values(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert {"train", "enjoy", "evaluate"} <= completed(script, "leap-dist", "")
    assert {"--mode", "--meta.batch-size", "--no-insecure"} <= completed(script, "leap-dist", "train", "--")
    assert completed(script, "leap-dist", "train", "--mode", "st") == {"stream"}
    assert completed(script, "leap-dist", "train", "--preset", "sm") == {"smoke"}
    assert completed(script, "leap-dist", "study", "--preset", "a") == {"authors"}
    assert completed(script, "leap-dist", "study", "--preset", "fi") == {"figure4"}
    assert "camera25" in completed(script, "leap-dist", "train", "--games", "ca")


def test_other_shells_and_mistakes(capsys, monkeypatch):
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef leap-dist")
    assert refused(capsys, "completion", "bsh") == "shell: 'bsh' is not one of bash, zsh, tcsh; did you mean bash?"
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "shtab":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert refused(capsys, "completion", "bash").startswith("shell: completion needs the package shtab; pip install ")


@pytest.mark.parametrize("arguments", [["train", "--mode", "asink"], ["train", "--preset", "quik"]])
def test_mistakes_are_answered_as_before(capsys, arguments):
    assert main(["completion", "bash"]) == 0
    capsys.readouterr()
    assert "did you mean" in refused(capsys, *arguments)
