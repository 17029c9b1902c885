# SPDX-License-Identifier: Apache-2.0
"""``hansa site budget``: what a site has spent of its data's privacy, and whether its ledgers are whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hansa.cli import console
from hansa.errors import JobError, StorageError, nearest
from hansa.pki.kit import Kit
from hansa.privacy.ledger import Books, Budget, TamperedError
from hansa.site import budget
from hansa.site.settings import FILE, load

_ADVERSARIES = {
    "server": "the server",
    "server-and-corrupt": "the server and the corrupt sites of each job",
    "sites": "the sites",
}


def show(directory: Path, *, verify: bool, as_json: bool) -> None:
    """Show every ledger of the site in ``directory``; or, to ``verify``, only check them.

    Raises:
        StorageError: one was tampered with; all are shown first.
    """
    kit, budgets = Kit(directory), load(directory / FILE).privacy.budgets
    found: list[dict[str, Any]] = []
    damaged = []
    for data in sorted({*budgets, *budget.kept(directory)}):
        try:
            books = budget.ledger(directory, data, kit).read()
        except TamperedError as error:
            damaged.append(error.message)
            found.append({"data": data, "intact": False, "reason": error.message})
            continue
        checked = {"data": data, "intact": True, "lines": len(books.lines), "sha256": books.digest}
        found.append(checked if verify else {**checked, **_spent(books, budgets.get(data))})
    if as_json:
        console.emit({"budgets": found})
    else:
        lines = [line for item in found for line in _shown(item)]
        console.out().print("\n".join(lines or ["No budgets, and no ledgers."]), soft_wrap=True, markup=False)
    if damaged:
        raise StorageError("\n".join(damaged))


def seal(directory: Path, data: str) -> None:
    """Sign a ledger's head with the site's key of now.

    Raises:
        JobError: there is no such ledger.
        StorageError: its lines and its head do not belong together.
    """
    known = budget.kept(directory)
    if data not in known:
        raise JobError(f"There is no ledger of {data!r}; there is: {', '.join(known) or 'none'}.{nearest(data, known)}")
    budget.ledger(directory, data, Kit(directory)).seal()


def _spent(books: Books, allowed: Budget | None) -> dict[str, Any]:
    """Return what was spent; without a budget, what was charged."""
    jobs: dict[str, dict[str, Any]] = {}
    for entry in books.entries:
        jobs.setdefault(entry.id, {"job": entry.id, "mechanism": entry.mechanism, "charges": 0})["charges"] += 1
    if allowed is None:
        return {"budget": None, "spent": None, "jobs": list(jobs.values())}
    for id, job in jobs.items():
        job["spent"] = _finite(Books([e for e in books.entries if e.id == id]).spent(allowed))
    return {
        "budget": allowed.model_dump(mode="json"),
        "spent": _finite(books.spent(allowed)),
        "jobs": list(jobs.values()),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(item: dict[str, Any]) -> list[str]:
    data = item["data"]
    if not item["intact"]:
        return [f"{data}: TAMPERED WITH"]
    if "jobs" not in item:
        return [f"{data}: {item['lines']} lines, as they were written; SHA-256 {item['sha256']}"]
    allowed = item["budget"]
    if allowed is None:
        lines = [f"{data}: no budget any more; {item['lines']} lines are kept"]
    else:
        lines = [
            f"{data}: ε = {_number(item['spent'])} of {allowed['epsilon']:g} is spent, at δ = {allowed['delta']:g}, "
            f"for one {allowed['unit']}, against {_ADVERSARIES[allowed['adversary']]}"
        ]
    for job in item["jobs"]:
        alone = f", ε = {_number(job['spent'])} by itself" if "spent" in job else ""
        lines.append(f"  {job['job']}: {job['mechanism']}, {job['charges']} charges{alone}")
    return lines


def _number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.4g}"
