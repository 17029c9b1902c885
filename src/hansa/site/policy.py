# SPDX-License-Identifier: Apache-2.0
"""What a site allows, decided at the site: before a job's first byte of code runs, and again for every plan.

| case | result |
|---|---|
| a recipe that is not allowed; code of one's own by a signer who is not | PolicyError |
| the data's name is not among the site's, or the job names paths | PolicyError that lists the names |
| too many rounds, too large a model, a filter missing or too weak | PolicyError |
| the site's plug-in gives a reason, or fails | PolicyError with that reason: a site is closed when in doubt |
"""

from __future__ import annotations

from pathlib import Path

from hansa import registry
from hansa.bundle import Bundle
from hansa.core.config import Job
from hansa.core.values import Plan
from hansa.errors import HansaError, PolicyError, nearest
from hansa.site.settings import Policy, SiteSettings

SCHEME = "site:"
"""How ``data.train`` of a job begins when it names what each site calls its data."""


def decide(bundle: Bundle, settings: SiteSettings) -> None:
    """Raise PolicyError unless the site takes part in the job.

    Raises:
        PolicyError: what is not allowed, and what would be.
    """
    policy, job = settings.policy, bundle.job
    own = sorted(name for name in registry.TABLES["recipes"] if name != "script")
    recipes = own if policy.recipes is None else policy.recipes
    if bundle.brings_code and bundle.signer.name not in policy.signers:
        raise PolicyError(
            f"The job brings code of its own, signed by {bundle.signer.name!r}. This site runs code of: "
            f"{', '.join(policy.signers) or 'nobody'} (policy.signers in site.toml)."
        )
    if job.recipe.name not in recipes and not (job.recipe.name == "script" and policy.recipes is None):
        raise PolicyError(
            f"Recipe {job.recipe.name!r} is not allowed at this site; it allows: {', '.join(recipes) or 'none'}."
        )
    if policy.max_rounds is not None and job.rounds > policy.max_rounds:
        raise PolicyError(f"The job has {job.rounds} rounds; this site allows {policy.max_rounds}.")
    _require_filters(job, policy)
    if policy.plugin is not None:
        _ask_plugin(policy.plugin, bundle)


def _require_filters(job: Job, policy: Policy) -> None:
    chosen = {item.name: item.options for item in job.filters}
    for name, bounds in policy.require_filters.items():
        if name not in chosen:
            raise PolicyError(f"This site takes part only in jobs with the filter {name!r}.")
        for option, bound in bounds.items():
            value = chosen[name].get(option)
            if not isinstance(value, int | float) or not value <= bound:
                raise PolicyError(f"filters.{name}.{option} is {value}; this site accepts at most {bound:g}.")


def _ask_plugin(target: str, bundle: Bundle) -> None:
    try:
        reason = registry.load_object(target)(bundle)
    except HansaError as error:
        raise PolicyError(f"The site's plug-in {target!r} could not be asked: {error.message}") from error
    except Exception as error:
        raise PolicyError(f"The site's plug-in {target!r} failed: {type(error).__name__}: {error}") from error
    if reason is not None:
        raise PolicyError(f"The site's plug-in {target!r} decided against the job: {reason}")


def check_size(num_bytes: int, policy: Policy) -> None:
    """Raise PolicyError if a plan of ``num_bytes`` is larger than the site allows."""
    if policy.max_model_bytes is not None and num_bytes > policy.max_model_bytes:
        raise PolicyError(f"The model has {num_bytes} bytes; this site allows {policy.max_model_bytes}.")


def check_plan(plan: Plan, job: Job, round: int, task: str) -> None:
    """Raise PolicyError if a plan is not what it was announced as."""
    if (plan.round, plan.task) != (round, task) or plan.seed != job.seed:
        raise PolicyError("The plan is not of the round, task or seed that it was announced with.")


def localised(job: Job, site: str, settings: SiteSettings, directory: Path) -> Job:
    """Return the job as this site runs it: with the site's own paths in place of names.

    Args:
        job: the signed job, whose files lie in its directory.
        site: this site's name.
        settings: where data and models lie.
        directory: what relative paths in the settings are relative to.

    Raises:
        PolicyError: the site has no data of that name.
    """
    model = job.model
    if model.base in settings.models:
        base = Path(settings.models[model.base]).expanduser()
        model = model.model_copy(update={"base": str(base if base.is_absolute() else directory / base)})
    changes: dict[str, object] = {"model": model}
    if job.data is not None and not settings.policy.job_paths:
        train = job.data.train
        known = sorted(settings.data)
        if not isinstance(train, str) or not train.startswith(SCHEME):
            raise PolicyError(
                "The job names paths of data; this site gives data by name only. Write data.train = 'site:NAME' "
                f"with one of: {', '.join(known) or 'none'}."
            )
        name = train.removeprefix(SCHEME)
        if name not in settings.data:
            raise PolicyError(f"This site has no data called {name!r}.{nearest(name, known)}")
        there = settings.data[name]
        values = job.data.model_dump()
        values["train"] = {site: _absolute(there.train, directory)}
        values["test"] = None if there.test is None else {site: _absolute(there.test, directory)}
        changes |= {"data": type(job.data)(**values), "partition": None}
    return job.model_copy(update=changes)


def _absolute(path: str, directory: Path) -> str:
    found = Path(path).expanduser()
    return str(found if found.is_absolute() else directory / found)
