"""The chapter on what was claimed: the table of claims x studies, and a section for each claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lthlib.book import markdown
from lthlib.book.markdown import plain
from lthlib.figures.claims import claim_figure
from lthlib.metrics import METRICS
from lthlib.results.claims import CLAIMS, Claim, Finding, find_all, interpreted
from lthlib.results.claims_parts import CANNOT, FAILS, HOLDS, UNMEASURED, Evidence

MARKS = {HOLDS: "✓", FAILS: "✗", CANNOT: "?", UNMEASURED: "–"}
LEGEND = ", ".join(f"{mark} {outcome}" for outcome, mark in MARKS.items())


def claims_pages(studies: Sequence[Evidence]) -> dict[str, str | bytes]:
    """Return the files that the chapter includes, by name: ``claims-table.md``, ``claims.md`` and pictures (SVG).

    Args:
        studies: In the order of the table; each with a label of its own.
    """
    found = {claim.name: find_all(claim, studies) for claim in CLAIMS}
    files: dict[str, str | bytes] = {"claims-table.md": _table(studies, found)}
    parts = []
    for claim in CLAIMS:
        name = f"claim-{claim.name}.svg"
        measured = [e for e in studies if found[claim.name][e.label].outcome != UNMEASURED]
        picture = claim_figure(claim, {e.label: e.judged for e in measured})
        if picture is not None:
            files[name] = markdown.svg(picture)
        parts.append(_section(claim, found[claim.name], name if picture is not None else ""))
    return {"claims.md": "\n\n".join(parts), **files}


def _table(studies: Sequence[Evidence], found: Mapping[str, Mapping[str, Finding]]) -> str:
    """Return the table claims x studies, these by numbers, and what the numbers and marks stand for, as Markdown."""
    lines = []
    for claim in CLAIMS:
        marks = {str(n): MARKS[found[claim.name][e.label].outcome] for n, e in enumerate(studies, 1)}
        lines.append({"claim": f"[{claim.title}](#claim-{claim.name})", **marks})
    names = "\n".join(f"{n}. {plain(e.label)}" for n, e in enumerate(studies, 1))
    return f"{markdown.table(lines, ':-:')}\n\n{LEGEND}. The studies:\n\n{names}"


def _section(claim: Claim, found: Mapping[str, Finding], picture: str) -> str:
    parts = [f"(claim-{claim.name})=\n## {claim.title}", f"**Claim.** {claim.statement} Source: {claim.source}."]
    parts.append(f"**Rule.** {claim.rule}")
    unmeasured = [label for label, finding in found.items() if finding.outcome == UNMEASURED]
    for label, finding in found.items():
        if finding.outcome != UNMEASURED:
            numbers = "\n".join(f"- {MARKS[part.outcome]} {part.said}" for part in finding.parts)
            head = f"**{plain(label)}: {MARKS[finding.outcome]} {finding.outcome}.** {interpreted(claim, finding)}"
            parts.append(f"{head}\n\n{numbers}")
    if unmeasured:
        names = "; ".join(map(plain, unmeasured))
        parts.append(f"**{names}: {MARKS[UNMEASURED]} {UNMEASURED}.** The rule needs {claim.needs}.")
    if picture:
        drawn = "; ".join(METRICS[name].title for name in claim.figure if name in METRICS)
        caption = f"Against sparsity: {drawn}. Several shifts are averaged ([](#how-to-read))."
        parts.append(markdown.picture(picture, caption))
    return "\n\n".join(parts)
