"""The pages for users of the library do what they say: their code is run, as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from initialization_files import written

from leap_dist.cli import parser

ROOT = Path(__file__).parents[2]
PAGES = {
    "weights.md": """
images = torch.rand(2, 4, 84, 84)
assert torch.equal(same(images), encoder(images))
assert features.shape == (1, 256) and actions.shape == (2,)
assert agent.num_timesteps == 100
""",
    "library.md": """
assert loss_from["server"] < 0.5 * loss_from["fresh"], loss_from
assert loss_from["by hand"] < 0.5 * loss_from["fresh"], loss_from
assert server.status()["complete"] and not server.alerts, server.alerts
""",
}
"""With what has to be true at the end."""
ALL_PAGES = [
    *(page for folder in (".", "docs", "cluster") for page in sorted((ROOT / folder).glob("*.md"))),
    *sorted(ROOT.glob("reference/**/*.md")),
]


def program(page: Path) -> str:
    """A page's code, every line in its place, so that a traceback names the page's line.

    Blocks of `python` are taken as they are, lines of `sh` have to call launch.py; there is no other code.
    """
    setup = "import torch; torch.manual_seed(0); torch.set_num_threads(1); from leap_dist.cli import main as cli"
    lines, kind = [setup], ""
    for number, line in enumerate(page.read_text().splitlines()):
        fence = re.fullmatch(r"```(\w*)", line)
        if fence:
            assert kind or fence[1] in ("python", "sh"), f"{page}:{number + 1}: what is {line}?"
            kind = "" if kind else fence[1]
        elif kind == "sh":
            python, script, *arguments = shlex.split(line)
            assert (python, script) == ("python", "launch.py"), line
            lines.append(f"assert cli.main({arguments}) == 0")
            continue
        if number:
            lines.append(line if kind == "python" and not fence else "")
    return "\n".join(lines)


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(tmp_path, name):
    code = program(ROOT / "docs" / name)
    written(tmp_path / "runs" / "demo")
    script = f"exec(compile({code!r}, {name!r}, 'exec'))\n{PAGES[name]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr


def test_a_page_s_code_keeps_its_lines():
    page = ROOT / "docs" / "library.md"
    code = program(page).splitlines()
    text = page.read_text().splitlines()
    assert [n for n, line in enumerate(code) if line == "def train(seed, start, steps=30):"] == [
        n for n, line in enumerate(text) if line == "def train(seed, start, steps=30):"
    ]


def test_the_library_s_example_is_short():
    """Model, tasks, training and server together."""
    code = program(ROOT / "docs" / "library.md").splitlines()[1:]
    assert sum(bool(line.strip()) for line in code[: code.index("server.close()") + 1]) < 40


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_a_page_exist(page):
    """Relative links and their anchors resolve, and so do the paths of our own files in backquotes."""
    text = page.read_text()
    missing = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    if page.name != "CHANGELOG.md":  # its table of renames names files that are gone
        named = re.findall(r"`((?:leap_dist|tests|benchmarks|cluster|docs|envs)/[\w/.-]+\.\w+)", text)
        missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_can_be_given(page):
    """Every flag belongs to its command; and the pages start launch.py, which needs no installation."""
    text = page.read_text().replace("\\\n", " ")
    parsers = parser.build("launch.py")._subparsers._group_actions[0].choices
    found = re.findall(rf"(launch\.py|leap-dist) ({'|'.join(parsers)})\b([^\n#|`;>)]*)", text)
    flags = {(command, flag) for _, command, rest in found for flag in re.findall(r"(?<= )--[\w.-]+", rest)}
    assert not {(command, flag) for command, flag in flags if flag not in parsers[command].get_default("flags")}
    if page.parent == ROOT / "docs":
        assert "leap-dist" not in {program for program, *_ in found}


def test_the_alerts_that_the_page_explains_are_those_of_the_program():
    section = (ROOT / "docs" / "monitoring.md").read_text().split("## Alerts")[1].split("## ")[0]
    alerts = re.findall(r"^\| (.+?) \| ", section, re.MULTILINE)[1:]
    assert len(alerts) == 17
    source = "".join(path.read_text() for path in (ROOT / "leap_dist").rglob("*.py"))
    source = re.sub(r'"\n\s*f?"', "", source)  # texts that go on in the next line
    assert [alert for alert in alerts if alert not in source] == []
