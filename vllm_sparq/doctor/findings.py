"""What a check finds: lines that are right, wrong or good to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Mark = Literal["✓", "✗", "•"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    mark: Mark
    text: str


@dataclass
class Section:
    """A heading with its findings, and numbers for programs where there are some."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def good(self, text: str) -> None:
        self.findings.append(Finding("✓", text))

    def bad(self, text: str) -> None:
        self.findings.append(Finding("✗", text))

    def note(self, text: str) -> None:
        self.findings.append(Finding("•", text))

    @property
    def is_well(self) -> bool:
        return all(finding.mark != "✗" for finding in self.findings)
