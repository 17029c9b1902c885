# SPDX-License-Identifier: Apache-2.0
"""``site.toml``: where the server is, what the site allows, and where its data lie. The site's owner writes it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, Field

from hansa.core.config import Name, Section, problems
from hansa.errors import JobError
from hansa.privacy.ledger import Budget

FILE = "site.toml"

Bytes = Annotated[int, Field(gt=0)]


class DataPaths(Section):
    """Where data that jobs call by name lie; relative paths are relative to site.toml."""

    train: str = Field(description="A file, folder or glob.")
    test: str | None = Field(None, description="Held-out data; the job's test_fraction of train if left out.")


class Policy(Section):
    """What the site allows, whatever the server asks. A job beyond it is refused, and its submitter learns why."""

    recipes: list[str] | None = Field(
        None, description="Recipes that may run; all of Hansa's own but module:attribute if left out."
    )
    modules: list[str] = Field(
        default_factory=list,
        description="module:attribute of strategies and filters, installed here, that anyone's job may name.",
    )
    signers: list[str] = Field(
        default_factory=list, description="Whose own code (scripts, modules, pickles) may run here: names of people."
    )
    max_model_bytes: Bytes | None = Field(None, description="The largest model, and the largest bundle, in bytes.")
    max_task_s: Annotated[float, Field(gt=0)] | None = Field(None, description="Seconds that one round may work.")
    max_rounds: Annotated[int, Field(gt=0)] | None = Field(None, description="Rounds that a job may have.")
    max_jobs: Annotated[int, Field(gt=0)] = Field(
        16, description="Jobs that may be at work here at once, a worker process each; others wait."
    )
    require_filters: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="Filters that a job must have, and upper bounds of their options: { clip = { max_norm = 1.0 } }.",
    )
    job_paths: bool = Field(
        False, description="Use the paths that jobs name. For laboratories: all sites' data lie on this machine."
    )
    plugin: str | None = Field(
        None, description="module:function of the site's own; given the signed bundle, it returns None or a reason."
    )


class Resources(Section):
    """What of this machine training may use."""

    cpus: Annotated[int, Field(gt=0)] | None = Field(
        None, description="CPU threads; a job that trains with more is refused, for their number is part of its result."
    )
    gpus: str | None = Field(None, description="GPUs, as in CUDA_VISIBLE_DEVICES; all if left out, none if empty.")
    max_memory_bytes: Bytes | None = Field(
        None,
        description="Memory that a job's worker and all that it starts may take together; beyond it they are ended. "
        "One process is held at once (RLIMIT_DATA), their sum is looked at twice a second.",
    )
    environment: dict[str, str] = Field(
        default_factory=dict,
        description='Variables set for training; of the agent\'s own only harmless ones are. { HF_HOME = "/models" }.',
    )


class PrivacyRules(Section):
    """What must hide the data here. Budgets are tables [privacy.budgets.NAME], NAME as under [data.NAME]."""

    require: list[Literal["central", "local", "dp-sgd", "dp-ftrl", "distributed"]] | None = Field(
        None, description="Train only in jobs with one of these mechanisms of [privacy]; any job if left out."
    )
    epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="The most that one job may spend of ε here, over all its rounds; any amount if left out. Beside "
        "require, without which a job may promise nothing at all.",
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="At this δ; with epsilon.")
    summed_with: Annotated[int, Field(ge=3)] | None = Field(
        None,
        description="Train only under secure aggregation or homomorphic encryption, in sums of at least so many sites, "
        "this one among them; any job if left out.",
    )
    key_sites: list[Name] | None = Field(
        None,
        description="Under homomorphic encryption, the sites that this one trusts with the key; any if left out.",
    )
    budgets: dict[Name, Budget] = Field(
        default_factory=dict,
        description="What all jobs together may learn of a data set; every round is charged before it is trained.",
    )

    @pydantic.model_validator(mode="after")
    def _bound_is_whole(self) -> PrivacyRules:
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("give epsilon and delta, or neither")
        return self


class SiteSettings(Section):
    """A site's settings."""

    server: str = Field(description="HOST:PORT of the federation's server.")
    proxy: str | None = Field(
        None, description="http://HOST:PORT of a proxy that takes CONNECT; https_proxy by default, empty for none."
    )
    stall_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="A transfer that stands still for so many seconds goes on over a new connection."
    )
    doorbell: bool = Field(True, description="Keep a stream open for news; false asks by long polls only.")
    policy: Policy = Policy()
    resources: Resources = Resources()
    privacy: PrivacyRules = PrivacyRules()
    data: dict[Name, DataPaths] = Field(
        default_factory=dict, description="What jobs call site:NAME lies where. A table each: [data.NAME]."
    )
    models: dict[str, str] = Field(
        default_factory=dict, description="A job's model.base or model.tokenizer -> the folder where it lies here."
    )

    @pydantic.model_validator(mode="after")
    def _budgets_hold(self) -> SiteSettings:
        budgets = self.privacy.budgets
        if unknown := sorted(budgets.keys() - self.data.keys()):
            raise ValueError(f"privacy.budgets names data that are not under [data]: {', '.join(unknown)}")
        if budgets and self.policy.job_paths:
            raise ValueError("policy.job_paths lets jobs go around privacy.budgets, which are kept by the data's names")
        for name in budgets:
            for other, paths in self.data.items():
                if other != name and paths.train == self.data[name].train:
                    raise ValueError(f"data.{name} has a budget, and data.{other} is the same by another name")
        return self


def load(path: Path) -> SiteSettings:
    """Read ``site.toml``.

    Raises:
        JobError: it is missing or wrong, with every problem and the nearest known key.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(f"There is no {path}. `hansa provision` writes one for each site.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(f"{path} can't be read: {error}.") from None
    try:
        return SiteSettings(**values)
    except pydantic.ValidationError as error:
        raise JobError(f"{path} is not valid:\n" + "\n".join(problems(SiteSettings, error, values))) from None


def commented() -> str:
    """Return every setting but ``server`` as commented lines, to be put into a new site.toml.

    With every ``#`` before a setting or a table taken away the text is still valid.
    """
    lines = []
    tables = []
    for name, field in SiteSettings.model_fields.items():
        if isinstance(field.default, BaseModel):
            section = type(field.default)
            tables.append(f"# {' '.join((section.__doc__ or '').split())}\n# [{name}]\n")
            tables.extend(_line(key, inner) for key, inner in section.model_fields.items())
        elif name in _TABLES:
            tables.append(f"# {field.description}\n{_TABLES[name]}")
        elif name != "server":
            lines.append(_line(name, field))
    return "\n".join([*lines, *tables])


_EXAMPLES = {
    "summed_with": 5,
    "key_sites": ["charite"],
    "epsilon": 4.0,
    "delta": 1e-5,
    "require": ["dp-sgd", "local"],
    "proxy": "http://proxy.example.org:3128",
    "recipes": ["sequence-classification", "causal-lm"],
    "max_model_bytes": 1 << 34,
    "max_task_s": 3600.0,
    "max_rounds": 100,
    "plugin": "our_hospital.rules:decide",
    "cpus": 8,
    "gpus": "0,1",
    "max_memory_bytes": 1 << 36,
}
"""What settings without a default may look like."""

_TABLES = {
    "data": '# [data.notes]\n# train = "/data/notes/train.jsonl"\n# test = "/data/notes/test.jsonl"\n',
    "models": '# [models]\n# "Qwen/Qwen3-0.6B" = "/models/qwen3-0.6b"\n',
}


def _line(name: str, field: pydantic.fields.FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    value = "{}" if default == {} else json.dumps(_EXAMPLES[name] if default is None else default)
    return f"# {field.description}\n# {name} = {value}\n"
