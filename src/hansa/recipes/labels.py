# SPDX-License-Identifier: Apache-2.0
"""The label map of a classification job, fixed in the job, and what a model's config is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hansa.core.config import Job
from hansa.errors import DataError, JobError
from hansa.recipes.data import SiteData

_SHOWN = 200


def label_map(job: Job, role: str, roles: Sequence[str], least: int = 2) -> tuple[str, ...]:
    """Return ``data.labels``.

    Args:
        job: the job.
        role: the role whose column holds labels.
        roles: all roles of the recipe.
        least: the least number of labels that make sense.

    Raises:
        JobError: it is missing (the labels that the first site has are suggested), too short, or has one twice.
    """
    labels = job.data.labels if job.data else None
    if not labels:
        raise JobError(
            "data.labels is needed: all labels, in the order of their indices; it is fixed in the job because no site "
            f"sees all labels.{_suggested(job, role, roles)}"
        )
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise JobError(f"data.labels has {twice[0]!r} twice.")
    if len(labels) < least:
        raise JobError(f"data.labels has one label, {labels[0]!r}; classification needs two.")
    return tuple(labels)


def _suggested(job: Job, role: str, roles: Sequence[str]) -> str:
    data = SiteData(job, roles)
    try:
        values = data.load(data.names[0]).train.column(role)
    except DataError:
        return ""
    flat = (item for value in values for item in (value if isinstance(value, list) else [value]))
    found = sorted({str(item) for item in flat})
    shown = ", ".join(f'"{label}"' for label in found[:_SHOWN])
    return f" At site {data.names[0]!r} they are: [{shown}{', ...' if len(found) > _SHOWN else ''}]"


def config_fields(labels: Sequence[str]) -> Mapping[str, Any]:
    """Return the config fields that give a model one output for each label."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
