"""The chapter on what was claimed: the table of claims x studies, and a section for each claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lthlib.book import markdown
from lthlib.book.markdown import plain
from lthlib.book.studies import beside_accuracy_table, disagreements, foreign_table, rankings_table, studies_table
from lthlib.figures.claims import claim_figure
from lthlib.metrics import METRICS
from lthlib.results.claims import CLAIMS, Claim, Finding, find_all, interpreted
from lthlib.results.claims_parts import CANNOT, FAILS, HOLDS, UNMEASURED, Evidence

MARKS = {HOLDS: "✓", FAILS: "✗", CANNOT: "?", UNMEASURED: "–"}
LEGEND = ", ".join(f"{mark} {outcome}" for outcome, mark in MARKS.items())


def claims_pages(studies: Sequence[Evidence]) -> dict[str, str | bytes]:
    """Return the files that chapters include, by name: tables, ``claims.md`` and pictures (SVG).

    Args:
        studies: In the order of the table; each with a label of its own.
    """
    found = {claim.name: find_all(claim, studies) for claim in CLAIMS}
    numbers = {e.label: n for n, e in enumerate(studies, 1)}
    files: dict[str, str | bytes] = {
        "claims-table.md": _table(studies, found),
        "studies.md": studies_table(studies),
        "disagreements.md": disagreements(studies, found),
        "rankings.md": rankings_table(studies),
        "beside-accuracy.md": beside_accuracy_table(studies),
        "foreign.md": foreign_table(studies),
    }
    parts = []
    for claim in CLAIMS:
        name = f"claim-{claim.name}.svg"
        measured = [e for e in studies if found[claim.name][e.label].outcome != UNMEASURED]
        picture = claim_figure(claim, {e.label: e.judged for e in measured})
        if picture is not None:
            files[name] = markdown.svg(picture)
        parts.append(_section(claim, found[claim.name], numbers, name if picture is not None else ""))
    return {"claims.md": "\n\n".join(parts), **files}


def _table(studies: Sequence[Evidence], found: Mapping[str, Mapping[str, Finding]]) -> str:
    """Return the table claims x studies, these by their numbers in `studies_table`, as Markdown."""
    lines = []
    for claim in CLAIMS:
        marks = {str(n): MARKS[found[claim.name][e.label].outcome] for n, e in enumerate(studies, 1)}
        lines.append({"claim": f"[{claim.title}](#claim-{claim.name})", **marks})
    return f"{markdown.table(lines, ':-:')}\n\n{LEGEND}."


def _section(claim: Claim, found: Mapping[str, Finding], numbers: Mapping[str, int], picture: str) -> str:
    parts = [f"(claim-{claim.name})=\n## {claim.title}", f"**Claim.** {claim.statement} Source: {claim.source}."]
    parts.append(f"**Rule.** {claim.rule}")
    alike: list[tuple[Finding, dict[str, int]]] = []  # studies that were judged together share what was found
    for label, finding in found.items():
        finding = finding if finding.outcome != UNMEASURED else Finding(UNMEASURED)
        mine = next((of for known, of in alike if known == finding), None)
        if mine is None:
            alike.append((finding, mine := {}))
        mine[label] = numbers[label]
    for finding, of in sorted(alike, key=lambda pair: pair[0].outcome == UNMEASURED):
        head = f"**{_named(of)}: {MARKS[finding.outcome]} {finding.outcome}.**"
        if finding.outcome == UNMEASURED:
            parts.append(f"{head} The rule needs {claim.needs}.")
        else:
            told = "\n".join(f"- {MARKS[part.outcome]} {part.said}" for part in finding.parts)
            parts.append(f"{head} {interpreted(claim, finding)}\n\n{told}")
    if picture:
        drawn = "; ".join(METRICS[name].title for name in claim.figure if name in METRICS)
        caption = f"Against sparsity: {drawn}. Several shifts are averaged ([](#how-to-read))."
        parts.append(markdown.picture(picture, caption))
    return "\n\n".join(parts)


def _named(studies: Mapping[str, int]) -> str:
    """Return a study's number and name, or the numbers of several."""
    if len(studies) == 1:
        return "; ".join(f"Study {n}, {plain(label)}" for label, n in studies.items())
    *first, last = map(str, studies.values())
    return f"Studies {', '.join(first)} and {last}"
