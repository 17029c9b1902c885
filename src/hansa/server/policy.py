# SPDX-License-Identifier: Apache-2.0
"""What the server allows, decided before a job is taken in, and again each time that it is begun.

| case | result |
|---|---|
| a strategy, filter or workflow that ``policy.modules`` does not name | PolicyError, whoever signed |
| a script, another recipe, a pickle, a library told to import code, by a signer who is not trusted | PolicyError |
| a path out of the job's own files that ``models`` does not stand for | PolicyError |
| a job whose sites hand the model on, and that does not name them | PolicyError: its quorum would hold nobody |
| more CPU threads than ``compute.threads`` | PolicyError: fewer would give other bits |

The first run in the server's own process, so only what the operator has installed and named may; the others run in
the worker beside it, as the same user.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hansa.bundle import Bundle, check_code, localised_model
from hansa.core.config import Job
from hansa.errors import PolicyError
from hansa.runs.pieces import check_named
from hansa.server.settings import ServerSettings

PLACE = "server"

_IN_PROCESS = ("strategy", "workflow", "filters")


def decide(bundle: Bundle, settings: ServerSettings, directory: Path) -> None:
    """Raise PolicyError unless the server carries the job out.

    Args:
        bundle: the signed job.
        settings: what the server allows.
        directory: the server's folder.

    Raises:
        PolicyError: what is not allowed, and what would be.
    """
    policy = settings.policy
    # A partition deals out data, and the server has none: it is never loaded here.
    code = {where: what for where, what in bundle.code.items() if where != "partition"}
    for where, what in code.items():
        if where.partition(".")[0] in _IN_PROCESS and what not in policy.modules:
            raise PolicyError(
                f"{where} is {what[:80]!r}, which would run in the server itself. This server has: "
                f"{', '.join(policy.modules) or 'none'} (policy.modules in server.toml)."
            )
    check_code(code, bundle.signer, policy.signers, dict.fromkeys((*_IN_PROCESS, "recipe"), policy.modules), PLACE)
    check_named(bundle.job)
    threads, most = bundle.job.engine.threads, settings.compute.threads
    if most is not None and threads > most:
        raise PolicyError(f"The job computes with {threads} CPU threads; this server gives {most}. Set engine.threads.")
    at_server(bundle.job, (), settings, directory)


def at_server(job: Job, sites: Sequence[str], settings: ServerSettings, directory: Path) -> Job:
    """Return the job as the worker beside the server builds it: it names every site, has nobody's data, and reads
    nothing but its own files and the server's models.

    Args:
        job: the signed job, whose files lie in its directory.
        sites: who takes part.
        settings: where models lie.
        directory: what relative paths in the settings are relative to.

    Raises:
        PolicyError: the job names a path of its own.
    """
    model = localised_model(job, settings.models, directory, PLACE, any_path=settings.policy.job_paths)
    changes: dict[str, object] = {"partition": None, "model": model}
    if job.data is not None:
        changes["data"] = job.data.model_copy(update={"train": dict.fromkeys(sites, "not-here"), "test": None})
    return job.model_copy(update=changes)
