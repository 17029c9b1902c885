# SPDX-License-Identifier: Apache-2.0
"""The job: one frozen, validated value, however it was written (TOML, YAML, JSON, Python, flags).

Defaults < file < ``--set`` flags. Unknown keys are errors that suggest the nearest known one. Relative paths in a
job file are relative to the file.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from hansa.errors import JobError, nearest

FORMAT = 1

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Section(BaseModel):
    """A frozen table of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Choice(BaseModel):
    """A name from one of the tables in :mod:`hansa.registry`, and that piece's own options beside it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = Field(description="A known name, or module:attribute of your own.")

    @property
    def options(self) -> dict[str, Any]:
        """The options beside the name."""
        return dict(self.model_extra or {})


class Adapter(BaseModel):
    """Parameter-efficient tuning: a ``peft`` method and the fields of its config."""

    model_config = ConfigDict(frozen=True, extra="allow")
    method: str = Field("lora", description="A peft method: lora, ia3, prompt_tuning, p_tuning, ...")

    @property
    def options(self) -> dict[str, Any]:
        """The fields of the method's peft config."""
        return dict(self.model_extra or {})


class ModelSection(Section):
    """Which model is trained. Give ``base`` (pre-trained) or ``config`` (from scratch)."""

    base: str | None = Field(
        None, description="A directory, a hub name, or package:NAME/SUBDIR of an installed package."
    )
    config: dict[str, Any] | None = Field(
        None, description="A transformers config with its model_type, to train from scratch."
    )
    tokenizer: str | None = Field(
        None, description="A directory, a hub name, or 'bytes' (byte level). The base's own by default."
    )
    adapter: Adapter | None = Field(None, description="Train an adapter only; all parameters if left out.")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    factory: str | None = Field(
        None,
        description="For scripts: FILE.py:CALLABLE or a .safetensors file that gives the first parameters.",
    )


class DataSection(Section):
    """Which data, in which columns. The label map is fixed here, never guessed at a site."""

    train: str | list[str] | dict[Name, str] = Field(
        description="A file, folder, glob, list of them, or hub name; or a table SITE = file."
    )
    test: str | list[str] | dict[Name, str] | None = Field(
        None, description="Held-out data, in the same form. If left out, test_fraction of each site's rows."
    )
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    format: (
        Literal["jsonl", "json", "csv", "tsv", "parquet", "conll", "text", "images", "hub", "arrow", "npz"] | None
    ) = Field(None, description="Taken from the file's suffix if left out.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Role -> column, e.g. text = 'sentence', label = 'intent'."
    )
    labels: list[str] | None = Field(None, description="All labels, in the order of their indices.")
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="At most so many rows a site.")
    split: str = Field("train", description="For hub data sets: the split to train on.")


class TrainSection(Section):
    """What a site does in one round."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Annotated[int, Field(gt=0)] = 8
    steps: Annotated[int, Field(gt=0)] | None = Field(None, description="Local steps a round.")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="Or: passes over the site's data.")
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(None, description="Clip the gradient's norm at each step.")
    max_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Stop after so long and return partial work (strategies that accept it)."
    )
    eval_batch_size: Annotated[int, Field(gt=0)] = 32

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class CohortSection(Section):
    """Who is asked in a round, and what becomes of those who don't answer."""

    sample: Annotated[float, Field(gt=0)] = Field(
        1.0, description="A fraction of all sites in (0, 1], or a whole number of sites above 1."
    )
    quorum: Annotated[float, Field(gt=0)] = Field(
        0.5,
        description="The least answers a round needs: a fraction of those asked, or a whole number above 1.",
    )
    deadline_s: Annotated[float, Field(gt=0)] | None = Field(None, description="Seconds a site has to answer.")
    late: Literal["discard", "accept"] = Field(
        "discard",
        description="What becomes of an answer after the deadline: accept adds it to a later round.",
    )


class SiteResources(Section):
    """A site's share of this machine, in simulation."""

    cpus: Annotated[int, Field(gt=0)] | None = None
    gpus: Annotated[float, Field(ge=0)] = 0.0


class EngineSection(Section):
    """Where sites run in simulation."""

    name: Literal["local", "processes", "batched"] = "local"
    threads: Annotated[int, Field(gt=0)] = Field(1, description="CPU threads a site trains with; part of the result.")
    workers: Annotated[int, Field(gt=0)] | None = Field(
        None, description="For processes: how many; as many as the machine has room for by default."
    )
    sites: dict[str, SiteResources] = Field(default_factory=dict, description="Shares of single sites.")


class EvaluationSection(Section):
    """How the shared model is judged, on the sites' held-out data."""

    every: Annotated[int, Field(ge=0)] = Field(1, description="Every so many rounds; 0 is after the last only.")
    metric: str = Field("loss", description="Which metric selects the best round.")
    mode: Literal["min", "max"] = "min"
    patience: Annotated[int, Field(gt=0)] | None = Field(
        None, description="Stop after so many evaluations without a better one."
    )


class BaselineSection(Section):
    """What the federated model is compared with in the report."""

    base: bool = Field(True, description="The model before training.")
    local: bool = Field(True, description="Each site training alone, for as many steps.")
    central: bool = Field(False, description="All data in one place, for as many steps in all.")


class OutputSection(Section):
    """Where results go."""

    dir: str = Field("runs", description="The folder that holds runs, relative to the current one.")
    keep: Annotated[int, Field(ge=1)] = Field(2, description="Checkpoints kept beside the best.")
    model: Literal["last", "best"] = Field("last", description="Which round's model is saved and reported.")
    tensorboard: bool = False


class Job(Section):
    """One training run, declared."""

    format: Literal[1] = FORMAT
    name: Name
    seed: Annotated[int, Field(ge=0)] = 0
    rounds: Annotated[int, Field(gt=0)] = 10
    recipe: Choice
    model: ModelSection = ModelSection()
    data: DataSection | None = None
    partition: Choice | None = None
    train: TrainSection = TrainSection()
    strategy: Choice = Choice(name="fedavg")
    filters: list[Choice] = Field(default_factory=list)
    workflow: Choice = Choice(name="scatter-gather")
    cohort: CohortSection = CohortSection()
    engine: EngineSection = EngineSection()
    evaluation: EvaluationSection = EvaluationSection()
    baselines: BaselineSection = BaselineSection(local=False)
    output: OutputSection = OutputSection()
    directory: str = Field(".", description="What relative paths are relative to; the job file's folder.")

    @pydantic.field_validator("recipe", "strategy", "partition", "workflow", mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @pydantic.field_validator("filters", mode="before")
    @classmethod
    def _bare_names(cls, value: Any) -> Any:
        return [{"name": item} if isinstance(item, str) else item for item in value]

    def path(self, value: str) -> Path:
        """Return ``value`` as a path, relative to the job's directory."""
        path = Path(value).expanduser()
        return path if path.is_absolute() else Path(self.directory) / path

    def to_json(self) -> str:
        """Return the resolved job as JSON, from which :func:`parse` gives the same job."""
        return json.dumps(self.model_dump(mode="json"), indent=2)


def parse(values: Mapping[str, Any]) -> Job:
    """Validate a mapping as a job.

    Raises:
        JobError: with every problem, one a line, and the nearest known key for an unknown one.
    """
    try:
        return Job.model_validate(dict(values))
    except pydantic.ValidationError as error:
        raise JobError("The job is not valid:\n" + "\n".join(_problem(e) for e in error.errors())) from None


def _problem(error: Any) -> str:
    location = [str(item) for item in error["loc"]]
    where = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _fields(location[:-1])
        return f"  {where}: unknown key.{nearest(location[-1], known) or ' Known keys: ' + ', '.join(known) + '.'}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"  {where}: this key is needed."
    return f"  {where}: {message} (got {error['input']!r})."


def _fields(location: Sequence[str]) -> list[str]:
    section: Any = Job
    for step in location:
        field = section.model_fields.get(step)
        candidates = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)


def load(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and apply ``a.b=value`` overrides.

    Raises:
        JobError: the file is missing, unreadable, or no valid job.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.*")] if path.parent.is_dir() else []
        raise JobError(f"There is no job file {str(path)!r}.{nearest(path.name, siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"The job file {str(path)!r} can't be read: {error}.") from None
    try:
        match path.suffix.lower():
            case ".toml":
                values: Any = tomllib.loads(text)
            case ".yaml" | ".yml":
                values = yaml.safe_load(text)
            case ".json":
                values = json.loads(text)
            case suffix:
                raise JobError(f"A job is a .toml, .yaml or .json file, not {suffix!r} ({path}).")
    except (tomllib.TOMLDecodeError, yaml.YAMLError, json.JSONDecodeError, RecursionError) as error:
        raise JobError(f"{path} is not well formed: {error}") from None
    if not isinstance(values, dict):
        raise JobError(f"{path} holds no table of settings.")
    values.setdefault("directory", str(path.parent))
    return parse(override(values, overrides))


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with each ``a.b=value`` set; a value is read as TOML, or else taken as text.

    >>> override({"train": {"lr": 1}}, ["train.lr=0.5", "name=x"])
    {'train': {'lr': 0.5}, 'name': 'x'}
    """
    result: dict[str, Any] = json.loads(json.dumps(values))
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not all(key.split(".")):
            raise JobError(f"--set takes key=value with a dotted key, not {item!r}.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *path, last = key.split(".")
        table = result
        for step in path:
            inner = table.setdefault(step, {})
            if isinstance(inner, str) and step in ("recipe", "strategy", "partition", "workflow"):
                inner = table[step] = {"name": inner}
            if not isinstance(inner, dict):
                raise JobError(f"--set {key}: {step!r} is not a table.")
            table = inner
        table[last] = value
    return result


def schema() -> dict[str, Any]:
    """Return the JSON schema of a job."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}
