# SPDX-License-Identifier: Apache-2.0
"""``server.toml``: where the server listens, where it keeps things, and what it allows. Defaults < file < flags."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, Field

from hansa.core.config import Section, override, problems
from hansa.errors import JobError

FILE = "server.toml"

OFF = "off"


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` (ValueError).

    >>> split_address("[::1]:8470")
    ('::1', 8470)
    """
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address stands in brackets: [::1]:8470")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("an address is HOST:PORT, such as 0.0.0.0:8470")
    return host, int(port)


def _address(value: str) -> str:
    split_address(value)
    return value


def _database(value: str) -> str:
    if not value.startswith(("sqlite:///", "postgresql://")):
        raise ValueError("a database is sqlite:///PATH or postgresql://USER@HOST/NAME")
    return value


def _bucket(value: str) -> str:
    scheme, _, rest = value.partition("://")
    if scheme != "s3" or not rest.partition("/")[0]:
        raise ValueError("a blob store is s3://BUCKET or s3://BUCKET/PREFIX")
    return value


def _address_or_off(value: str) -> str:
    return value if value == OFF else _address(value)


Address = Annotated[str, AfterValidator(_address)]


class S3(Section):
    """How the S3-compatible store is reached. Credentials come from the environment (AWS_ACCESS_KEY_ID, ...)."""

    endpoint: str | None = Field(None, description="Its URL, if it is not Amazon's.")
    region: str | None = Field(None, description="Its region; AWS_REGION by default.")


class Quota(Section):
    """What one submitter may have. A job that meets its limit fails; finished rounds stay, and it can be resumed."""

    jobs: Annotated[int, Field(gt=0)] | None = Field(None, description="Jobs queued or running at a time.")
    bytes: Annotated[int, Field(gt=0)] | None = Field(
        None, description="Bytes that all of a submitter's jobs and bundles hold."
    )


class Compute(Section):
    """The process beside the server that loads models: it starts them off, exports them and sums metrics up."""

    threads: Annotated[int, Field(gt=0)] | None = Field(
        None, description="CPU threads that a job may compute with; one with more is refused, for they are part of it."
    )
    environment: dict[str, str] = Field(default_factory=dict, description="Variables that are set for it.")


class Policy(Section):
    """Whose code runs beside the server, as its user. What only sites run is theirs to decide."""

    signers: list[str] = Field(
        default_factory=list,
        description="Whose own code (scripts, recipes, pickles) may run beside the server: names of people.",
    )
    modules: list[str] = Field(
        default_factory=list,
        description="module:attribute of strategies, filters, workflows and recipes, installed here, that anyone's "
        "job may name.",
    )
    job_paths: bool = Field(
        False, description="Use the paths of models that jobs name. For laboratories: all lies on this machine."
    )


class ServerSettings(Section):
    """A server's settings."""

    listen: Address = Field("0.0.0.0:8470", description="HOST:PORT for sites and users (mutual TLS).")
    http: Annotated[str, AfterValidator(_address_or_off)] = Field(
        "127.0.0.1:8471", description="HOST:PORT for health and metrics, in plain HTTP; off for none."
    )
    database: Annotated[str, AfterValidator(_database)] | None = Field(
        None, description="postgresql://USER@HOST/NAME or sqlite:///PATH; hansa.db in this folder by default."
    )
    blobs: Annotated[str, AfterValidator(_bucket)] | None = Field(
        None, description="s3://BUCKET/PREFIX, which then also holds all files of jobs; this folder only by default."
    )
    s3: S3 = S3()
    lease_s: Annotated[float, Field(ge=1)] = Field(300.0, description="A site silent for so many seconds is gone.")
    stall_s: Annotated[float, Field(gt=0)] = Field(60.0, description="A transfer that stands still so long is ended.")
    max_running_jobs: Annotated[int, Field(gt=0)] = Field(4, description="Jobs at work at a time; others queue.")
    max_model_bytes: Annotated[int, Field(gt=0)] | None = Field(
        None, description="The largest plan: a job's model, and what its strategy sends with it."
    )
    max_bundle_bytes: Annotated[int, Field(gt=0)] = Field(1 << 34, description="The largest bundle of a job.")
    quota: Quota = Quota()
    log_format: Literal["console", "json"] = Field("console", description="console, or json: one object a line.")
    compute: Compute = Compute()
    policy: Policy = Policy()
    models: dict[str, str] = Field(
        default_factory=dict, description="A job's model.base or model.tokenizer -> the folder where it lies here."
    )

    @property
    def listen_address(self) -> tuple[str, int]:
        """Host and port for sites and users."""
        return split_address(self.listen)

    @property
    def http_address(self) -> tuple[str, int] | None:
        """Host and port for health and metrics, or None."""
        return None if self.http == OFF else split_address(self.http)


def load(path: Path, overrides: Sequence[str] = ()) -> ServerSettings:
    """Read ``server.toml``, if there is one, and apply ``a.b=value`` overrides.

    Raises:
        JobError: it is wrong, with every problem and the nearest known key.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        values = override(tomllib.loads(text), overrides)
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(f"{path} can't be read: {error}.") from None
    try:
        return ServerSettings(**values)
    except pydantic.ValidationError as error:
        lines = "\n".join(problems(ServerSettings, error, values))
        raise JobError(f"{path} is not valid:\n{lines}") from None


def commented() -> str:
    """Return every setting but ``listen``, as lines to be put into a new server.toml below it.

    ``# `` begins a text, ``#`` alone a setting, which taking the sign away sets.
    """
    lines = []
    tables = []
    for name, field in ServerSettings.model_fields.items():
        if isinstance(field.default, BaseModel):
            tables.append((name, type(field.default)))
        elif name != "listen":
            lines.append(_line(name, field))
    for table, section in tables:
        lines.append(f"# {' '.join((section.__doc__ or '').split())}\n#[{table}]\n")
        lines.extend(_line(name, field) for name, field in section.model_fields.items())
    return "\n".join(lines)


_EXAMPLES = {
    "database": "postgresql://hansa@127.0.0.1/hansa",
    "blobs": "s3://bucket/prefix",
    "endpoint": "https://s3.example.org",
    "region": "eu-central-1",
    "max_model_bytes": 1 << 34,
    "jobs": 20,
    "bytes": 1 << 38,
    "threads": 4,
    "environment": '{ CUDA_VISIBLE_DEVICES = "0" }',
    "models": '{ "Qwen/Qwen3-0.6B" = "/models/qwen3-0.6b" }',
}
"""What settings without a default may look like."""

_TABLES = ("environment", "models")
"""Settings whose example is TOML already."""


def _line(name: str, field: pydantic.fields.FieldInfo) -> str:
    example = _EXAMPLES.get(name, field.get_default(call_default_factory=True))
    return f"# {field.description}\n#{name} = {example if name in _TABLES else json.dumps(example)}\n"
