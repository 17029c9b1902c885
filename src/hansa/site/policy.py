# SPDX-License-Identifier: Apache-2.0
"""What a site allows, decided at the site: before a job's first byte of code runs, for every plan, and for every
update before it leaves.

| case | result |
|---|---|
| a recipe that is not allowed; code of one's own by a signer who is not | PolicyError |
| the data's name is not among the site's, or the job names paths | PolicyError that lists the names |
| too many rounds or threads, too large a model, a filter missing or too weak | PolicyError |
| a mechanism of privacy missing or too weak; data under a budget, and a job that goes around it | PolicyError |
| no secure aggregation, or of fewer sites than the site's least; code of one's own under it, beside a bound to prove |
PolicyError |
| sites hand the model to each other, and the job does not name them | PolicyError: its quorum would hold nobody |
| a key of homomorphic encryption that is not with a site that this one trusts | PolicyError |
| a session of secure aggregation for another round, or of other sites than the job's sampling draws | PolicyError |
| the site's plug-in gives a reason, or fails | PolicyError with that reason: a site is closed when in doubt |
| a plan of another job, round, task or seed than announced, or one that leads to other sites' mailboxes | PolicyError |
| a plan of a round that the job does not have | PolicyError |
| an update under [privacy] that has metrics beside it, or is longer than the noise is made for | PolicyError |
| an update of another form than the plan implies, not finite, or not bounded as required | PolicyError; it stays here |

What is checked of an update holds whatever the training code did. What its values say is not checked: who may run
code at a site (``signers``) can put anything into an update's numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hansa import registry
from hansa.bundle import Bundle, check_code, in_folder, localised_model
from hansa.core import tree as trees
from hansa.core import wire
from hansa.core.config import Job, PrivacySection
from hansa.core.ports import topic
from hansa.core.tree import Layout
from hansa.core.values import Header, Plan, Task
from hansa.errors import HansaError, PolicyError, nearest
from hansa.homomorphic.protocol import Terms as KeyTerms
from hansa.privacy.plan import SLACK
from hansa.runs.pieces import check_named, relays
from hansa.secagg.protocol import Terms as MaskTerms
from hansa.site.settings import DataPaths, Policy, SiteSettings
from hansa.transport.messages import Assignment
from hansa.workers.runner import num_threads
from hansa.workflows.scatter_gather import sample

PLACE = "site"

SCHEME = "site:"
"""How ``data.train`` of a job begins when it names what each site calls its data."""

ROUNDING = 1 + 2**-7
"""By how much a norm may exceed its bound: weights and half precision round after a filter has clipped."""

_METRICS = 1000
_DIGEST = re.compile("[0-9a-f]{64}")


def decide(bundle: Bundle, site: str, settings: SiteSettings) -> None:
    """Raise PolicyError unless ``site`` takes part in the job.

    Raises:
        PolicyError: what is not allowed, and what would be.
    """
    policy, job = settings.policy, bundle.job
    recipes = sorted(registry.TABLES["recipes"]) if policy.recipes is None else policy.recipes
    if job.recipe.name not in recipes:
        raise PolicyError(
            f"Recipe {job.recipe.name!r} is not allowed at this site; it allows: {', '.join(recipes) or 'none'}."
        )
    installed = dict.fromkeys(("strategy", "workflow", "partition", "filters"), policy.modules)
    own = [name for name in policy.recipes or () if name != "script"]
    check_code(bundle.code, bundle.signer, policy.signers, {**installed, "recipe": own}, PLACE)
    if policy.max_rounds is not None and job.rounds > policy.max_rounds:
        raise PolicyError(f"The job has {job.rounds} rounds; this site allows {policy.max_rounds}.")
    threads, cpus = num_threads(job.engine, site), settings.resources.cpus
    if cpus is not None and threads > cpus:
        raise PolicyError(
            f"The job trains with {threads} CPU threads; this site gives {cpus}. Set engine.threads, or "
            f"engine.sites.{site}.cpus."
        )
    check_named(job)
    _require_filters(job, policy)
    _require_privacy(job, settings)
    _require_masks(bundle, settings)
    if policy.plugin is not None:
        _ask_plugin(policy.plugin, bundle)


def _require_filters(job: Job, policy: Policy) -> None:
    chosen = {item.name: item.options for item in job.filters}
    for name, bounds in policy.require_filters.items():
        if name not in chosen:
            raise PolicyError(f"This site takes part only in jobs with the filter {name!r}.")
        for option, bound in bounds.items():
            value = chosen[name].get(option)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value <= bound:
                raise PolicyError(f"filters.{name}.{option} is {value}; this site accepts at most {bound:g}.")
    if policy.require_filters and job.baselines.local:
        raise PolicyError(
            "baselines.local sends updates without filters, and this site requires "
            f"{', '.join(policy.require_filters)}. Set baselines.local = false."
        )


def _require_privacy(job: Job, settings: SiteSettings) -> None:
    rules, data = settings.privacy, trained_on(job)
    mechanism = None if job.privacy is None else job.privacy.mechanism
    shown = "no [privacy]" if mechanism is None else f"privacy.mechanism = {mechanism!r}"
    if rules.require is not None and mechanism not in rules.require:
        raise PolicyError(f"The job has {shown}; this site takes part with: {', '.join(rules.require) or 'none'}.")
    if rules.budgets and data is None:
        raise PolicyError(
            "This site keeps privacy budgets of its data, and the job does not say what it trains on. Write data.train "
            "= 'site:NAME'."
        )
    budget = rules.budgets.get(data or "")
    if budget is not None:
        enough = _HIDES[budget.unit] & _HIDES[budget.adversary]
        if mechanism not in enough:
            raise PolicyError(
                f"The job has {shown}, and {data!r} has a privacy budget for one {budget.unit} against the "
                f"{budget.adversary}. Use one of: {', '.join(sorted(enough))}."
            )
    if budget is None and rules.require is None:
        return
    if (piece := foreign(job)) is not None:
        raise PolicyError(f"This site checks what a job promises, so {piece[1]!r} may not be among its {piece[0]}.")
    if job.baselines.local:
        raise PolicyError("baselines.local sends what no noise hides. Set baselines.local = false.")


def foreign(job: Job) -> tuple[str, str] | None:
    """Return the family and name of a piece of a job that is not Hansa's own, its training code apart, or None."""
    own = {"strategies": [job.strategy.name], "filters": [item.name for item in job.filters]}
    for family, names in {**own, "workflows": [job.workflow.name]}.items():
        for name in names:
            if name not in registry.TABLES[family]:
                return family, name
    return None


def _require_masks(bundle: Bundle, settings: SiteSettings) -> None:
    job, least = bundle.job, settings.privacy.summed_with
    masks, encrypted = job.secret_sums, job.homomorphic_encryption
    if least is not None and (masks is None or masks.minimum < least):
        family = "secure_aggregation" if encrypted is None else "homomorphic_encryption"
        off = "no [secure_aggregation]" if job.secure_aggregation is None else "secure_aggregation off"
        shown = off if masks is None else f"{family}.minimum = {masks.minimum}"
        raise PolicyError(f"The job has {shown}; this site's updates are summed with others, at least {least} in all.")
    if masks is None:
        return
    if job.strategy.name not in registry.TABLES["strategies"]:
        raise PolicyError(
            f"What {job.strategy.name!r} sums is known to its own code only, so this site can't hold the server to the "
            "terms of a secret sum. Use a strategy of Hansa's."
        )
    trusted = settings.privacy.key_sites
    if encrypted is not None and trusted is not None and encrypted.key_site not in trusted:
        raise PolicyError(
            f"The job has homomorphic_encryption.key_site = {encrypted.key_site or 'none named'}; this site trusts "
            f"with the key: {', '.join(trusted) or 'nobody'}."
        )
    proved = sorted(settings.policy.require_filters.keys() & _PROOFS.keys())
    if proved and bundle.code:
        raise PolicyError(
            f"This site requires the filter {proved[0]!r}; a masked or encrypted update does not show that it was "
            "applied, and the job brings code of its own that could go around it. Leave the code out, or set "
            "secure_aggregation = false."
        )
    budget = settings.privacy.budgets.get(trained_on(job) or "")
    if budget is not None and job.privacy is not None and job.privacy.mechanism == "dp-sgd":
        raise PolicyError(
            "The data's privacy budget is held against the examples that an update was made from, and in a secret sum "
            "their number does not show. Use privacy.mechanism 'local' or 'central', or secure_aggregation = false."
        )


def check_session(proposed: MaskTerms | KeyTerms, job: Job, given: Assignment) -> Task:
    """Check a session that a server begins, beside what its terms are held to, and return what it is to be for.

    Where the signed job names its sites and draws them for all to see, the server has no say in whom to ask.

    Raises:
        PolicyError: it is of another round, or of others than those sites.
    """
    number, judged = divmod(proposed.round, 2)
    if number != given.round or number not in rounds(job, given.course):
        raise PolicyError(
            f"The server announced round {given.round} of {given.course!r}, and begins session {proposed.round} of "
            "secret sums, which is another's."
        )
    signed = job.cohort.sites
    in_secret = job.privacy is not None and job.privacy.mechanism in ("central", "dp-ftrl")
    if signed is not None and (judged or not in_secret):
        asked = tuple(sorted(signed)) if judged else sample(sorted(signed), job.cohort.sample, job.seed, number)
        if proposed.sites != asked:
            raise PolicyError(
                f"The server asks {', '.join(proposed.sites)[:200]} for a sum; the signed job has it ask "
                f"{', '.join(asked)[:200]}."
            )
    return "evaluate" if judged else "train"


def check_hidden(path: Path, plan: Plan, site: str, layout: Mapping[str, Layout] | None) -> None:
    """Raise PolicyError unless a finished update is masked or encrypted, as ``layout`` says, and nothing stands beside.

    Bounds on norms can't be read from it: :func:`decide` has seen to it that only Hansa's own code was to keep them.
    """
    header = wire.Spooled(path).header
    said = (header.site, header.round, header.version, header.weight, header.sums, header.logged, header.layout)
    room = header.num_bytes + header.num_bytes // 1000 + (1 << 16)
    if said != (site, plan.round, plan.version, 1.0, {}, {}, layout) or path.stat().st_size > room:
        raise PolicyError("The training code made something else than a masked or encrypted update. It was not sent.")


_HIDES: Mapping[str, frozenset[str]] = {
    "example": frozenset({"central", "local", "dp-sgd", "dp-ftrl", "distributed"}),
    "user": frozenset({"central", "local", "dp-ftrl", "distributed"}),
    "server": frozenset({"local", "dp-sgd", "distributed"}),
    "server-and-corrupt": frozenset({"local", "dp-sgd", "distributed"}),
    "sites": frozenset({"central", "local", "dp-sgd", "dp-ftrl", "distributed"}),
}
"""Mechanisms by the unit that they hide, and by the adversary that they hide it from."""


def trained_on(job: Job) -> str | None:
    """Return the name of the site's data that a signed job trains on, or None if it gives none."""
    train = None if job.data is None else job.data.train
    return train.removeprefix(SCHEME) if isinstance(train, str) and train.startswith(SCHEME) else None


def _ask_plugin(target: str, bundle: Bundle) -> None:
    try:
        reason = registry.load_object(target)(bundle)
    except HansaError as error:
        raise PolicyError(f"The site's plug-in {target!r} could not be asked: {error.message}") from error
    except Exception as error:
        raise PolicyError(f"The site's plug-in {target!r} failed: {type(error).__name__}: {error}") from error
    if reason is not None:
        raise PolicyError(f"The site's plug-in {target!r} decided against the job: {reason}")


def check_size(num_bytes: int, most: int | None, what: str = "model") -> None:
    """Raise PolicyError if a plan or bundle of ``num_bytes`` is larger than ``most``."""
    if most is not None and num_bytes > most:
        raise PolicyError(f"The {what} has {num_bytes:,} bytes; this site allows {most:,}.")


def check_plan(plan: Plan, job: Job, given: Assignment, site: str) -> None:
    """Raise PolicyError if a plan to ``site`` is not what it was announced as, or not of the job that was signed."""
    found = (plan.job, plan.round, plan.task)
    if found != (given.course, given.round, given.kind):
        raise PolicyError(
            f"The server announced {given.kind}, round {given.round} of {given.course!r}, and sent a plan to "
            f"{plan.task}, round {plan.round} of {plan.job[:100]!r}."
        )
    if plan.seed != job.seed:
        raise PolicyError(f"The plan has the seed {plan.seed}; the job was signed with {job.seed}.")
    if plan.round not in rounds(job, plan.job):
        raise PolicyError(
            f"The plan is of round {plan.round} of {plan.job[:100]!r}; the job was signed with {job.rounds} rounds."
        )
    mail = (plan.inbox, plan.outbox, plan.sealed)
    if plan.task == "train" and plan.job == job.name and relays(job):
        if plan.outbox != topic(plan.job, site):
            raise PolicyError("The server asks for an update; by the signed job the model goes from site to site.")
        if (plan.inbox is None) != (plan.sealed is None) or not _DIGEST.fullmatch(plan.sealed or "0" * 64):
            raise PolicyError("The plan names a message of another site, and not the file that it comes in.")
    elif mail != (None, None, None):
        raise PolicyError("The plan hands the model from site to site, which the signed job does not.")


def rounds(job: Job, course: str) -> range:
    """Return the numbers of a course's rounds."""
    return range(1) if course == "base" != job.name else range(1, job.rounds + 1)


def check_update(source: wire.Source, num_bytes: int, plan: Plan, job: Job, site: str, policy: Policy) -> None:
    """Read a finished update once, from its beginning to its end, and raise PolicyError unless it may leave.

    Args:
        source: the update, as it would be sent.
        num_bytes: how many bytes it has.
        plan: what it answers.
        job: the job that was signed.
        site: this site's name.
        policy: what the site requires.
    """
    envelope = wire.read_envelope(source)
    header = wire.header_of(envelope)
    if (header.site, header.round, header.version) != (site, plan.round, plan.version):
        raise PolicyError("The training code made an update of another site, round or version than was asked for.")
    if not (0 < header.weight < math.inf and len(header.sums) <= _METRICS):
        raise PolicyError(f"The update has the weight {header.weight:g} and {len(header.sums)} metrics' sums.")
    _check_form(header, num_bytes, plan)
    squares = dict.fromkeys(header.layout, 0.0)
    for chunk in wire.read_chunks(source, envelope):
        if trees.is_floating(chunk.values.dtype):
            values = chunk.values.astype(trees.wide(chunk.values.dtype), copy=False)
            with np.errstate(over="ignore", invalid="ignore"):
                square = float(np.dot(values, values))
            if not math.isfinite(square):  # not finite, or too large for float32
                if not trees.finite(values):
                    raise PolicyError(f"The update's tensor {chunk.tensor[:80]!r} is NaN or infinite; it was not sent.")
                square = float(np.dot(wide := values.astype(np.float64), wide))
            squares[chunk.part] += square
    if plan.task == "train":
        if job.privacy is not None:
            _keep_promise(header, _unweighed(squares, header.weight, job), job.privacy)
        for name, bounds in policy.require_filters.items():
            if name in _PROOFS:
                _PROOFS[name](bounds, _unweighed(squares, header.weight, job))


def _keep_promise(header: Header, norm: float, section: PrivacySection) -> None:
    """Refuse an update that tells what no noise covers, or that is longer than the noise is made for.

    A clip that adapts is the server's, which is trusted to add the noise; what a site has noised itself has no bound.
    """
    if header.sums or header.logged:
        raise PolicyError("The update has metrics of training beside it, which no noise covers. It was not sent.")
    if section.mechanism in ("central", "dp-ftrl") and section.adaptive_clip is None:
        _is_clipped({"max_norm": section.clip * SLACK}, norm)


def _check_form(header: Header, num_bytes: int, plan: Plan) -> None:
    """Refuse an update that holds more than one tree like the model for the update and for each part of the plan."""
    layout = trees.layout_of(plan.params)
    num_parts = 1 + len(plan.parts) if plan.task == "train" else 0
    dtypes = {name: trees.dtype_of(spec.dtype) for name, spec in layout.items()}
    largest = sum(
        spec.size * max(4, dtypes[name].itemsize) for name, spec in layout.items() if trees.is_floating(dtypes[name])
    )
    names = sum(len(name.encode()) + 100 for name in layout)
    room = num_parts * largest
    if len(header.layout) > num_parts or header.num_bytes > room:
        raise PolicyError(
            f"The update has {len(header.layout)} parts of {header.num_bytes:,} bytes in all; the plan implies at most "
            f"{num_parts} of {room:,}. It was not sent."
        )
    overhead = num_parts * names + room // 1000 + (1 << 16)
    if num_bytes > room + overhead:
        raise PolicyError(f"The update's file has {num_bytes:,} bytes, more than its tensors need. It was not sent.")


def _unweighed(squares: Mapping[str, float], weight: float, job: Job) -> float:
    """Return the joint norm that the parts had before they were weighed.

    A strategy that is not Hansa's own is not loaded here: all of its parts count as weighed.
    """
    weighed: Mapping[str, bool] = {}
    if job.strategy.robust is not None:  # no part is
        weighed = dict.fromkeys(squares, False)
    elif job.strategy.name in registry.TABLES["strategies"]:
        weighed = registry.build("strategies", job.strategy.name, job.strategy.options).weighed
    return math.sqrt(sum(value / (weight**2 if weighed.get(part, True) else 1) for part, value in squares.items()))


def _is_clipped(bounds: Mapping[str, float], norm: float) -> None:
    bound = bounds.get("max_norm", math.inf)
    if norm > bound * ROUNDING:
        raise PolicyError(f"The update has the norm {norm:g}; this site lets at most {bound:g} leave. It was not sent.")


_PROOFS: Mapping[str, Callable[[Mapping[str, float], float], None]] = {"clip": _is_clipped}
"""Filters of which an update shows that they were applied: (the site's bounds, the norm before weighing)."""


def localised(job: Job, site: str, settings: SiteSettings, directory: Path) -> Job:
    """Return the job as this site runs it: with the site's own paths in place of names.

    Args:
        job: the signed job, whose files lie in its directory.
        site: this site's name.
        settings: where data and models lie.
        directory: what relative paths in the settings are relative to.

    Raises:
        PolicyError: the site has no data of that name, or the job names a path of its own.
    """
    changes: dict[str, object] = {
        "model": localised_model(job, settings.models, directory, PLACE, any_path=settings.policy.job_paths)
    }
    if job.data is not None and not settings.policy.job_paths:
        train = _data("data.train", job.data.train, settings)
        test = train.test if job.data.test is None else _data("data.test", job.data.test, settings).train
        values = job.data.model_dump()
        values["train"] = {site: in_folder(train.train, directory)}
        values["test"] = None if test is None else {site: in_folder(test, directory)}
        changes |= {"data": type(job.data)(**values), "partition": None}
    return job.model_copy(update=changes)


def _data(key: str, name: object, settings: SiteSettings) -> DataPaths:
    known = sorted(settings.data)
    if not isinstance(name, str) or not name.startswith(SCHEME):
        raise PolicyError(
            f"The job names paths of data ({key}); this site gives data by name only. Write {key} = 'site:NAME' "
            f"with one of: {', '.join(known) or 'none'}."
        )
    name = name.removeprefix(SCHEME)
    if name not in settings.data:
        raise PolicyError(
            f"This site has no data called {name!r}; it has: {', '.join(known) or 'none'}.{nearest(name, known)}"
        )
    return settings.data[name]
