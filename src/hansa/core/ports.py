# SPDX-License-Identifier: Apache-2.0
"""The seams through which a workflow reaches the world, and what runs at a site.

A workflow sees a :class:`Cohort` (and, where sites talk among themselves, :class:`Peers`), never an engine or a
server, so it can't tell a simulation from a deployment. A :class:`Program` is the training code at a site.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from hansa.core.fit import Trait
from hansa.core.strategy import Steps
from hansa.core.tree import Parts, Tree
from hansa.core.values import Absence, Chunk, Header, Logged, Plan


@runtime_checkable
class Handle(Protocol):
    """An update that can be read a chunk at a time, more than once, and is freed by ``release``."""

    @property
    def header(self) -> Header:
        """Everything but the tensors."""
        ...

    @property
    def parts(self) -> Parts:
        """All tensors, in this process or read from a file when they are asked for."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """Yield all tensors in canonical order."""
        ...

    def release(self) -> None:
        """Free what holds the tensors."""
        ...


Reply = Handle | Absence


MaskPhase = Literal["advertise", "share", "receive", "vote", "reveal", "finish"]
"""What a message of secure aggregation asks of a site."""

KeyPhase = Literal["offer", "accept", "open", "finish"]
"""What a message of homomorphic encryption asks of a site."""

Phase = Literal[MaskPhase, KeyPhase]
"""Any of them."""

MailPhase = Literal["address", "post"]
"""What a site is asked for a peer: the key that messages to it are sealed with; its own message, sealed."""


class SecureLine(Protocol):
    """The way of the messages of secret sums between a workflow and the sites: by masks, or encrypted."""

    @property
    def checker(self) -> Any:
        """Whose signatures count (:class:`hansa.secagg.protocol.Checker`)."""
        ...

    @property
    def scope(self) -> str:
        """What the names of courses are preceded by in sessions, so that no two jobs have the same."""
        ...

    async def attempts(self, plan: Plan) -> int:
        """Return how often sites may have been asked for keys to answer ``plan`` with, as far as is known here."""
        ...

    async def exchange(self, plan: Plan, phase: Phase, letters: Mapping[str, bytes]) -> dict[str, bytes | Absence]:
        """Send each site its message of the session in which ``plan`` is answered, and return what each answered.

        With an ``advertise`` or ``accept`` that differs from the one before, answers to ``plan`` so far are worth
        nothing.
        """
        ...


class Cohort(Protocol):
    """The sites of a federation, as a workflow sees them."""

    @property
    def sites(self) -> Sequence[str]:
        """All sites, sorted by name."""
        ...

    def ask(self, plan: Plan, sites: Sequence[str]) -> AsyncIterator[Reply]:
        """Send ``plan`` to ``sites`` and yield one reply for each, as they come.

        A site that overruns the plan's deadline is an absence of kind ``late``.
        """
        ...

    def late(self, round: int) -> Sequence[Handle]:
        """Return the updates that came after their deadline, for ``round`` to use; no other round gets them.

        Headers tell which round they were asked for in.
        """
        ...

    @property
    def secure(self) -> SecureLine | None:
        """How messages of secure aggregation reach the sites; None where they don't.

        A simulation has none for a course whose sites are not to mask what they send.
        """
        ...

    async def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn metric sums, of one site or of many, into metrics."""
        ...


class Peers(Protocol):
    """Mailboxes between the nodes of a federation; the server is the node called :data:`SERVER`.

    A node has one message a round: a site makes it by a plan with an ``outbox``, the server by :meth:`put`. It stays
    with the node that made it until the round is over, and can be sent to one peer after the other. The workflow says
    who sends to whom, and sees the contents of what is sent to the server only.
    """

    async def put(self, plan: Plan, parts: Parts) -> None:
        """Let ``parts`` be the server's message of the plan's course and round."""
        ...

    async def send(self, plan: Plan, sender: str, recipient: str) -> Absence | None:
        """Have the message of ``sender`` brought to ``recipient``; sent already, nothing happens.

        Returns:
            None, or why it could not be: the absence of whichever of the two failed.
        """
        ...

    async def take(self, plan: Plan, sender: str) -> Parts:
        """Return what ``sender`` has sent to the server."""
        ...


SERVER = "@server"
"""The server's name as a node among peers."""

EVERYONE = "@everyone"
"""The name under which a program trains on all sites' data in one place; for comparisons in simulation only."""


def topic(job: str, sender: str) -> str:
    """Return the topic of the message of ``sender``, in its own mailbox and in those of its peers.

    It is the same in every round, so a mailbox holds no more than each sender's last message.
    """
    return f"{job}.{sender}"


Adjust = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Correction:
    """What a strategy does to the gradient before each local step: ``grads = adjust(context, params, grads)``.

    ``context`` holds NumPy trees; a trainer converts them to its own arrays once, before the first step.
    """

    context: Parts
    adjust: Adjust


@dataclass(frozen=True)
class Work:
    """What local training returns.

    Attributes:
        params: the trained parameters, all tensors of the plan's ``params``; they stay as they are until the update
            has been read, at the latest until the program is called again.
        num_examples: n, what the update is weighed by (trained tokens for a language model).
        steps: how many steps were made, and their learning rates' sum.
        sums: what metrics are computed from; they are added over sites, then given to ``summarise``.
        completed: the share of the planned work done, in (0, 1].
        logged: numbers for people, logged meanwhile.
    """

    params: Tree
    num_examples: float
    steps: Steps
    sums: Mapping[str, float]
    completed: float = 1.0
    logged: Logged = field(default_factory=dict)


@dataclass(frozen=True)
class SiteReport:
    """What a site tells of its data before training: counts and label histograms, no contents."""

    site: str
    counts: Mapping[str, int]
    labels: Mapping[str, int] = field(default_factory=dict)


class Program(Protocol):
    """The training code of a job, as an engine sees it. It may keep models and data loaded between calls."""

    @property
    def traits(self) -> frozenset[Trait]:
        """What the fit check needs to know."""
        ...

    @property
    def sites(self) -> Sequence[str]:
        """The names of all sites, sorted; ``train`` also takes :data:`EVERYONE` where the data allow it."""
        ...

    def initial(self) -> Tree:
        """Return the shared parameters that training starts from, in native dtypes."""
        ...

    def inspect(self, site: str) -> SiteReport:
        """Load the site's data and check them against the job.

        Raises:
            DataError: a file or column is missing, a label is not in the map, the site has no examples.
        """
        ...

    def train(self, site: str, plan: Plan, correction: Correction | None) -> Work:
        """Train from ``plan.params`` on the site's data."""
        ...

    def evaluate(self, site: str, plan: Plan) -> Mapping[str, float]:
        """Return sums over the site's held-out data for ``plan.params``."""
        ...

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn sums, of one site or of many, into metrics (``loss``, ``perplexity``, ``f1``, ...)."""
        ...

    def export(self, params: Tree, directory: Path) -> None:
        """Write a model that has ``params`` to ``directory``, in the form users of its library expect."""
        ...

    def show(self, params: Tree) -> Mapping[str, str]:
        """Return something to look at, prompt -> what a model with ``params`` makes of it; or nothing."""
        ...

    def close(self) -> None:
        """End processes and free what was loaded."""
        ...
