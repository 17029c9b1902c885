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
    yield Mechanism("engine", "a deployment", {}, "engine", frozenset({Trait.UNPEERED}))
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
