"""What a check found: of runs, subjects and targets, by level and kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["blocked", "left out", "warning", "note"]
LEVELS: tuple[Level, ...] = ("blocked", "left out", "warning", "note")
Status = Literal["used", "left out", "not selected"]
SHOWN = 4
"""Names of one kind that are listed."""
_PLACE = re.compile(r"^\S*/\S*,? ")
_DETAIL = re.compile(r"[:;(]")


@dataclass(frozen=True)
class Finding:
    """One thing to know before the work starts.

    `blocked` stops the whole dataset, `left out` a run. The message begins with what is wrong (or
    with the file, which is not part of the kind), then tells details, and what to do.
    """

    level: Level
    name: str
    message: str

    @property
    def kind(self) -> str:
        """The message without file and details, by which findings are counted together."""
        return _DETAIL.split(_PLACE.sub("", self.message))[0].strip()


@dataclass(frozen=True)
class CheckedRun:
    """A run, whether it will be used, and what else there is to know of it."""

    run: str
    subject: str
    status: Status
    reason: str | None = None
    n_volumes: int | None = None
    repetition_time: float | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Group:
    """Findings of one level and kind: whom they are of, and the first one's message."""

    level: Level
    kind: str
    names: tuple[str, ...]
    example: str


def group_findings(findings: Iterable[Finding]) -> list[Group]:
    """Findings by level, the gravest first, and by kind, the most frequent first."""
    by_kind: dict[tuple[Level, str], list[Finding]] = {}
    for finding in findings:
        by_kind.setdefault((finding.level, finding.kind), []).append(finding)
    groups = [
        Group(level, kind, tuple(one.name for one in same if one.name), same[0].message)
        for (level, kind), same in by_kind.items()
    ]
    return sorted(groups, key=lambda group: (LEVELS.index(group.level), -len(group.names)))


def explain(groups: Sequence[Group]) -> list[str]:
    """The groups as lines of text: counts, some names, and one message in full."""
    lines = []
    for level in LEVELS:
        of_level = [group for group in groups if group.level == level]
        if of_level:
            lines += ["", f"{level}:"]
        for group in of_level:
            if len(group.names) <= 1:
                name = f"{group.names[0]}: " if group.names else ""
                lines.append(f"  {name}{group.example}")
            else:
                lines += [
                    f"  {len(group.names)} x {group.kind}: {some(group.names)}",
                    f"    for example: {group.example}",
                ]
    return lines


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}" + "s" * (count != 1)
