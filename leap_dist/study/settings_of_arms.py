"""The part of a study's report that lists the settings with which its arms were trained."""

from __future__ import annotations

from typing import Any

from leap_dist.evaluation.report.document import Block, Heading, Paragraph, Table
from leap_dist.evaluation.report.text import NONE
from leap_dist.study.spec import Study


def settings_of_arms(study: Study) -> list[Block]:
    """Return a table of the settings in which arms differ, and those of all arms; nothing if none are recorded."""
    settings = study.settings
    arms = [arm for arm in study.arms if settings.get(arm)]
    if not arms:
        return []
    first = settings[arms[0]]
    alike = {name: first[name] for name in first if all(settings[arm].get(name) == first[name] for arm in arms)}
    rows = [[arm, _shown({n: v for n, v in settings[arm].items() if n not in alike or len(arms) == 1})] for arm in arms]
    found: list[Block] = [Heading("Settings of each arm"), Table(["arm", "settings"], rows, numbers=False)]
    return found if len(arms) == 1 or not alike else [*found, Paragraph(f"All arms: {_shown(alike)}.")]


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items()) or NONE


def _value(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)[:80] or NONE
