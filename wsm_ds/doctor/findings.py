"""One finding, and the report of all."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
"""By falling weight.

- error: training fails, a checkpoint cannot be loaded, or a merge of the window is refused or wrong.
- warning: something happens that the user may not expect.
- note: a figure or a fact to know.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: its short name, always the same for the same kind.
        level: how much it weighs, see `LEVELS`.
        found: what is there: the key and the value, or the figures.
        effect: what it does to the run or its merges.
        cure: what to do.
        source: where this comes from: a file of DeepSpeed's source, or a test that runs it.
    """

    name: str
    level: Level
    found: str
    effect: str
    cure: str
    source: str


@dataclass(frozen=True, slots=True)
class Report:
    """What an examination found.

    Attributes:
        examined: the run or the ds_config that was examined.
        deepspeed: the version of DeepSpeed that the findings are about.
        deepspeed_from: how this version is known.
        findings: errors first, then warnings, then notes.
    """

    examined: str
    deepspeed: str
    deepspeed_from: str
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """1 if there is an error among the findings, else 0."""
        return int(any(finding.level == "error" for finding in self.findings))

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data for JSON."""
        return {
            "examined": self.examined,
            "deepspeed": self.deepspeed,
            "deepspeed_from": self.deepspeed_from,
            "findings": [asdict(finding) for finding in self.findings],
        }


def by_weight(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Returns findings, the heaviest first; those of one level keep their order.

    Args:
        findings: in any order.
    """
    return tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level)))


def report_text(report: Report) -> str:
    """Returns a report as text for people.

    Args:
        report: what was found.
    """
    lines = [f"{report.examined}, judged for DeepSpeed {report.deepspeed} ({report.deepspeed_from})"]
    for finding in report.findings:
        lines += [
            "",
            f"{finding.level}: {finding.name}: {finding.found}",
            f"  effect  {finding.effect}",
            f"  cure    {finding.cure}",
            f"  source  {finding.source}",
        ]
    counts = [sum(finding.level == level for finding in report.findings) for level in LEVELS]
    words = [f"{count} {level}{'s' * (count != 1)}" for level, count in zip(LEVELS, counts, strict=True)]
    return "\n".join([*lines, "", ", ".join(words)])
