# SPDX-License-Identifier: Apache-2.0
"""Everything that a job can turn on, what goes with what, and the page that says so: docs/composition.md.

The list is read from the tables of names and from the job's model, so that what is added there is asked about here:
``python -m hansa.runs.composition`` prints the page, and a test runs every pair (tests/composition).

    inventory ─> pairs ─> a job of both ─> its pieces ─> the rules of hansa.core.fit ─> a cell of the table
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, get_args

from hansa import registry
from hansa.core import config, fit
from hansa.core.config import CohortSection, EngineSection, Job, PrivacySection, RobustSection, TrainSection, parse
from hansa.core.fit import Conflict, Piece, Trait
from hansa.runs.pieces import misfits, pieces_of
from hansa.workers.runner import Course

SITES = tuple(f"s{number}" for number in range(6))
"""As many as every mechanism here does with."""

BASE: Mapping[str, Any] = {
    "name": "composition",
    "rounds": 3,
    "recipe": "tabular-classification",
    "model": {"adapter": {}},
    "train": {"optimizer": "sgd", "lr": 0.1, "steps": 3, "batch_size": 64},
    "baselines": {"base": False, "local": False},
    "evaluation": {"every": 0},
}
"""The job that mechanisms are added to: FedAvg over everybody, an adapter, plain SGD, in one process."""

_PRIVATE = {"clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-5}
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "clip": {"max_norm": 0.4},
    "mean": {"max_norm": 0.5},
    "dp-ftrl": {"separation": 2},
}
"""What has to be said beside a name, or says more."""


@dataclass(frozen=True)
class Mechanism:
    """Something that a job can turn on.

    Attributes:
        family: what it is a choice of; each family has its part of the page.
        name: what it is called.
        fragment: the least of a job that turns it on, and whatever it can't be without.
        slot: mechanisms of one slot are alternatives, and no job has two of them.
        traits: of the training code or the engine, where the mechanism is one.
    """

    family: str
    name: str
    fragment: Mapping[str, Any] = field(hash=False)
    slot: str
    traits: frozenset[Trait] = frozenset()

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


def inventory() -> list[Mechanism]:
    """Return every mechanism, those that the base job has already left out.

    What comes later has the last word where two say the same key.
    """
    return [*_training(), *_algorithms(), *_protections(), *_participation(), *_surroundings()]


def _algorithms() -> Iterator[Mechanism]:
    for name in registry.TABLES["strategies"]:
        if name != "fedavg":
            yield Mechanism("strategy", name, {"strategy": {"name": name}}, "strategy")
    for rule in _choices(RobustSection, "rule"):
        robust = {"rule": rule, "malicious": 1, **_OPTIONS.get(rule, {})}
        yield Mechanism("robust rule", rule, {"strategy": {"robust": robust}}, "rule")
    for name in registry.TABLES["filters"]:
        yield Mechanism("filter", name, {"filters": [{"name": name, **_OPTIONS.get(name, {})}]}, f"filter {name}")
    for name in registry.TABLES["workflows"]:
        if name != "scatter-gather":
            yield Mechanism("workflow", name, {"workflow": name}, "workflow")


def _protections() -> Iterator[Mechanism]:
    for name in _choices(PrivacySection, "mechanism"):
        section = {"mechanism": name, **_PRIVATE, **_OPTIONS.get(name, {})}
        needed: Mapping[str, Any] = {"secure_aggregation": {}} if name == "distributed" else {}
        yield Mechanism("differential privacy", name, {"privacy": section, **needed}, "privacy")
    adaptive = {"mechanism": "central", **_PRIVATE, "adaptive_clip": {"noise": 2.0}}
    yield Mechanism("differential privacy", "central, adaptive clip", {"privacy": adaptive}, "privacy")
    for key, name in {"secure_aggregation": "masks", "homomorphic_encryption": "encryption"}.items():
        yield Mechanism("secret sums", name, {key: {}}, "secret sums")


def _participation() -> Iterator[Mechanism]:
    yield Mechanism("cohort", "sample, a fraction", {"cohort": {"sample": 0.8}}, "sample")
    yield Mechanism("cohort", "sample, a number", {"cohort": {"sample": 5}}, "sample")
    yield Mechanism("cohort", "quorum, a number", {"cohort": {"quorum": 2}}, "quorum")
    yield Mechanism("cohort", "deadline", {"cohort": {"deadline_s": 60.0}}, "deadline")
    late = {"late": "accept", "deadline_s": 60.0, "sample": 0.8}
    yield Mechanism("cohort", "late answers accepted", {"cohort": late}, "late")


def _training() -> Iterator[Mechanism]:
    for name in _choices(TrainSection, "optimizer"):
        if name != "sgd":
            yield Mechanism("local training", name, {"train": {"optimizer": name}}, "optimizer")
    yield Mechanism("local training", "momentum", {"train": {"momentum": 0.5}}, "optimizer")
    yield Mechanism("local training", "gradients clipped", {"train": {"clip_grad": 0.5}}, "clip_grad")
    timed = {"train": {"max_seconds": 1e-9}, "strategy": {"name": "fedprox"}}
    yield Mechanism("local training", "time limit", timed, "max_seconds", frozenset({Trait.TIMED}))
    yield Mechanism("model", "all parameters", {"model": {"adapter": None}}, "model")
    stepwise = frozenset({Trait.STEPWISE})
    yield Mechanism("training code", "recipes over transformers", {}, "code", stepwise)
    apart = stepwise | {Trait.APART}
    yield Mechanism("training code", "script, its own steps", {}, "code", apart | {Trait.OPAQUE_STEPS})
    yield Mechanism("training code", "script, prepared steps", {}, "code", apart)


def _surroundings() -> Iterator[Mechanism]:
    for name in _choices(EngineSection, "name"):
        if name != "local":
            yield Mechanism("engine", name, {"engine": {"name": name}}, "engine")
    yield Mechanism("engine", "a deployment", {}, "engine", frozenset({Trait.REMOTE}))
    for name in config.BaselineSection.model_fields:
        yield Mechanism("baseline", name, {"baselines": {name: True}}, f"baseline {name}")


def _choices(section: type[config.Section], name: str) -> Sequence[str]:
    """Return the words that a key may have."""
    found: Sequence[str] = get_args(section.model_fields[name].annotation)
    return found


COHORT = frozenset(CohortSection.model_fields) - {"sites"}
"""The keys that :func:`_participation` has to have; which sites there are is no mechanism."""


def job_of(mechanisms: Iterable[Mechanism], base: Mapping[str, Any] = BASE) -> Job:
    """Return the job that turns on all of ``mechanisms``."""
    values: Mapping[str, Any] = base
    for mechanism in mechanisms:
        values = _merged(values, mechanism.fragment)
    return parse({**values, "strategy": _merged({"name": "fedavg"}, values.get("strategy", {}))})


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(one)
    for key, value in other.items():
        held = result.get(key)
        if isinstance(held, Mapping) and isinstance(value, Mapping):
            result[key] = _merged(held, value)
        elif isinstance(held, list) and isinstance(value, list):
            result[key] = [*held, *value]
        else:
            result[key] = value
    return result


def pieces(mechanisms: Sequence[Mechanism]) -> list[Piece]:
    """Return the pieces of the job of ``mechanisms``."""
    return pieces_of(*_asked(mechanisms))


def refusals(mechanisms: Sequence[Mechanism]) -> list[Conflict]:
    """Return why the job of ``mechanisms`` is refused; nothing where it runs."""
    return misfits(*_asked(mechanisms))


def _asked(mechanisms: Sequence[Mechanism]) -> tuple[Job, frozenset[Trait], Course]:
    job = job_of(mechanisms)
    return job, traits(mechanisms), Course(job.name, SITES, job.strategy, tuple(job.filters))


def traits(mechanisms: Sequence[Mechanism]) -> frozenset[Trait]:
    """Return those of the training code and the engine: a functional program in this process, where nothing is said."""
    found = frozenset[Trait]().union(*(mechanism.traits for mechanism in mechanisms))
    if Trait.OPAQUE_STEPS not in found:
        found |= {Trait.BOUNDS_EXAMPLES}
    if any(mechanism.name == "dp-sgd" for mechanism in mechanisms):  # whose draws are each site's own
        found |= {Trait.STEPWISE}
    return found


def pairs(mechanisms: Sequence[Mechanism]) -> Iterator[tuple[Mechanism, Mechanism]]:
    """Yield every pair that one job can have."""
    for one, other in combinations(mechanisms, 2):
        if one.slot != other.slot:
            yield one, other


def triples(mechanisms: Sequence[Mechanism]) -> Iterator[tuple[Mechanism, Mechanism, Mechanism]]:
    """Yield every triple that a rule of three traits is about and in which each two mechanisms are sound."""
    rules = [rule for rule in fit.RULES if len(rule.traits) == 3]
    held = {mechanism: {trait for piece in pieces([mechanism]) for trait in piece.traits} for mechanism in mechanisms}
    for those in combinations(mechanisms, 3):
        if len({mechanism.slot for mechanism in those}) == 3 and any(
            all(any(trait in held[mechanism] for mechanism in those) for trait in rule.traits)
            and not any(refusals(pair) for pair in combinations(those, 2))
            for rule in rules
        ):
            yield those


SAID_ONCE = "differential privacy", "secret sums", "robust rule"
"""The families that promise something: the columns of the page's table."""


def page() -> str:
    """Return docs/composition.md."""
    return _Page().text()


class _Page:
    """The page, written from the inventory and the rules."""

    def __init__(self) -> None:
        self.mechanisms = inventory()
        bare = set(pieces([]))
        self._own = {m: {(p.family, p.name) for p in set(pieces([m])) - bare} for m in self.mechanisms}
        self._reasons: dict[tuple[str, str], int] = {}
        self._found = {frozenset(pair): self._named(pair) for pair in pairs(self.mechanisms)}
        self._groups = self._grouped()

    def _named(self, those: Sequence[Mechanism]) -> list[Conflict]:
        """Return the conflicts that are about all of ``those``, or all there are."""
        found = refusals(those)
        about = [c for c in found if all({(p.family, p.name) for p in c.pieces} & self._own[m] for m in those)]
        return about or found

    def _number(self, conflict: Conflict) -> int:
        return self._reasons.setdefault((conflict.reason, conflict.instead), len(self._reasons) + 1)

    def _grouped(self) -> list[list[Mechanism]]:
        """Return the mechanisms, those of one family together that everything else meets alike."""
        groups: dict[tuple[str, frozenset[tuple[str, str]]], list[Mechanism]] = {}
        for one in self.mechanisms:
            met = frozenset(
                (str(other), conflict.reason)
                for pair, found in self._found.items()
                if one in pair
                for other in pair - {one}
                for conflict in found
            )
            groups.setdefault((one.family, met), []).append(one)
        return list(groups.values())

    def text(self) -> str:
        columns = [group for group in self._groups if group[0].family in SAID_ONCE]
        table = [
            f"| | {' | '.join(self._label(group) for group in columns)} |",
            f"|---|{':---:|' * len(columns)}",
        ]
        family = ""
        for row in self._groups:
            title = f"**{row[0].family}**: " if row[0].family != family else ""
            family = row[0].family
            table.append(f"| {title}{self._label(row)} | {' | '.join(self._cell(row, column) for column in columns)} |")
        others = self._others()
        three = [
            f"| {' + '.join(m.name for m in those)} | {', '.join(str(self._number(c)) for c in self._named(those))} |"
            for those in triples(self.mechanisms)
        ]
        listed = sorted(self._reasons.items(), key=lambda item: item[1])
        reasons = [f"{number}. {_sentence(reason)} *Instead*: {instead}" for (reason, instead), number in listed]
        needs = [
            f"- What {need.trait.value} needs a piece that {need.needed.value}: {need.reason} *Instead*: {need.instead}"
            for need in fit.NEEDS
        ]
        return _PAGE.format(
            table="\n".join(table),
            others="\n".join(others),
            three="\n".join(three),
            reasons="\n".join(reasons),
            needs="\n".join(needs),
            num_mechanisms=len(self.mechanisms),
            num_pairs=len(self._found),
            num_refused=sum(bool(found) for found in self._found.values()),
        )

    def _label(self, group: Sequence[Mechanism]) -> str:
        family = [mechanism for mechanism in self.mechanisms if mechanism.family == group[0].family]
        return f"any {group[0].family}" if len(group) == len(family) > 2 else " / ".join(m.name for m in group)

    def _cell(self, row: Sequence[Mechanism], column: Sequence[Mechanism]) -> str:
        asked = [frozenset((one, other)) for one in row for other in column if one.slot != other.slot]
        if not asked:
            return "–"
        numbers = {self._number(conflict) for pair in asked for conflict in self._found[pair]}
        return ", ".join(map(str, sorted(numbers))) if numbers else "yes"

    def _others(self) -> list[str]:
        """Return a line for every refusal that has no cell in the table."""
        lines = []
        for one, other in combinations(self._groups, 2):
            if not {one[0].family, other[0].family} & set(SAID_ONCE):
                cell = self._cell(one, other)
                if cell not in ("yes", "–"):
                    lines.append(
                        f"| {one[0].family}: {self._label(one)} | {other[0].family}: {self._label(other)} | {cell} |"
                    )
        return lines


def _sentence(text: str) -> str:
    """Return ``text`` with a capital, unless it begins with a key of the job."""
    return text if "." in text.split()[0] else f"{text[0].upper()}{text[1:]}"


_PAGE = """# What goes with what

<!-- Made by `make composition` from the rules in src/hansa/core/fit.py; a test compares it. -->

A job names an algorithm, what protects it, who takes part, and where it runs. Not everything goes with everything, and
what does not is refused before any site is contacted: nothing is left out quietly. `hansa check JOB` gives the same
reasons. This page lists {num_mechanisms} mechanisms and {num_pairs} pairs of them, of which {num_refused} are refused.

- **yes**: it runs, and `tests/test_composition.py` has compared the models of every round with the same federation done
  once more, naively, in NumPy. Two kinds of entries are judged here and run elsewhere: training code (`tests/recipes`,
  `tests/client`) and deployments (`tests/server`, `tests/test_secure_lab.py`, `tests/test_homomorphic_lab.py`).
- **a number**: it is refused, for the reason with that number below.
- **–**: a job has one of the two at most.

What is not listed is the base: FedAvg in the workflow `scatter-gather` over all sites, plain SGD, an adapter, one
process. A script that makes its own steps follows the settings of `[train]` as far as it looks at them.

## With what promises something

{table}

## All other refusals

| this | with this | reason |
|---|---|---|
{others}

## Three at a time

Any two of these go together; all three do not.

| together | reason |
|---|---|
{three}

## Reasons, and what to do

{reasons}

## What needs something else

{needs}

## What needs a number of sites

A round that asks fewer sites is refused before it begins: `median`, `trimmed-mean`, `geometric-median` and the bounded
`mean` need 2f + 1 updates where f sites may lie, `krum` and `multi-krum` 2f + 3; masks and encryption sum no fewer than
their `minimum`, 3 at least; a quorum that is a number needs that many. `cohort.sample` says how many are asked; with
`dp-ftrl` it is `separation`: one in so many sites.

## The order of filters

An update is clipped, then weighed, then encoded for the wire. Filters in another order are refused: a bound or a weight
applied later no longer holds for what is sent.
"""


if __name__ == "__main__":
    print(page(), end="")
