# SPDX-License-Identifier: Apache-2.0
"""What a server, its sites and its users say to each other.

Every request is a struct that names its reply. They are msgpack inside gRPC methods called ``/hansa.Federation/NAME``;
what is large travels as a file in pieces (:mod:`hansa.transport.pieces`) over a lane (:mod:`hansa.transport.lane`).

    site ── Attend ──> server ── Ring, Ring, ... (the doorbell)      site ── Poll ──> Ring (where a proxy cuts streams)
    a stream's Ring brings the Agenda: all that is open for the site; the whole truth each time, so that no message can
    get lost; where it brings none, or the site can't tell what is newer:    site ── AskAgenda ──> Agenda
    site ── Get: bundle, plan   Report: what it is at   Offer: update   Answer ──> server

All calls are idempotent: sent again after a broken connection, they change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

import msgspec

from hansa.core.ports import MailPhase, Phase

PROTOCOL = 3
"""Both ends must speak the same; a release that changes a message's meaning raises it."""

SERVICE = "hansa.Federation"

INLINE_BYTES = (1 << 20) + (1 << 16)
"""Plans and updates up to this size (1 MiB and a header) travel inside messages, larger ones as files in pieces."""

MAX_RANGES = 1 << 14
"""How many ranges of pieces one Get names; a client asks again for what lies beyond."""

PHASES: frozenset[str] = frozenset(get_args(Phase))
"""The kinds of tasks that are messages of secure aggregation or homomorphic encryption."""

MAIL: frozenset[str] = frozenset(get_args(MailPhase))
"""The kinds of tasks that are about messages between sites."""

LETTERS = PHASES | {"address"}
"""The kinds of tasks that are answered by a letter."""

MAX_ACTIVITIES = 1024
"""How many tasks one Report tells of."""

Text = Annotated[str, msgspec.Meta(max_length=4096)]
Label = Annotated[str, msgspec.Meta(max_length=200)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """Anything that is said."""


class Done(Message):
    """The reply to what has no other."""


# Sites


class Assignment(Message):
    """One thing that a site is to do.

    Attributes:
        task: its name, unique for the site.
        job: the job's id at the server.
        bundle: the manifest of the job's signed bundle.
        kind: ``inspect`` is to check the job against site policy and data; ``train`` and ``evaluate`` carry a plan out;
            one of ``PHASES`` answers a message of a secret sum; ``address`` asks for the address that a peer's message
            is to be sealed for, ``post`` for this site's message, sealed (:class:`Posting`).
        course: the job's name, or that of one of its baselines.
        round: the round's number (0 for ``inspect``).
        plan: the manifest of the file with the plan, or with the message; empty for ``inspect``.
        inline: that file itself where it is small.
    """

    task: Label
    job: Label
    bundle: Digest
    kind: Literal["inspect", "train", "evaluate"] | Phase | MailPhase
    course: Label
    round: Count
    plan: str
    inline: bytes


class Posting(Message):
    """What a task to ``post`` says, as its plan: whom this site's message of the round is for.

    Attributes:
        recipient: a site; or the server, which gets the message as it is.
        address: the site's, as :func:`hansa.pki.sealed.address` made it.
    """

    recipient: Label
    address: Annotated[bytes, msgspec.Meta(max_length=1 << 17)]


class Agenda(Message):
    """All that is open for a site: what is missing here is to be stopped.

    Attributes:
        sequence: of the last Ring that it takes in.
        jobs: ids of the jobs that are under way; a site forgets others.
        assignments: what it has not answered yet.
    """

    sequence: Count
    jobs: list[Label]
    assignments: list[Assignment]

    @property
    def shown(self) -> tuple[list[str], list[str]]:
        """The jobs and tasks in it: where these are the same twice, there was no news."""
        return self.jobs, [given.task for given in self.assignments]


class Ring(Message):
    """There is news, or a sign of life if ``sequence`` is the last one's.

    Attributes:
        sequence: rises with each piece of news for this site; starts anew when the server does.
        roster: the version of the server's roster.
        lease_s: a site that is not heard from for so long counts as gone.
        agenda: the news itself, in a stream; plans that came over the same stream before are not sent again.
    """

    sequence: Count
    roster: Count
    lease_s: Seconds
    agenda: Agenda | None = None


class Attend(Message):
    """Open the doorbell (a stream of Ring)."""

    protocol: Count
    release: Label


class Poll(Message):
    """Wait for a Ring after ``since``, at most ``wait_s``; in place of the stream."""

    reply: ClassVar[type[Message]] = Ring
    protocol: Count
    release: Label
    since: Count
    wait_s: Seconds


class AskAgenda(Message):
    """Ask for the agenda; ``have`` names tasks whose plans need not be sent inline again."""

    reply: ClassVar[type[Message]] = Agenda
    have: list[Label]


class Activity(Message):
    """What a site is at: ``seconds`` since it began with ``task``; it holds the deadline against its own time.

    ``why`` is what a task waits for that the site has not begun with.
    """

    task: Label
    phase: Literal["waiting", "receiving", "working", "sending"]
    seconds: Seconds
    why: Label = ""


class Report(Message):
    """A sign of life from a site, with what it is at."""

    reply: ClassVar[type[Message]] = Done
    activities: Annotated[list[Activity], msgspec.Meta(max_length=MAX_ACTIVITIES)]


class Missing(Message):
    """Why there is no update."""

    kind: Literal["refused", "lost", "late", "rejected"]
    reason: Text


class Inspected(Message):
    """What a site tells of its data: counts and label histograms."""

    counts: dict[str, Count]
    labels: dict[str, Count]


class Answer(Message):
    """What became of a task; it is durable when the reply comes. Exactly one field after ``task`` is given.

    Attributes:
        inline: the update's file, where it is small.
        upload: the manifest of the update's file, which was uploaded before.
        missing: there is no update.
        inspected: the answer to ``inspect``.
        letter: the answer to a message of a secret sum, or this site's address.
    """

    reply: ClassVar[type[Message]] = Done
    job: Label
    task: Label
    inline: bytes | None = None
    upload: Digest | None = None
    missing: Missing | None = None
    inspected: Inspected | None = None
    letter: Annotated[bytes, msgspec.Meta(max_length=INLINE_BYTES)] | None = None


class RosterText(Message):
    """The signed roster, as its authority wrote it."""

    text: bytes


class AskRoster(Message):
    """Ask for the server's roster."""

    reply: ClassVar[type[Message]] = RosterText


class OfferRoster(Message):
    """Bring the server a roster. It takes a newer one from anybody: only the authority can have signed it."""

    reply: ClassVar[type[Message]] = Done
    text: bytes


# Files


class Get(Message, tag=True):
    """Ask for a file's pieces, or for its manifest if ``ranges`` is None.

    Attributes:
        job: the job that the file belongs to, which is what access is decided by; a digest opens nothing.
        digest: the file's manifest.
        ranges: half-open ranges of indices of pieces, ascending.
    """

    job: Label
    digest: Digest
    ranges: Annotated[list[tuple[Count, Count]], msgspec.Meta(max_length=MAX_RANGES)] | None = None


class Offer(Message, tag=True):
    """Begin an upload: what for, and the manifest's address and length; manifest and wanted pieces follow.

    Attributes:
        job: the job, empty for a new job's bundle.
        task: the task that the file answers, or ``bundle``.
    """

    job: Annotated[str, msgspec.Meta(max_length=200)]
    task: Label
    digest: Digest
    manifest_bytes: Count


class Wanted(Message):
    """Which pieces of an offered file are still to be sent, as half-open ranges of indices."""

    ranges: list[tuple[Count, Count]]


# Users


class Submitted(Message):
    """The new job's id."""

    job: Label


class Submit(Message):
    """Start a job from an uploaded bundle. Sent twice with the same key, it is one job."""

    reply: ClassVar[type[Message]] = Submitted
    bundle: Digest
    key: Label


class JobLine(Message):
    """A job in a list.

    Attributes:
        state: queued, running, finished, failed, aborted.
        error: why it failed, with what to do.
        kind: the name of that error's class in :mod:`hansa.errors`, or of a defect's.
        created, started, ended: ISO 8601, UTC; empty where it has not happened.
    """

    job: Label
    name: Label
    submitter: Label
    state: Label
    rounds: Count
    round: Count
    error: str
    kind: Label
    created: str
    started: str
    ended: str


class JobLines(Message):
    """Jobs, oldest first."""

    jobs: list[JobLine]


class ListJobs(Message):
    """Ask for the jobs one may see."""

    reply: ClassVar[type[Message]] = JobLines


class JobView(Message):
    """Everything known of one job.

    Attributes:
        line: as in the list.
        document: the resolved job.
        records: a record a finished round (``RoundRecord.as_json``).
        sites: what each site said to the job: ``ready``, or the reason why not.
        activities: site -> what it is at now.
        files: results: name -> [manifest, bytes].
    """

    line: JobLine
    document: dict[str, Any]
    records: list[dict[str, Any]]
    sites: dict[str, str]
    activities: dict[str, str]
    files: dict[str, tuple[str, int]]


class ShowJob(Message):
    """Ask for everything known of one job."""

    reply: ClassVar[type[Message]] = JobView
    job: Label


class JobEvent(Message):
    """One line of a job's log: what happened, when (ISO 8601, UTC)."""

    number: Count
    time: str
    kind: Label
    text: str


class Follow(Message):
    """Ask for a job's log from line ``after`` on (a stream of JobEvent); it ends with the job if ``wait``."""

    job: Label
    after: Count
    wait: bool


class AbortJob(Message):
    """Stop a job; finished rounds stay."""

    reply: ClassVar[type[Message]] = Done
    job: Label


class WithdrawSite(Message):
    """Take a site out of a job for good: it is not asked any more, and the others go on. For its own admin."""

    reply: ClassVar[type[Message]] = Done
    job: Label
    site: Label


class ResumeJob(Message):
    """Go on with a failed or aborted job."""

    reply: ClassVar[type[Message]] = Done
    job: Label


class DeleteJob(Message):
    """Delete a job that is not under way, with all its files."""

    reply: ClassVar[type[Message]] = Done
    job: Label


class SiteLine(Message):
    """A site in a list.

    Attributes:
        state: connected, or gone.
        seconds: since it was last heard from; None if it never was.
        release: the Hansa release it runs.
        activities: what it is at.
    """

    site: Label
    state: Label
    seconds: float | None
    release: str
    activities: list[str]


class SiteLines(Message):
    """The sites of the roster, by name."""

    sites: list[SiteLine]


class ListSites(Message):
    """Ask for the sites."""

    reply: ClassVar[type[Message]] = SiteLines


class Problem(Message):
    """An error as it travels: the class's name in :mod:`hansa.errors`, and its fields."""

    error: str
    message: str
    job: str | None = None
    site: str | None = None
    round: int | None = None


CALLS: tuple[type[Message], ...] = (
    Poll,
    AskAgenda,
    Report,
    Answer,
    AskRoster,
    Submit,
    ListJobs,
    ShowJob,
    AbortJob,
    WithdrawSite,
    ResumeJob,
    DeleteJob,
    ListSites,
)
"""Requests with one reply each; Attend, Follow, Download (Get) and Upload (Offer) are streams.

OfferRoster stands apart: it is the one call of a caller whom the server's roster does not list yet."""
