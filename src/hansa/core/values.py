# SPDX-License-Identifier: Apache-2.0
"""The five values of a federation: Model, Plan, Update, Aggregate, RoundRecord.

    Model ──plan──> Plan ──> site: train, filters ──> Update ──fold──> Aggregate ──step──> new Model
                                                                              └──> RoundRecord ──> sinks

All are frozen. An update carries named parts (``delta``, ``control``, ...), each a flat tree; parts are never
told apart by prefixes of tensor names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hansa.core import tree as trees
from hansa.core.tree import Array, Parts, Spec, Tree

Task = Literal["train", "evaluate"]

WEIGHT_SCALE = 1024.0
"""The public scale of weights: a site that trained on n examples sends w = n / WEIGHT_SCALE."""


@dataclass(frozen=True)
class Model:
    """The shared parameters after ``version`` server steps.

    Half-precision parameters are kept in float32 here, so that small steps are not rounded away; ``dtypes``
    remembers what each tensor is natively, and :meth:`native` gives that form, which is what travels.
    """

    version: int
    params: Tree
    dtypes: Mapping[str, str]

    @classmethod
    def start(cls, params: Tree) -> Model:
        """Return version 0 of a model that starts at ``params`` (native dtypes)."""
        dtypes = {name: spec.dtype for name, spec in trees.layout_of(params).items()}
        return cls(version=0, params=trees.widen(params), dtypes=dtypes)

    def native(self) -> Tree:
        """Return the parameters in their native dtypes; those of a large model are cast when they are read."""
        return trees.arrays(trees.cast(trees.lazily(self.params), self.dtypes))

    def advance(self, params: Tree) -> Model:
        """Return the next version, with ``params`` in place of the floating tensors it names."""
        return replace(self, version=self.version + 1, params={**self.params, **params})


@dataclass(frozen=True)
class Plan:
    """What the server asks of a site in one round.

    Attributes:
        job: the job's name.
        round: the round's number, from 1.
        task: ``train`` or ``evaluate``.
        version: the model version that ``params`` is.
        params: the shared parameters, in native dtypes.
        parts: what the strategy sends beside the model.
        seed: the job's seed; a site derives its own generators from (seed, round, site).
        inbox: a topic in the site's mailbox that holds the parameters, in place of ``params``.
        outbox: the topic under which the trained parameters are left there, in place of an update to the server.
        sealed: where sites are machines apart: the address of the file that has the inbox's message, sealed.
        deadline_s: how many seconds a site has from when it starts.
        acknowledged: site -> the last round whose update the server accepted from it; what the site remembers
            from later rounds is not used.
    """

    job: str
    round: int
    task: Task
    version: int
    params: Tree
    parts: Parts = field(default_factory=dict)
    seed: int = 0
    inbox: str | None = None
    outbox: str | None = None
    sealed: str | None = None
    deadline_s: float | None = None
    acknowledged: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """Part of one tensor: ``values`` are its flattened elements from ``start`` on."""

    part: str
    tensor: str
    start: int
    values: Array


Logged = Mapping[str, Sequence[tuple[int | None, float | None]]]
"""Numbers that a script logged: name -> (step, value), as they came; a value of None was NaN or infinite.

They are for people: nothing is computed from them. An update carries at most ``MAX_NAMES`` names (of up to
``MAX_NAME`` characters) with ``MAX_POINTS`` numbers each."""

MAX_NAMES, MAX_NAME, MAX_POINTS = 32, 100, 64


@dataclass(frozen=True)
class Header:
    """What is known of an update before its tensors are read.

    Attributes:
        site: who sent it.
        round: the round it answers.
        version: the model version that it started from.
        layout: dtype and shape of every tensor of every part.
        weight: n / scale, the factor its weighed parts were multiplied by.
        sums: what the metrics are computed from; the server adds them up over sites.
        completed: the share of the planned work that was done, in (0, 1].
        seconds: how long the site worked on it.
        logged: numbers that the site's script logged meanwhile.
    """

    site: str
    round: int
    version: int
    layout: Mapping[str, Mapping[str, Spec]]
    weight: float
    sums: Mapping[str, float]
    completed: float = 1.0
    seconds: float = 0.0
    logged: Logged = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of all parts."""
        return sum(spec.num_bytes for part in self.layout.values() for spec in part.values())


@dataclass(frozen=True)
class Update:
    """What one site returns for one plan: named parts, a weight, sums, and what its script logged."""

    site: str
    round: int
    version: int
    parts: Parts
    weight: float
    sums: Mapping[str, float]
    completed: float = 1.0
    seconds: float = 0.0
    logged: Logged = field(default_factory=dict)

    @property
    def header(self) -> Header:
        """Everything but the tensors."""
        layout = {part: trees.layout_of(tree) for part, tree in self.parts.items()}
        return Header(
            self.site,
            self.round,
            self.version,
            layout,
            self.weight,
            self.sums,
            self.completed,
            self.seconds,
            self.logged,
        )

    def chunks(self) -> Iterator[Chunk]:
        """Yield all tensors in canonical order, a block at a time."""
        for part in sorted(self.parts):
            leaves = trees.leaves(self.parts[part])
            for name in sorted(leaves):
                for start, values in trees.blocks(leaves[name]):
                    yield Chunk(part, name, start, values)

    def release(self) -> None:
        """Nothing to free: the arrays go with the object."""


@dataclass(frozen=True)
class Aggregate:
    """The sum of the accepted updates of one round.

    Attributes:
        sums: part -> tensor -> sum over sites, float32 (float64 for float64 tensors).
        weighed: part -> whether each site's share was multiplied by its weight.
        weight: the sum of weights.
        count: the number of updates, each counted with its staleness discount.
        population: the number of sites in the federation (N in the papers).
        metrics: the sums of the sites' metric sums.
        notes: what a robust rule has to say; its result stands here as the sum of one update.
    """

    sums: Parts
    weighed: Mapping[str, bool]
    weight: float
    count: float
    population: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def mean(self, part: str) -> Tree:
        """Return the mean of one part: over weight if it was weighed, else over the number of sites.

        Each leaf is computed when it is read; beside the sums no second model is held.
        """
        total = self.weight if self.weighed[part] else self.count
        sums = self.sums[part]
        return trees.Derived(sums.keys(), lambda name: trees.tensor(sums[name] / sums[name].dtype.type(total)))


@dataclass(frozen=True)
class Absence:
    """A site that was asked and is not in the sum, and why."""

    site: str
    kind: Literal["refused", "lost", "late", "rejected"]
    reason: str


RECORD_FORMAT = 1

TRAINING = "train_"
"""How the names of metrics of local training begin in a record; all others are of held-out data."""


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round, and the model, strategy state and acknowledgements it ended with.

    Attributes:
        asked: the sites of the cohort.
        accepted: those whose updates are in the sum.
        absent: those that are not, by name, with the reason.
        metrics: of the shared model; those of local training begin with ``train_``.
        site_metrics: the same, a site.
        notes: what the strategy has to say.
        bytes_down, bytes_up: tensor bytes sent to and received from all sites.
        seconds: wall-clock time.
        files: names in a checkpoint -> files that hold that already, while the record is being taken.
        logged: site -> numbers that its script logged in local training.
    """

    job: str
    round: int
    asked: tuple[str, ...]
    accepted: tuple[str, ...]
    absent: tuple[Absence, ...]
    metrics: Mapping[str, float]
    site_metrics: Mapping[str, Mapping[str, float]]
    notes: Mapping[str, Any]
    bytes_down: int
    bytes_up: int
    seconds: float
    model: Model
    state: Parts
    acknowledged: Mapping[str, int]
    files: Mapping[str, Path] = field(default_factory=dict)
    logged: Mapping[str, Logged] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the record without its tensors, as JSON types."""
        return {
            "format": RECORD_FORMAT,
            "job": self.job,
            "round": self.round,
            "version": self.model.version,
            "asked": list(self.asked),
            "accepted": list(self.accepted),
            "absent": [{"site": a.site, "kind": a.kind, "reason": a.reason} for a in self.absent],
            "metrics": dict(self.metrics),
            "site_metrics": {site: dict(values) for site, values in self.site_metrics.items()},
            "notes": dict(self.notes),
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "seconds": self.seconds,
            "logged": {
                site: {name: [list(point) for point in points] for name, points in logged.items()}
                for site, logged in self.logged.items()
            },
        }


@dataclass(frozen=True)
class Snapshot:
    """What a workflow goes on from: the state after ``round`` (0 before the first)."""

    round: int
    model: Model
    state: Parts
    acknowledged: Mapping[str, int] = field(default_factory=dict)
