# SPDX-License-Identifier: Apache-2.0
"""The job: one frozen, validated value, however it was written (TOML, YAML, JSON, Python, flags).

Defaults < file < ``--set`` flags. Unknown keys are errors that suggest the nearest known one. Relative paths in a
job file are relative to the file.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Union, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from hansa.errors import JobError, nearest

FORMAT: Final = 1

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Section(BaseModel):
    """A frozen table of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Choice(BaseModel):
    """A name from one of the tables in :mod:`hansa.registry`, and that piece's own options beside it.

    A bare name is short for a table that has nothing else.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = Field(description="A known name, or module:attribute of your own.")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Publish the bare name as well as the table."""
        table = handler.resolve_ref_schema(handler(core))
        return {"anyOf": [{"type": "string"}, table], "description": table.pop("description")}

    @property
    def options(self) -> dict[str, Any]:
        """The options beside the name."""
        return dict(self.model_extra or {})


class RobustSection(Section):
    """What takes the mean's place where some sites may send anything; every site then counts once."""

    rule: Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median"] = Field(
        description="How the sites' updates become one; mean needs max_norm."
    )
    malicious: Annotated[int, Field(ge=0)] = Field(
        description="f: how many of a round's sites may lie. krum and multi-krum need 2f + 3 updates, others 2f + 1."
    )
    max_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The largest L2 norm of an update: sites clip to it, and the server rejects what is longer."
    )

    @pydantic.model_validator(mode="after")
    def _mean_is_bounded(self) -> RobustSection:
        if self.rule == "mean" and self.max_norm is None:
            raise ValueError("one update can carry a mean anywhere; give max_norm, or another rule")
        return self


class Algorithm(Choice):
    """A strategy, its options, and what it does about sites that lie."""

    robust: RobustSection | None = Field(None, description="A robust rule in place of the mean; none if left out.")


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
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="What parameters are kept and sent in; the server adds up in float32."
    )
    factory: str | None = Field(
        None,
        description="For scripts: FILE.py:CALLABLE or a .safetensors file that gives the first parameters.",
    )


class DataSection(Section):
    """Which data, in which columns. The label map is fixed here, never guessed at a site."""

    train: str | list[str] | dict[Name, str] = Field(
        description="A file, folder, glob, list of them, or hub name; or a table SITE = file; or, in a deployment, "
        "site:NAME for what each site calls NAME."
    )
    test: str | list[str] | dict[Name, str] | None = Field(
        None, description="Held-out data, in the same form. If left out, test_fraction of each site's rows."
    )
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="Held out where test is left out.")
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

    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="scaffold needs sgd without momentum.")
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="The sites' learning rate.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Annotated[int, Field(gt=0)] = Field(8, description="Examples a step.")
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

    @pydantic.model_validator(mode="after")
    def _momentum_of_sgd(self) -> TrainSection:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum is for optimizer = 'sgd'; {self.optimizer!r} has its own")
        return self


Amount = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]
"""A whole number (3: three sites) or a fraction written with a point (1.0: all, 0.5: half)."""


class CohortSection(Section):
    """Who is asked in a round, and what becomes of those who don't answer."""

    sample: Amount = Field(1.0, description="Who is asked: a fraction (1.0 is all) or a whole number of sites.")
    quorum: Amount = Field(
        0.5, description="The least answers a round needs: a fraction of those asked, or a whole number of sites."
    )
    deadline_s: Annotated[float, Field(gt=0)] | None = Field(None, description="Seconds a site has to answer.")
    sites: list[Name] | None = Field(
        None, description="In a deployment: who takes part; every site of the federation by default."
    )
    late: Literal["discard", "accept"] = Field(
        "discard",
        description="What becomes of an answer after the deadline: accept adds it to a later round.",
    )


class SiteResources(Section):
    """A site's share of this machine, in simulation."""

    cpus: Annotated[int, Field(gt=0)] | None = Field(None, description="CPU threads, in place of engine.threads.")
    gpus: Annotated[float, Field(ge=0)] = Field(0.0, description="A share of a GPU, or a number of GPUs.")


class EngineSection(Section):
    """Where sites run in simulation."""

    name: Literal["local", "processes", "batched"] = Field(
        "local",
        description="local: one site after another in this process; processes: warm workers side by side; batched: "
        "many small sites as one computation.",
    )
    threads: Annotated[int, Field(gt=0)] = Field(1, description="CPU threads a site trains with; part of the result.")
    workers: Annotated[int, Field(gt=0)] | None = Field(
        None, description="For processes: how many; as many as the machine has room for by default."
    )
    sites: dict[str, SiteResources] = Field(default_factory=dict, description="Shares of single sites.")


class EvaluationSection(Section):
    """How the shared model is judged, on the sites' held-out data."""

    every: Annotated[int, Field(ge=0)] = Field(1, description="Every so many rounds; 0 is after the last only.")
    metric: str = Field("loss", description="Which metric selects the best round.")
    mode: Literal["min", "max"] = Field("min", description="Whether lower or higher is better.")
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
    tensorboard: bool = Field(False, description="Write TensorBoard event files into the run's folder.")


class AdaptiveClip(Section):
    """Follow a quantile of the updates' norms: Andrew et al. 2021, arXiv:1905.03871."""

    quantile: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="γ: the share of updates left unclipped.")
    lr: Annotated[float, Field(gt=0)] = Field(0.2, description="η_C: how fast the clip follows.")
    noise: Annotated[float, Field(gt=0)] | None = Field(
        None, description="σ_b: the noise of the count of unclipped updates; a twentieth of the cohort by default."
    )


class PrivacySection(Section):
    """What is promised to those whose data are trained on: clip, noise, sampling and accountant, as one plan."""

    mechanism: Literal["central", "local", "dp-sgd", "dp-ftrl", "distributed"] = Field(
        description="central: the server clips and adds noise to the sum; local: each site adds noise before anything "
        "leaves it; dp-sgd: noise in every local step; dp-ftrl: correlated noise at the server, for runs without "
        "sampling; distributed: each site adds a share of the noise, under the masks of [secure_aggregation]."
    )
    unit: Literal["example", "user", "site"] | None = Field(
        None,
        description="Whose presence is hidden. dp-sgd: example. All others: user (each site is one person's device) "
        "or site.",
    )
    clip: Annotated[float, Field(gt=0)] = Field(
        description="The largest L2 norm of what one unit adds: a site's update; with dp-sgd an example's gradient."
    )
    adaptive_clip: AdaptiveClip | None = Field(None, description="central: let the clip follow the updates' norms.")
    noise_multiplier: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The noise's standard deviation over the clip. Give this or epsilon."
    )
    epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None, description="What all rounds together may spend; the noise multiplier follows."
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(description="Well below one over the number of units.")
    accountant: Literal["pld", "rdp", "zcdp"] = Field("pld", description="How releases are added up.")
    weight_cap: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Weigh a site by min(n, weight_cap) / weight_cap. By default every site counts once.",
    )
    participations: Annotated[int, Field(gt=0)] | None = Field(
        None, description="dp-ftrl: how often one site takes part at most; all rounds by default."
    )
    separation: Annotated[int, Field(gt=0)] = Field(
        1, description="dp-ftrl: the least number of rounds from one participation of a site to its next."
    )

    @pydantic.model_validator(mode="after")
    def _one_amount(self) -> PrivacySection:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("give noise_multiplier or epsilon, one of them")
        return self


class SecretSums(Section):
    """What any way of showing the server sums only is told: how many are summed, and what one site may put in."""

    default_step: ClassVar[float]
    """The coarsest step of weighed elements where the job gives none, and no privacy plan bounds updates."""

    minimum: Annotated[int, Field(ge=3)] = Field(3, description="The fewest sites that are ever summed.")
    range: Annotated[float, Field(gt=0)] = Field(
        16.0,
        description="The largest magnitude of an update's element; a larger one is an error at its site. Beside "
        "[privacy] the clip bounds them.",
    )
    step: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="The coarsest step that weighed elements are rounded to; 1e-9 under masks, 1e-6 encrypted, or with "
        "[privacy] clip / 2^20.",
    )
    weight_cap: Annotated[float, Field(gt=0)] = Field(
        65536.0, description="The most examples that a site may weigh; more is an error. [privacy] has its own."
    )
    metrics: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Sums that metrics are computed from, and the largest magnitude of each at a site; they are summed "
        "in secret too. Sums that are not named do not leave a site, and no metric of a single site does.",
    )


class SecureAggregationSection(SecretSums):
    """The server learns the sum of the sites' updates, and of no fewer: Bonawitz et al. 2017, eprint 2017/281.

    ``true`` is short for a table with nothing in it, ``false`` for one that says no more than that it is off.
    """

    default_step: ClassVar[float] = 1e-9

    off: str | None = Field(None, description="Why the server sees every update; it sees sums only if left out.")
    by_default: bool = Field(
        False,
        description="Written where a job that does not say is prepared. A simulation of it adds up what sites would "
        "send, without masks: there is nobody to hide it from.",
    )
    corrupt: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.2, description="The share of the sites asked that may work with the server without learning more."
    )
    dropout: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.1, description="The share of the sites asked that may drop out; it counts above 64 sites."
    )
    range: Annotated[float, Field(gt=0)] = Field(
        256.0,
        description="The largest magnitude of an update's element. One that, weighed, is above range times the largest "
        "weight is an error at its site. Beside [privacy] the clip bounds them.",
    )
    weight_cap: Annotated[float, Field(gt=0)] = Field(
        float(1 << 24),
        description="The most examples (of a language model: tokens) that a site may weigh; more is an error. "
        "[privacy] has its own.",
    )
    metrics: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Sums that metrics are computed from, and the largest magnitude of each at a site, beside those "
        "that the recipe declares. They are summed under the masks too; sums that nobody names do not leave a site, "
        "and no metric of a single site does.",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {} if value is True else {"off": "the job says so"} if value is False else value

    @pydantic.model_validator(mode="after")
    def _on_or_off(self) -> SecureAggregationSection:
        if self.off is not None and self.model_fields_set - {"off"} and self != type(self)(off=self.off):
            raise ValueError("off, so leave the rest out")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Publish true and false as well as the table."""
        table = handler.resolve_ref_schema(handler(core))
        return {"anyOf": [{"type": "boolean"}, table], "description": table.pop("description")}


class HomomorphicEncryptionSection(SecretSums):
    """The server adds up updates that it can't read, and one site decrypts the sum: CKKS, Cheon et al. 2017."""

    default_step: ClassVar[float] = 1e-6

    key_site: Name | None = Field(
        None,
        description="The site that holds the secret key and sees the sums; of those asked, the first by name if left "
        "out.",
    )
    full_model: bool = Field(False, description="Allow jobs that train more than an adapter; they are slow and large.")
    max_bytes: Annotated[int, Field(gt=0)] = Field(
        1 << 29, description="The largest encrypted update of a site; a larger one is refused before a round begins."
    )


def secret_sums(
    values: Mapping[str, Any] | None,
) -> SecureAggregationSection | HomomorphicEncryptionSection | None:
    """Return the section that ``values`` were dumped from."""
    if values is None:
        return None
    kind = HomomorphicEncryptionSection if "key_site" in values else SecureAggregationSection
    return kind.model_validate(values)


class Job(Section):
    """One training run, declared.

    Raises:
        JobError: with every problem, one a line, and the nearest known key for an unknown one.
    """

    format: Literal[1] = FORMAT
    name: Name = Field(description="What runs are called: NAME-0001, NAME-0002, ...")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(
        0, description="All draws of training come from it: the same job gives the same bits."
    )
    rounds: Annotated[int, Field(gt=0)] = Field(10, description="How often the sites train and the server adds up.")
    recipe: Choice
    model: ModelSection = ModelSection()
    data: DataSection | None = None
    partition: Choice | None = None
    files: list[str] = Field(
        default_factory=list,
        description="Files, folders or globs in the job's folder that travel with it to the sites of a deployment.",
    )
    train: TrainSection = TrainSection()
    strategy: Algorithm = Field(
        Algorithm(name="fedavg"),
        description='How updates become a model; robust = {rule = "multi-krum", malicious = 2} stands sites that lie.',
    )
    filters: list[Choice] = Field(default_factory=list)
    privacy: PrivacySection | None = Field(None, description="Differential privacy; none if left out.")
    secure_aggregation: SecureAggregationSection | None = Field(
        None,
        description="Whether the server sees sums only: true or a table, or false. If left out that is settled where "
        "the job is prepared: on for more than two sites, unless something in the job speaks against it.",
    )
    homomorphic_encryption: HomomorphicEncryptionSection | None = Field(
        None, description="In place of masks: the server adds encrypted updates, and one site decrypts the sum."
    )
    workflow: Choice = Choice(name="scatter-gather")
    cohort: CohortSection = CohortSection()
    engine: EngineSection = EngineSection()
    evaluation: EvaluationSection = EvaluationSection()
    baselines: BaselineSection = BaselineSection(local=False)
    output: OutputSection = OutputSection()
    directory: str = Field(".", description="What relative paths are relative to; the job file's folder.")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise JobError("The job is not valid:\n" + "\n".join(problems(Job, error, values))) from None

    @pydantic.field_validator("format", mode="before")
    @classmethod
    def _known_format(cls, value: Any) -> Any:
        if value != FORMAT:
            raise ValueError(f"this release reads jobs of format {FORMAT} only")
        return value

    @property
    def masks(self) -> SecureAggregationSection | None:
        """The words on secure aggregation of a job under it; None if it is off, or nobody has said."""
        section = self.secure_aggregation
        return None if section is None or section.off is not None else section

    @property
    def secret_sums(self) -> SecureAggregationSection | HomomorphicEncryptionSection | None:
        """How the server is kept from seeing more than sums; None where it sees every update."""
        return self.masks or self.homomorphic_encryption

    def path(self, value: str) -> Path:
        """Return ``value`` as a path, relative to the job's directory."""
        try:
            path = Path(value).expanduser()
        except RuntimeError:
            raise JobError(f"The path {value!r} names a user that this machine does not know.") from None
        return path if path.is_absolute() else Path(self.directory) / path

    def to_json(self) -> str:
        """Return the resolved job as JSON, from which :func:`parse` gives the same job."""
        return json.dumps(self.model_dump(mode="json"), indent=2)


def parse(values: Mapping[str, Any]) -> Job:
    """Validate a mapping as a job.

    Raises:
        JobError: with every problem, one a line, and the nearest known key for an unknown one.
    """
    for key in values:
        if not isinstance(key, str):
            raise JobError(f"The job is not valid:\n  {key!r}: a key must be text; put it in quotes.")
    return Job(**values)


def problems(kind: type[Section], error: pydantic.ValidationError, values: Mapping[str, Any]) -> list[str]:
    """Return a line for every key of a ``kind`` that is wrong; the branches of a union that failed share one."""
    found: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    unions = set()
    for item in error.errors(include_url=False):
        location = _location(item, values)
        where = ".".join(location)
        if len(location) < len(item["loc"]):
            unions.add(where)
        if item["type"] == "extra_forbidden":
            message = f"unknown key.{_suggestion(kind, location)}"
        elif item["type"] == "missing":
            message = "this key is needed."
        else:
            message = item["msg"].removeprefix("Value error, ").removesuffix(".")
            if item["type"] == "model_type":
                message = "a table of settings is needed here"
            shown = repr(item["input"])
            got[where] = f" (got {shown if len(shown) <= 80 else shown[:80] + '...'})."
        found.setdefault(where, []).append(message)
    deepest = [w for w in found if not (w in unions and any(other.startswith(f"{w}.") for other in found))]
    return [f"  {where}: {'; or '.join(found[where])}{got.get(where, '')}" for where in deepest]


def _location(item: Any, values: Any) -> list[str]:
    """Return an error's place in the job, without the names that pydantic gives to the branches of a union."""
    location = []
    for step in item["loc"]:
        try:
            values = values[step]
        except (KeyError, IndexError, TypeError):
            continue
        location.append(str(step))
    if item["type"] == "missing":
        location.append(str(item["loc"][-1]))
    return location


def _suggestion(kind: type[Section], location: Sequence[str]) -> str:
    *path, key = location
    known = _keys(kind, path)
    elsewhere = [f"{name}.{key}" for name in kind.model_fields if key in _keys(kind, [name])]
    return nearest(key, known) or (
        f" Did you mean {elsewhere[0]!r}?" if elsewhere else f" Known keys: {', '.join(known)}."
    )


def _keys(root: type[Section], location: Sequence[str]) -> list[str]:
    """Return the keys of the section at ``location``."""
    kind: Any = root
    for step in location:
        kind = kind.model_fields[step].annotation if _is_section(kind) else get_args(kind)[-1]
        branches = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        kind = next((b for b in branches if _is_section(b) or get_origin(b) in (dict, list)), None)
        if kind is None:
            return []
    return list(kind.model_fields) if _is_section(kind) else []


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def load(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and apply ``a.b=value`` overrides.

    Raises:
        JobError: the file is missing, unreadable, or no valid job.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
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
                values = yaml.load(text, _YamlLoader)
            case ".json":
                values = json.loads(text, object_pairs_hook=_without_twins)
            case suffix:
                raise JobError(f"A job is a .toml, .yaml or .json file, not {suffix!r} ({path}).")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JobError(f"{path} is not well formed: {error}") from None
    if not isinstance(values, dict):
        raise JobError(f"{path} holds no table of settings.")
    directory = values.get("directory", ".")
    if isinstance(directory, str):
        values["directory"] = str((path.parent / directory).absolute())
    return parse(override(values, overrides))


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with each ``a.b=value`` set; a value is read as TOML, or else taken as text.

    >>> override({"train": {"lr": 1}}, ["train.lr=0.5", "name=x"])
    {'train': {'lr': 0.5}, 'name': 'x'}
    """
    result: dict[str, Any] = copy.deepcopy(dict(values))
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not all(key.split(".")):
            raise JobError(f"--set takes key=value with a dotted key, not {item!r}.")
        *path, last = key.split(".")
        table = result
        for step in path:
            inner = table.setdefault(step, {})
            if isinstance(inner, str) and step in ("recipe", "strategy", "partition", "workflow"):
                inner = table[step] = {"name": inner}
            if not isinstance(inner, dict):
                raise JobError(f"--set {key}: {step!r} is not a table.")
            table = inner
        table[last] = _value(text)
    return result


def _value(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | str | list | dict) else text


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's core schema, as in JSON: 1e-3 is a number; yes, no and dates are text; a key stands once."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own declaration)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _without_twins([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return dict(super().construct_mapping(node, deep=True))


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+0123456789."),
):
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice in one table")
        result[key] = value
    return result


def schema() -> dict[str, Any]:
    """Return the JSON schema of a job."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}
