# SPDX-License-Identifier: Apache-2.0
"""``site.toml``: where the server is, what the site allows, and where its data lie. The site's owner writes it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from hansa.core.config import Name, Section, problems
from hansa.errors import JobError


class DataPaths(Section):
    """Where data that jobs call by name lie; relative paths are relative to site.toml."""

    train: str = Field(description="A file, folder or glob.")
    test: str | None = Field(None, description="Held-out data; the job's test_fraction of train if left out.")


class Policy(Section):
    """What the site allows, whatever the server asks."""

    recipes: list[str] | None = Field(
        None, description="Recipes that may run; all of Hansa's own but 'script' if left out."
    )
    signers: list[str] = Field(default_factory=list, description="Whose own code (scripts, modules) may run here.")
    max_model_bytes: Annotated[int, Field(gt=0)] | None = Field(None, description="The largest model, in bytes.")
    max_task_s: Annotated[float, Field(gt=0)] | None = Field(None, description="Seconds that one round may work.")
    max_rounds: Annotated[int, Field(gt=0)] | None = Field(None, description="Rounds that a job may have.")
    require_filters: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="Filters that a job must have, and upper bounds of their options: clip = { max_norm = 1.0 }.",
    )
    job_paths: bool = Field(
        False, description="Use the paths that jobs name. For laboratories: all sites' data lie on this machine."
    )
    plugin: str | None = Field(
        None, description="module:function of the site's own; given the signed bundle, it returns None or a reason."
    )


class Resources(Section):
    """What of this machine training may use."""

    gpus: str | None = Field(None, description="As in CUDA_VISIBLE_DEVICES; all if left out.")
    max_memory_bytes: Annotated[int, Field(gt=0)] | None = Field(
        None, description="Address space of a worker's data (RLIMIT_DATA); a job beyond it costs one attempt."
    )


class SiteSettings(Section):
    """A site's settings."""

    server: str = Field(description="HOST:PORT of the federation's server.")
    proxy: str | None = Field(None, description="HOST:PORT of an HTTP proxy that takes CONNECT.")
    doorbell: bool = Field(True, description="Keep a stream open for news; false asks by long polls only.")
    policy: Policy = Policy()
    resources: Resources = Resources()
    data: dict[Name, DataPaths] = Field(default_factory=dict)
    models: dict[str, str] = Field(default_factory=dict, description="model.base of a job -> where it lies here.")


def load(path: Path) -> SiteSettings:
    """Read ``site.toml``.

    Raises:
        JobError: it is missing or wrong, with every problem and the nearest known key.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(f"There is no {path}. `hansa provision` writes one for each site.") from None
    except (OSError, ValueError) as error:
        raise JobError(f"{path} can't be read: {error}.") from None
    try:
        return SiteSettings(**values)
    except pydantic.ValidationError as error:
        raise JobError(f"{path} is not valid:\n" + "\n".join(problems(SiteSettings, error, values))) from None
