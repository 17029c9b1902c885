# SPDX-License-Identifier: Apache-2.0
"""A dry run of a job at a site, without a server: would this site take part, and what would a round cost it?

The same policy, worker process and checks as under the agent, on the site's own data: the data are looked at, the
model is made, one local step is trained, and the update is checked as if it were to leave. Nothing leaves.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from hansa import bundle as bundles
from hansa.bundle import Bundle
from hansa.core import settle, wire
from hansa.core.config import Choice, Job
from hansa.core.values import WEIGHT_SCALE, Plan
from hansa.errors import PolicyError, SiteError
from hansa.pki.kit import Kit
from hansa.runs.baselines import course_form
from hansa.runs.masking import prepared
from hansa.site import policy
from hansa.site.settings import FILE, SiteSettings, load
from hansa.site.warm import WarmWorker, whole
from hansa.workers.messages import Absent, Answered, Initial, Inspect, Inspected, Perform
from hansa.workers.runner import SECURE, Course

UNSIGNED = "(nobody: not signed)"


@dataclass(frozen=True)
class Trial:
    """What a dry run found.

    Attributes:
        counts, labels: what the site would tell of its data.
        plan_bytes, update_bytes: what would travel in a round.
        seconds: of the one step, model and data loaded.
        peak_bytes: the largest process's memory at its peak; training scripts are processes too.
        examples: how many the update is weighed by.
    """

    job: str
    site: str
    signer: str
    counts: Mapping[str, int]
    labels: Mapping[str, int]
    plan_bytes: int
    update_bytes: int
    seconds: float
    peak_bytes: int
    examples: float


def read(directory: Path, job: Job | Path, signer: str | None) -> Bundle:
    """Return what is to be tried: a bundle's file, or a job that counts as signed by ``signer``.

    Raises:
        HansaError: the bundle's signature or form is wrong, or a file that the job names is missing.
    """
    kit = Kit(directory)
    if isinstance(job, Path):
        return bundles.read(job, kit.roster())
    return bundles.unsigned(prepared(job, kit.roster().sites), replace(kit.identity, name=signer or UNSIGNED))


async def attempt(directory: Path, source: Path | None, bundle: Bundle) -> Trial:
    """Try a job at the site in ``directory``.

    Args:
        directory: the site's folder.
        source: the bundle's file; None for a job whose files lie where they are.
        bundle: what `read` returned.

    Raises:
        PolicyError: the site would refuse the job, and why.
        SiteError: it could not do it, and why.
    """
    site = Kit(directory).identity.name
    settings = load(directory / FILE)
    policy.decide(bundle, site, settings)
    with tempfile.TemporaryDirectory(prefix="hansa-check-") as folder:
        place = Path(folder)
        job = bundle.job
        if source is not None:
            (place / "files").mkdir()
            job = await whole(lambda: bundles.unpack(source, bundle, place / "files"))
        job = policy.localised(job, site, settings, directory)
        job = job.model_copy(update={"train": job.train.model_copy(update={"steps": 1, "epochs": None})})
        (place / "work").mkdir()
        worker = WarmWorker(site, settings, place, lambda: place / SECURE)
        try:
            return await _tried(worker, job, site, settings, bundle.signer.name, place)
        finally:
            await worker.close(at_once=False)


async def _tried(worker: WarmWorker, job: Job, site: str, settings: SiteSettings, signer: str, place: Path) -> Trial:
    told = await worker.ask(job, lambda ticket, threads: Inspect(ticket, threads, site))
    assert isinstance(told, Inspected), told
    first, planned, out = (place / f"{name}.hansa" for name in ("initial", "plan", "update"))
    await worker.ask(job, lambda ticket, threads: Initial(ticket, threads, str(first)))
    plan = await whole(lambda: _plan(job, first, planned))
    policy.check_size(planned.stat().st_size, settings.policy.max_model_bytes)
    form = msgspec.structs.replace(course_form(job, job.name, "train", site), secure=None)  # it leaves for nowhere
    limit = settings.policy.max_task_s
    try:
        async with asyncio.timeout(limit):
            answer = await worker.ask(job, lambda ticket, n: Perform(ticket, form, str(planned), site, n, str(out)))
    except TimeoutError:
        raise PolicyError(f"One step took longer than the {limit:g} s that this site allows for a round.") from None
    if isinstance(answer, Absent):
        raise SiteError(answer.reason, site=site)
    assert isinstance(answer, Answered), answer
    with out.open("rb") as file:
        size = out.stat().st_size
        await whole(lambda: policy.check_update(file, size, plan, job, site, settings.policy))
    await worker.close(at_once=False)
    unit = 1 if sys.platform == "darwin" else 1024
    return Trial(
        job=job.name,
        site=site,
        signer=signer,
        counts=told.counts,
        labels=told.labels,
        plan_bytes=planned.stat().st_size,
        update_bytes=out.stat().st_size,
        seconds=answer.seconds,
        peak_bytes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
        examples=answer.weight * WEIGHT_SCALE,
    )


def _plan(job: Job, first: Path, planned: Path) -> Plan:
    """Write the plan of the first round, as the server would."""
    strategy, _ = Course(job.name, (), Choice.model_validate(job.strategy)).pieces()
    params = wire.open_parts(first)[1]["params"]
    model, state = settle.start(strategy, params, planned.parent)
    plan = Plan(job.name, 1, "train", model.version, model.native(), strategy.sent(state), job.seed)
    with planned.open("wb") as file:
        wire.write_plan(file, plan)
    return plan
