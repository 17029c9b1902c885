# SPDX-License-Identifier: Apache-2.0
"""The job: the same value however it is written, and one clear line for everything that is wrong with it."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hansa.core import config, storage
from hansa.core.config import Algorithm, Choice, Job
from hansa.errors import JobError

ROOT = Path(__file__).parents[2]
LEAST: dict[str, Any] = {"name": "tiny", "recipe": "causal-lm"}

TOML = """
format = 1
name = "tiny"
rounds = 3
recipe = { name = "causal-lm", block = 64 }
strategy = { name = "fedprox", mu = 1e-3 }
filters = ["clip", { name = "cast", dtype = "float16" }]

[model]
base = "base"
adapter = { method = "lora", r = 4 }
config = { model_type = "llama", initializer_range = 1e-2, tie = false, pad = -1 }

[data]
train = { berlin = "b.jsonl", riga = "r.jsonl" }
labels = ["no", "yes", "2024-01-01", "010"]

[train]
lr = 2e-2
steps = 5

[cohort]
sample = 1.0
quorum = 2

[engine.sites.berlin]
cpus = 2
"""

YAML = """
# what YAML 1.1 would read as false, true, a date and 8 is text, and 1e-3 is a number
format: 1
name: tiny
rounds: 3
recipe: {name: causal-lm, block: 64}
strategy: &strategy
  name: fedprox
  mu: 1e-3
filters:
  - clip
  - {name: cast, dtype: float16}
model:
  base: base
  adapter: {method: lora, r: 4}
  config: {model_type: llama, initializer_range: 1e-2, tie: false, pad: -1}
data:
  train:
    berlin: b.jsonl
    riga: r.jsonl
  labels: [no, yes, 2024-01-01, 010]
train: {lr: 2e-2, steps: 5}
cohort: {sample: 1.0, quorum: 2}
engine:
  sites:
    berlin: {cpus: 2}
"""


def problems(**values: Any) -> list[str]:
    with pytest.raises(JobError) as caught:
        Job(**values)
    assert caught.value.exit_code == 2
    first, *lines = str(caught.value).splitlines()
    assert first == "The job is not valid:"
    return [line.removeprefix("  ") for line in lines]


# --- one value -----------------------------------------------------------------------------------------------


def test_toml_yaml_json_and_python_give_the_same_job(tmp_path: Path) -> None:
    values = tomllib.loads(TOML)
    (tmp_path / "job.toml").write_text(TOML)
    (tmp_path / "job.yaml").write_text(YAML)
    (tmp_path / "job.YML").write_text(YAML)
    (tmp_path / "job.json").write_text(json.dumps(values))
    expected = Job(**values, directory=str(tmp_path))
    for name in ("job.toml", "job.yaml", "job.YML", "job.json"):
        assert config.load(tmp_path / name) == expected, name
    assert expected.strategy == Algorithm(name="fedprox", mu=1e-3)
    assert expected.strategy.options == {"mu": 0.001}
    assert expected.filters[0] == Choice(name="clip")
    assert expected.data is not None
    assert expected.data.labels == ["no", "yes", "2024-01-01", "010"]


def test_a_job_says_what_is_left_out() -> None:
    job = Job(**LEAST)
    assert (job.format, job.rounds, job.strategy.name, job.train.lr) == (1, 10, "fedavg", 1e-3)
    assert job == Job(name="tiny", recipe=Choice(name="causal-lm"), rounds=10)


def test_a_job_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Job(**LEAST).rounds = 3  # type: ignore[misc]


@given(
    rounds=st.integers(1, 10**6),
    seed=st.integers(0, 2**63 - 1),
    sample=st.integers(1, 9) | st.floats(0.01, 1.0),
    lr=st.floats(1e-300, 1e300),
    strategy=st.text(st.characters(codec="utf-8"), min_size=1),
    options=st.dictionaries(
        st.from_regex(r"[a-z]{2,8}", fullmatch=True).filter(lambda key: key != "name"),
        st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        max_size=3,
    ),
    labels=st.none() | st.lists(st.text(st.characters(codec="utf-8"))),
)
def test_the_resolved_job_gives_the_same_job(
    rounds: int, seed: int, sample: float, lr: float, strategy: str, options: dict[str, Any], labels: Any
) -> None:
    job = Job(
        **LEAST,
        rounds=rounds,
        seed=seed,
        cohort={"sample": sample},
        train={"lr": lr},
        strategy={"name": strategy, **options},
        data={"train": "x", "labels": labels},
    )
    back = config.parse(json.loads(job.to_json()))
    assert back == job
    assert type(back.cohort.sample) is type(sample)


def test_the_resolved_job_survives_the_disk(tmp_path: Path) -> None:
    job = Job(**LEAST, cohort={"sample": 1.0, "quorum": 1})
    storage.write_atomic(tmp_path / "job.json", job.to_json().encode())
    assert config.parse(storage.read_json(tmp_path / "job.json")) == job
    assert config.load(tmp_path / "job.json").cohort == job.cohort


# --- paths ---------------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "a.toml").write_text('name = "a"\nrecipe = "r"\n')
    (tmp_path / "jobs" / "b.toml").write_text('name = "a"\nrecipe = "r"\ndirectory = "../data"\n')
    monkeypatch.chdir(tmp_path)
    job = config.load(Path("jobs/a.toml"))
    other = config.load(Path("jobs/b.toml"))
    monkeypatch.chdir("/")
    assert job.path("x.csv") == tmp_path / "jobs" / "x.csv"
    assert other.path("x.csv").resolve() == tmp_path / "data" / "x.csv"
    assert job.path("/x.csv") == Path("/x.csv")
    assert job.path("~/x.csv") == Path.home() / "x.csv"


def test_the_home_of_nobody_is_a_job_error() -> None:
    with pytest.raises(JobError, match="a user that this machine does not know"):
        Job(**LEAST).path("~no-such-user-here/x")


# --- override ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("rounds=5", {"rounds": 5}),
        ("train.lr=1e-3", {"train": {"lr": 0.001, "steps": 2}}),
        ("train.lr=0.5", {"train": {"lr": 0.5, "steps": 2}}),
        ("engine.sites.berlin.cpus=2", {"engine": {"sites": {"berlin": {"cpus": 2}}}}),
        ("name=new", {"name": "new"}),
        ('name="5"', {"name": "5"}),
        ("name=", {"name": ""}),
        ("name=a=b", {"name": "a=b"}),
        ("name=2024-01-01", {"name": "2024-01-01"}),
        ("model.base=/some/path with space", {"model": {"base": "/some/path with space"}}),
        ("baselines.local=true", {"baselines": {"local": True}}),
        ('data.labels=["a", "b"]', {"data": {"labels": ["a", "b"]}}),
        ("strategy={name='fedprox', mu=0.1}", {"strategy": {"name": "fedprox", "mu": 0.1}}),
        ("strategy.mu=0.1", {"strategy": {"name": "fedavg", "mu": 0.1}}),
        ("strategy=scaffold", {"strategy": "scaffold"}),
        ("deep=" + "[" * 5000, {"deep": "[" * 5000}),
    ],
)
def test_override(item: str, expected: dict[str, Any]) -> None:
    values: dict[str, Any] = {"name": "old", "strategy": "fedavg", "train": {"lr": 1, "steps": 2}}
    assert config.override(values, [item]) == {**values, **expected}
    assert values == {"name": "old", "strategy": "fedavg", "train": {"lr": 1, "steps": 2}}, "the original is kept"


@pytest.mark.parametrize("item", ["rounds", "=5", ".a=5", "a..b=5", "a.=5", ""])
def test_an_override_without_a_key_and_a_value_is_refused(item: str) -> None:
    with pytest.raises(JobError, match="--set takes key=value"):
        config.override({}, [item])


@pytest.mark.parametrize("item", ["name.x=1", "filters.0.norm=1", "name.x.y=1"])
def test_an_override_inside_something_that_is_no_table_is_refused(item: str) -> None:
    with pytest.raises(JobError, match="is not a table"):
        config.override({"name": "a", "filters": ["clip"]}, [item])


def test_later_overrides_win_and_overrides_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(TOML)
    job = config.load(tmp_path / "job.toml", ["train.lr=1.0", "rounds=7", "train.lr=2.0"])
    assert (job.train.lr, job.rounds, job.train.steps) == (2.0, 7, 5)


# --- what is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "where", "suggestion"),
    [
        ({"round": 3}, "round", "rounds"),
        ({"Rounds": 3}, "Rounds", "rounds"),
        ({"lr": 0.1}, "lr", "train.lr"),
        ({"train": {"optimiser": "sgd"}}, "train.optimiser", "optimizer"),
        ({"model": {"bsae": "x"}}, "model.bsae", "base"),
        ({"data": {"train": "x", "lables": []}}, "data.lables", "labels"),
        ({"engine": {"sites": {"berlin": {"cpu": 1}}}}, "engine.sites.berlin.cpu", "cpus"),
        ({"cohort": {"quorom": 1}}, "cohort.quorom", "quorum"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(values: dict[str, Any], where: str, suggestion: str) -> None:
    assert problems(**LEAST, **values) == [f"{where}: unknown key. Did you mean {suggestion!r}?"]


def test_an_unknown_key_like_no_other_lists_the_known_ones() -> None:
    (line,) = problems(**LEAST, output={"zzz": 1})
    assert line == f"output.zzz: unknown key. Known keys: {', '.join(config.OutputSection.model_fields)}."


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rounds": 0}, "rounds: Input should be greater than 0 (got 0)."),
        ({"rounds": "many"}, "rounds: Input should be a valid integer"),
        ({"name": "a/b"}, "name: String should match pattern"),
        ({"name": "../x"}, "name: String should match pattern"),
        ({"format": 2}, "format: this release reads jobs of format 1 only (got 2)."),
        ({"format": "1"}, "format: this release reads jobs of format 1 only (got '1')."),
        ({"seed": 2**63}, "seed: Input should be less than"),
        ({"train": {"lr": math.nan}}, "train.lr: Input should be a finite number (got nan)."),
        ({"train": {"lr": math.inf}}, "train.lr: Input should be a finite number (got inf)."),
        ({"train": {"lr": -1}}, "train.lr: Input should be greater than 0 (got -1)."),
        ({"train": {"steps": 1, "epochs": 1}}, "train: give steps or epochs, not both"),
        ({"train": 5}, "train: a table of settings is needed here (got 5)."),
        ({"strategy": 5}, "strategy: a table of settings is needed here (got 5)."),
        ({"strategy": {"mu": 1}}, "strategy.name: this key is needed."),
        ({"filters": "clip"}, "filters: Input should be a valid list (got 'clip')."),
        ({"filters": 5}, "filters: Input should be a valid list (got 5)."),
        ({"filters": ["clip", {}]}, "filters.1.name: this key is needed."),
        ({"data": {}}, "data.train: this key is needed."),
        ({"data": {"train": "x", "labels": [True]}}, "data.labels.0: Input should be a valid string (got True)."),
        ({"data": {"train": {"a b": "x"}}}, "data.train.a b: String should match pattern"),
        ({"data": {"train": {"a": 5}}}, "data.train.a: Input should be a valid string (got 5)."),
        ({"engine": {"name": "gpu"}}, "engine.name: Input should be 'local', 'processes' or 'batched' (got 'gpu')."),
        ({"cohort": {"sample": 0}}, "cohort.sample: "),
        ({"cohort": {"sample": 1.5}}, "cohort.sample: "),
    ],
)
def test_a_wrong_value_is_named_once_in_words(values: dict[str, Any], expected: str) -> None:
    (line,) = problems(**{**LEAST, **values})
    assert line.startswith(expected)


def test_the_branches_of_a_union_share_a_line() -> None:
    (line,) = problems(**LEAST, data={"train": 5})
    assert line.startswith("data.train: Input should be a valid string; or Input should be a valid list; or ")
    assert line.endswith("(got 5).")


def test_every_problem_is_told_and_long_values_are_cut() -> None:
    lines = problems(name="x" * 1000, strategy={}, oops=1)
    assert {line.partition(":")[0] for line in lines} == {"name", "recipe", "strategy.name", "oops"}
    assert max(map(len, lines)) < 250


def test_a_job_in_python_raises_what_a_job_file_does(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('name = "a"')
    for make in (
        lambda: Job(name="a"),
        lambda: config.parse({"name": "a"}),
        lambda: config.load(tmp_path / "job.toml"),
    ):
        with pytest.raises(JobError, match="recipe: this key is needed"):
            make()


def test_keys_that_are_no_text_are_refused() -> None:
    with pytest.raises(JobError, match="5: a key must be text"):
        config.parse({**LEAST, 5: 6})  # type: ignore[dict-item]
    (line,) = problems(**LEAST, train={5: 6})
    assert line.startswith("train.5: ")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("job.toml", "name = ", "is not well formed"),
        ("job.toml", "a = 1\na = 2", "is not well formed"),
        ("job.toml", "a = " + "9" * 5000, "is not well formed"),
        ("job.toml", "a = " + "[" * 100_000, "is not well formed"),
        ("job.json", "{", "is not well formed"),
        ("job.json", '{"a": 1, "a": 2}', "'a' stands twice"),
        ("job.json", "[" * 100_000, "is not well formed"),
        ("job.json", "[]", "holds no table"),
        ("job.yaml", "a: [", "is not well formed"),
        ("job.yaml", "a: 1\nb:\n  c: 1\n  c: 2", "'c' stands twice"),
        ("job.yaml", "{[a]: 1}", "is not well formed"),
        ("job.yaml", "a: !!python/object/apply:os.system ['exit 1']", "is not well formed"),
        ("job.yaml", "", "holds no table"),
        ("job.yaml", "- a", "holds no table"),
        ("job.txt", "", "a .toml, .yaml or .json file, not '.txt'"),
        ("job", "", "a .toml, .yaml or .json file"),
    ],
)
def test_a_file_that_is_no_job(name: str, text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(JobError, match=expected) as caught:
        config.load(tmp_path / name)
    assert name in str(caught.value)


def test_a_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text("")
    with pytest.raises(JobError, match=r"There is no job file .*Did you mean 'federation.toml'\?"):
        config.load(tmp_path / "federaton.toml")
    with pytest.raises(JobError, match="There is no job file"):
        config.load(tmp_path / "none" / "job.toml")


def test_an_unreadable_file_is_a_job_error(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(JobError, match="can't be read"):
        config.load(tmp_path / "job.toml")
    with pytest.raises(JobError, match="can't be read"):
        config.load(tmp_path)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('name = "a"\nrecipe = "r"', encoding="utf-8-sig")
    assert config.load(tmp_path / "job.toml").name == "a"


def test_yaml_merges_and_aliases(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: a\nrecipe: &r {name: x, lr: 1e-3, n: 1}\npartition:\n  <<: *r\n  name: iid\n  n: 2\n"
    )
    assert config.load(tmp_path / "job.yaml").partition == Choice(name="iid", lr=0.001, n=2)


@pytest.mark.parametrize("text", ["1e-3", "1.5", "-2.", ".5", "1E5", "3", "-7", "0", "true", "null"])
def test_yaml_numbers_are_those_of_json_and_toml(text: str) -> None:
    value = yaml.load(text, config._YamlLoader)
    expected = {"true": True, "null": None}.get(text) if text in ("true", "null") else float(text)
    assert value == expected
    assert isinstance(value, int) == (text in ("3", "-7", "0", "true"))


# --- the schema ----------------------------------------------------------------------------------------------


def test_the_schema_is_a_json_schema_and_published() -> None:
    schema = config.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    published = json.loads((ROOT / "docs" / "job.schema.json").read_text())
    assert published == schema, "write it again with: make schema"


@pytest.mark.parametrize(
    "values",
    [
        LEAST,
        tomllib.loads(TOML),
        {**LEAST, "strategy": "fedavg", "partition": {"name": "iid", "sites": 4}, "filters": ["a", {"name": "b"}]},
        {**LEAST, "data": {"train": ["a", "b"], "test": {"x": "y"}}},
        json.loads(Job(**LEAST).to_json()),
    ],
    ids=str,
)
def test_the_schema_accepts_what_a_job_accepts(values: dict[str, Any]) -> None:
    Job(**values)
    jsonschema.validate(values, config.schema(), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "a"},
        {**LEAST, "oops": 1},
        {**LEAST, "rounds": 0},
        {**LEAST, "strategy": 5},
        {**LEAST, "strategy": {"mu": 1}},
        {**LEAST, "filters": "clip"},
        {**LEAST, "format": 2},
        {**LEAST, "train": {"optimiser": "sgd"}},
        {**LEAST, "engine": {"sites": {"a": {"cpu": 1}}}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_a_job_refuses(values: dict[str, Any]) -> None:
    problems(**values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, config.schema(), jsonschema.Draft202012Validator)
