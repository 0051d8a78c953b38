"""Measure what evaluation text shares with calibration text, within a domain or between two, and with itself.

Two records are the same when they differ only in case, white space and Unicode forms (NFKC). Of other records, lines
of 13 words or more are compared: GPT-3's authors looked for 13-grams (Brown et al. 2020, appendix C), and documents
quote each other by lines. A share counts characters, because text is what is measured.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moesmith.console import say
from moesmith.data.records import Domain, Record, as_text
from moesmith.errors import MoesmithError

WORDS = 13  # fewest words of a line that is compared by itself
LIMIT = 0.5  # share of a domain's evaluation text that calibration may hold
WORTH_A_LINE = 0.01  # share below which quoted lines (licences, instructions) are counted, but not reported


@dataclass(frozen=True)
class Overlap:
    """What a domain's evaluation split shares with the calibration splits of all domains.

    Attributes:
        records: how many evaluation records there are.
        copied: how many of them are calibration records.
        quoting: how many others have a line of 13 words or more that calibration text holds.
        repeated: how many are equal to an earlier evaluation record of any domain.
        share: part of the evaluation text, by characters, that calibration text holds.
        source: the domain whose calibration split holds most of the copies, or of the lines; empty if none does.
    """

    records: int
    copied: int
    quoting: int
    repeated: int
    share: float
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for a manifest."""
        return asdict(self) | {"share": round(self.share, 4)}


def found_in(metrics: Mapping[str, Any]) -> dict[str, Overlap]:
    """Read the overlaps that stage *held-out* left in its metrics; the oldest runs have none."""
    return {name: Overlap(**facts) for name, facts in metrics.get("overlap", {}).items()}


def overlaps(evaluated: Sequence[Domain], calibrated: Sequence[Domain] | None = None) -> dict[str, Overlap]:
    """Compare the evaluation splits of domains with calibration splits.

    Args:
        evaluated: the domains of the evaluation splits.
        calibrated: the domains of the calibration splits; the same if left out.
    """
    wanted: set[int] = set()  # hashes of evaluation texts and of their long lines: nothing else has to be kept
    for domain in evaluated:
        for record in domain.evaluation:
            parts = _lines(record)
            wanted.add(hash(" ".join(parts)))
            wanted.update(hash(line) for line in parts if _long(line))
    wholes: dict[int, str] = {}  # hash of a text → the first domain that has it
    lines: dict[int, str] = {}
    for domain in evaluated if calibrated is None else calibrated:
        for record in domain.calibration:
            parts = _lines(record)
            if (whole := hash(" ".join(parts))) in wanted:
                wholes.setdefault(whole, domain.name)
            for line in parts:
                if _long(line) and (found := hash(line)) in wanted:
                    lines.setdefault(found, domain.name)
    seen: set[int] = set()
    return {domain.name: _overlap(domain, wholes, lines, seen) for domain in evaluated}


def _overlap(domain: Domain, wholes: dict[int, str], lines: dict[int, str], seen: set[int]) -> Overlap:
    copied = quoting = repeated = shared = total = 0
    sources: Counter[str] = Counter()
    for record in domain.evaluation:
        parts = _lines(record)
        text = hash(" ".join(parts))
        total += sum(map(len, parts))
        repeated += text in seen
        seen.add(text)
        if text in wholes:
            copied += 1
            found = {wholes[text]: sum(map(len, parts))}
        else:
            held = [(lines[hash(line)], len(line)) for line in parts if _long(line) and hash(line) in lines]
            quoting += bool(held)
            found = {name: sum(size for other, size in held if other == name) for name, _ in held}
        shared += sum(found.values())
        sources.update(found)
    source = sources.most_common(1)[0][0] if sources else ""
    return Overlap(len(domain.evaluation), copied, quoting, repeated, shared / max(1, total), source)


def _lines(record: Record) -> list[str]:
    """Return a record's lines as they are compared."""
    text = unicodedata.normalize("NFKC", as_text(record)).casefold()
    return [" ".join(line.split()) for line in text.split("\n") if line.strip()]


def _long(line: str) -> bool:
    return line.count(" ") >= WORDS - 1


def check_splits(domains: Sequence[Domain]) -> dict[str, Overlap]:
    """Refuse domains whose evaluation text is mostly calibration text, and say where some of it is.

    Returns:
        what :func:`overlaps` found.

    Raises:
        MoesmithError: ``LIMIT`` of a domain's evaluation text, by characters, or more is in the calibration splits.
    """
    found = overlaps(domains)
    if worst := [name for name, overlap in found.items() if overlap.share >= LIMIT]:
        overlap = found[worst[0]]
        also = f" (the same holds for {', '.join(worst[1:])})" if worst[1:] else ""
        raise MoesmithError(
            f"{overlap.share:.0%} of the evaluation text of domain '{worst[0]}' is not held out: calibration text of"
            f" '{overlap.source}' holds it, {overlap.copied} of {overlap.records} records word for word{also}",
            "Give other evaluation text, or leave the domain out.",
        )
    for line in warnings(found):
        say(line)
    return found


def warnings(found: dict[str, Overlap]) -> list[str]:
    """Say what a person should know, a line for each kind of overlap; quotations below 1 % are not reported."""
    lines = []
    held = {n: o for n, o in found.items() if o.copied or o.share >= WORTH_A_LINE}
    if held:
        lines.append("not all evaluation text is held out: " + "; ".join(f"{n} {said(o)}" for n, o in held.items()))
    if repeated := {n: o for n, o in found.items() if o.repeated}:
        counts = "; ".join(f"{n} {o.repeated} of {o.records} records" for n, o in repeated.items())
        lines.append(f"evaluation text that occurs twice: {counts}")
    return lines


def said(overlap: Overlap) -> str:
    """Say an overlap in words, for a line about its domain."""
    return (
        f"{overlap.share:.1%} in calibration text ({overlap.copied} of {overlap.records} records whole,"
        f" {overlap.quoting} in part, most from {overlap.source})"
    )
