"""What people and hubs look for beside the code: citation, security policy, templates, versions, licenses."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import leap_dist

ROOT = Path(__file__).parents[2]


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert leap_dist.__version__ == project()["version"] == citation["version"]
    assert project()["license"] == citation["license"] == "Apache-2.0"


def test_the_citation_has_what_the_format_asks_for():
    """The keys that version 1.2.0 of the Citation File Format requires, for the software and for the paper."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors", "year"} <= paper.keys()
    assert all({"family-names", "given-names"} <= author.keys() for author in paper["authors"])


def test_forms_for_issues_are_forms():
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids))
        assert all(part["attributes"]["label"] for part in form["body"])


def test_the_license_of_the_weights_is_that_of_the_program():
    assert (ROOT / "leap_dist/weights/templates/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_changelog_keeps_its_format():
    """Keep a Changelog: versions with dates, and only the six kinds of changes."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", version) for version in versions[1:])
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
