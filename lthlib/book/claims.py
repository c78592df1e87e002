"""The chapter on what was claimed: the table of claims x studies, and a section for each claim."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt

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
    found = judged(studies)
    files: dict[str, str | bytes] = {"claims-table.md": table(studies, found)}
    parts = []
    for claim in CLAIMS:
        name = f"claim-{claim.name}.svg"
        measured = [e for e in studies if found[claim.name][e.label].outcome != UNMEASURED]
        picture = claim_figure(claim, {e.label: e.judged for e in measured})
        if picture is not None:
            drawn = io.BytesIO()
            picture.savefig(drawn, format="svg", bbox_inches="tight")
            plt.close(picture)
            files[name] = drawn.getvalue()
        parts.append(_section(claim, found[claim.name], name if picture is not None else ""))
    return {"claims.md": "\n\n".join(parts), **files}


def judged(studies: Sequence[Evidence]) -> dict[str, dict[str, Finding]]:
    """Return what every rule finds, by claim and study."""
    return {claim.name: find_all(claim, studies) for claim in CLAIMS}


def table(studies: Sequence[Evidence], found: Mapping[str, Mapping[str, Finding]] | None = None) -> str:
    """Return the table claims x studies with its legend, as Markdown."""
    found = found or judged(studies)
    lines = [["claim", *(plain(e.label) for e in studies)], ["---", *[":-:" for _ in studies]]]
    for claim in CLAIMS:
        marks = [MARKS[found[claim.name][e.label].outcome] for e in studies]
        lines.append([f"[{claim.title}](#claim-{claim.name})", *marks])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{LEGEND}."


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
        parts.append(f"```{{figure}} /_generated/{picture}\n:width: 100%\n{caption}\n```")
    return "\n\n".join(parts)


def plain(text: str) -> str:
    """Return what a person wrote so that Markdown reads nothing into it."""
    return "".join(c if c.isalnum() or c in " .,:;()%+-/'" else f"&#{ord(c)};" for c in text)
