# SPDX-License-Identifier: Apache-2.0
"""What a site allows: of jobs, of plans, and of updates."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hansa.bundle import Bundle
from hansa.core import config, wire
from hansa.core.tree import Spec
from hansa.core.values import Plan, Update
from hansa.errors import PolicyError
from hansa.pki.identity import Identity
from hansa.runs.baselines import course_form
from hansa.secagg.protocol import Terms
from hansa.secagg.ring import SCALARS, WEIGHT, Range, encoding
from hansa.site import policy
from hansa.site.settings import Policy, SiteSettings
from hansa.transport.messages import Assignment
from members import members
from test_bundle import CODE


@pytest.fixture(scope="module")
def ana(tmp_path_factory) -> Identity:
    return members(tmp_path_factory.mktemp("federation")).lead.identity


def settings(**values) -> SiteSettings:
    return SiteSettings(server="127.0.0.1:1", **values)


def job(**values) -> config.Job:
    return config.parse({"name": "toy", "recipe": "causal-lm", **values})


def bundle(ana: Identity, files=(), **values) -> Bundle:
    return Bundle(job(**values), ana, dict.fromkeys(files, (1, "0" * 64)), datetime.now(UTC))


@pytest.mark.parametrize(("values", "where"), CODE)
def test_code_of_strangers_is_refused(ana, values, where):
    """Every way of bringing code, by a signer that the site does not name, and by one that it does."""
    recipe = values.get("recipe", {"name": "causal-lm"})
    name = recipe if isinstance(recipe, str) else recipe["name"]
    for recipes in (None, ["causal-lm", "script"]):
        with pytest.raises(PolicyError, match=r"ana|not allowed"):
            policy.decide(bundle(ana, **values), "s0", settings(policy={"recipes": recipes}))
    trusting = settings(policy={"recipes": [name], "signers": ["ana"]})
    policy.decide(bundle(ana, **values), "s0", trusting)


def test_code_that_the_site_has_installed_and_named(ana):
    named = settings(policy={"recipes": ["ours:build"], "modules": ["ours:strategy"]})
    policy.decide(bundle(ana, recipe={"name": "ours:build"}, strategy={"name": "ours:strategy"}), "s0", named)
    for values in (
        {"strategy": {"name": "ours:build"}},
        {"filters": ["os:system"]},
        {"model": {"factory": "ours:strategy"}},
    ):
        with pytest.raises(PolicyError, match="code of its own"):
            policy.decide(bundle(ana, **{"recipe": {"name": "ours:build"}, **values}), "s0", named)
    with pytest.raises(PolicyError, match=r"files.net.py"):
        policy.decide(bundle(ana, recipe={"name": "ours:build"}, files=["net.py"]), "s0", named)


def test_a_job_that_is_handed_on_names_its_sites(ana):
    """Or a quorum that is a share of them would be a share of nobody knows how many."""
    for values in ({}, {"cohort": {"sites": []}}, {"cohort": {"quorum": 2}}):
        with pytest.raises(PolicyError, match=r"does not name them.*cohort.sites"):
            policy.decide(bundle(ana, workflow="cyclic", **values), "s0", settings())
    policy.decide(bundle(ana, workflow="cyclic", cohort={"sites": ["s0", "s1"]}), "s0", settings())


def test_scripts_need_a_signer_even_where_the_recipe_is_allowed(ana):
    allowed = settings(policy={"recipes": ["script"], "modules": ["script"]})
    with pytest.raises(PolicyError, match="runs code of: nobody"):
        policy.decide(bundle(ana, recipe={"name": "script", "path": "t.py"}), "s0", allowed)


def test_recipes_rounds_and_threads(ana):
    with pytest.raises(PolicyError, match="it allows: token-classification"):
        policy.decide(bundle(ana), "s0", settings(policy={"recipes": ["token-classification"]}))
    with pytest.raises(PolicyError, match="allows 9"):
        policy.decide(bundle(ana), "s0", settings(policy={"max_rounds": 9}))
    four = {"engine": {"threads": 4, "sites": {"s1": {"cpus": 1}}}}
    with pytest.raises(PolicyError, match=r"engine.sites.s0.cpus"):
        policy.decide(bundle(ana, **four), "s0", settings(resources={"cpus": 3}))
    policy.decide(bundle(ana, **four), "s1", settings(resources={"cpus": 3}))
    policy.decide(bundle(ana), "s0", settings())


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "the filter 'clip'"),
        ({"filters": [{"name": "clip", "max_norm": 2.0}]}, "at most 1"),
        ({"filters": [{"name": "clip"}]}, "None"),
        ({"filters": [{"name": "clip", "max_norm": True}]}, "True"),
        ({"filters": [{"name": "clip", "max_norm": "0.1"}]}, "0.1"),
        ({"filters": [{"name": "clip", "max_norm": 1.0}], "baselines": {"local": True}}, "without filters"),
    ],
)
def test_required_filters(ana, values, reason):
    asked = settings(policy={"require_filters": {"clip": {"max_norm": 1.0}}})
    with pytest.raises(PolicyError, match=reason):
        policy.decide(bundle(ana, **values), "s0", asked)
    policy.decide(bundle(ana, filters=[{"name": "clip", "max_norm": 1.0}]), "s0", asked)


def never(bundle):
    return "not on a Sunday"


def always(bundle):
    assert bundle.signer.name == "ana"


def broken(bundle):
    raise ZeroDivisionError("x")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("never", "not on a Sunday"), ("broken", "ZeroDivisionError"), ("missing", "could not be asked")],
)
def test_a_plugin_of_the_sites_own(ana, name, reason, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "site_rules", sys.modules[__name__])
    with pytest.raises(PolicyError, match=reason):
        policy.decide(bundle(ana), "s0", settings(policy={"plugin": f"site_rules:{name}"}))
    policy.decide(bundle(ana), "s0", settings(policy={"plugin": "site_rules:always"}))


def test_data_by_name_only(tmp_path):
    here = settings(data={"notes": {"train": "notes/*.jsonl"}, "more": {"train": "/d/m", "test": "/d/t"}})
    found = policy.localised(job(data={"train": "site:notes"}), "s0", here, tmp_path)
    assert found.data.train == {"s0": str(tmp_path / "notes/*.jsonl")}
    assert found.data.test is None
    assert policy.localised(job(data={"train": "site:more"}), "s0", here, tmp_path).data.test == {"s0": "/d/t"}
    both = policy.localised(job(data={"train": "site:notes", "test": "site:more"}), "s0", here, tmp_path)
    assert both.data.test == {"s0": "/d/m"}
    split = job(data={"train": "site:notes"}, partition={"name": "iid", "sites": 3})
    assert policy.localised(split, "s0", here, tmp_path).partition is None
    for data in (
        {"train": "/etc/passwd"},
        {"train": {"s0": "/etc/passwd"}},
        {"train": "site:notes", "test": "/etc/passwd"},
    ):
        with pytest.raises(PolicyError, match="by name only"):
            policy.localised(job(data=data), "s0", here, tmp_path)
    with pytest.raises(PolicyError, match="Did you mean 'notes'"):
        policy.localised(job(data={"train": "site:note"}), "s0", here, tmp_path)


@pytest.mark.parametrize("name", ["/models/secret", "../../secret", "~/secret", "a/../../b"])
def test_models_by_name_or_with_the_job(tmp_path, name):
    here = settings(models={"Qwen/Qwen3-0.6B": "qwen"})
    for model in ({"base": name}, {"tokenizer": name}, {"factory": f"{name}/w.safetensors"}):
        with pytest.raises(PolicyError, match=r"Qwen/Qwen3-0.6B"):
            policy.localised(job(model=model), "s0", here, tmp_path)
    with pytest.raises(PolicyError, match=r"recipe.path"):
        policy.localised(job(recipe={"name": "script", "path": name}), "s0", here, tmp_path)
    found = policy.localised(job(model={"base": "Qwen/Qwen3-0.6B", "tokenizer": "bytes"}), "s0", here, tmp_path)
    assert (found.model.base, found.model.tokenizer) == (str(tmp_path / "qwen"), "bytes")
    assert policy.localised(job(model={"base": "base"}), "s0", here, tmp_path).model.base == "base"


# Plans


def given(**values) -> Assignment:
    fields = {"task": "t", "job": "toy-0001", "bundle": "0" * 64, "kind": "train", "course": "toy", "round": 2}
    return Assignment(**{**fields, "plan": "0" * 64, "inline": b"", **values})


PARAMS = {"a": np.ones(10, np.float32), "n": np.zeros(1, np.int64)}
PLAN = Plan("toy", 2, "train", 5, PARAMS, seed=0)


@pytest.mark.parametrize(
    "change",
    [{"round": 3}, {"task": "evaluate"}, {"job": "local.s0"}, {"seed": 1}, {"inbox": "x"}, {"outbox": "../../x"}],
)
def test_plans_of_something_else(change):
    policy.check_plan(PLAN, job(), given(), "s0")
    with pytest.raises(PolicyError):
        policy.check_plan(dataclasses.replace(PLAN, **change), job(), given(), "s0")


@pytest.mark.parametrize(("course", "round"), [("toy", 0), ("toy", 11), ("local.s0", 0), ("local.s0", 11), ("base", 1)])
def test_plans_beyond_the_signed_rounds(course, round):
    plan = dataclasses.replace(PLAN, job=course, round=round, task="evaluate")
    with pytest.raises(PolicyError, match="signed with 10 rounds"):
        policy.check_plan(plan, job(), given(course=course, round=round, kind="evaluate"), "s0")


def test_the_base_model_is_of_round_0():
    plan = dataclasses.replace(PLAN, job="base", round=0, task="evaluate")
    policy.check_plan(plan, job(), given(course="base", round=0, kind="evaluate"), "s0")


@pytest.mark.parametrize(
    ("course", "kind", "baselines"),
    [
        ("base", "train", {"base": True}),
        ("base", "evaluate", {"base": False}),
        ("local.s1", "train", {"local": True}),
        ("local.anything", "train", {"local": True}),
        ("local.s0", "train", {"local": False}),
        ("local.s1", "evaluate", {"local": False}),
        ("central", "train", {"central": True}),
    ],
)
def test_baselines_have_no_filters_so_they_are_narrow(course, kind, baselines):
    signed = job(filters=[{"name": "clip", "max_norm": 1.0}], baselines=baselines)
    with pytest.raises(PolicyError, match="no baseline"):
        course_form(signed, course, kind, "s0")
    assert course_form(signed, "toy", "train", "s0").filters


def test_what_a_baseline_is_for():
    signed = job(filters=[{"name": "clip", "max_norm": 1.0}], baselines={"base": True, "local": True})
    for course, kind in (
        ("base", "evaluate"),
        ("local.s0", "train"),
        ("local.s0", "evaluate"),
        ("local.s1", "evaluate"),
    ):
        form = course_form(signed, course, kind, "s0")
        assert (form.strategy["name"], form.filters) == ("fedavg", [])


# Updates


def update(tmp_path: Path, **changes) -> Path:
    parts = {"delta": {"a": np.full(10, 0.5, np.float32)}}
    made = dataclasses.replace(Update("s0", 2, 5, parts, 1.0, {"loss_sum": 1.0}), **changes)
    path = tmp_path / "update.hansa"
    wire.spool(made, path)
    return path


def checked(path: Path, plan: Plan = PLAN, rules: Policy | None = None, **values) -> None:
    with path.open("rb") as file:
        policy.check_update(file, path.stat().st_size, plan, job(**values), "s0", rules or Policy())


def test_a_sound_update_may_leave(tmp_path):
    checked(update(tmp_path))
    with_control = dataclasses.replace(PLAN, parts={"control": {"a": np.zeros(10, np.float32)}})
    two = {"delta": {"a": np.ones(10, np.float32)}, "control": {"a": np.ones(10, np.float32)}}
    checked(update(tmp_path, parts=two), with_control)
    checked(update(tmp_path, parts={}), dataclasses.replace(PLAN, task="evaluate"))


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "s1"},
        {"round": 3},
        {"version": 6},
        {"weight": 0.0},
        {"weight": -1.0},
        {"sums": {str(i): 1.0 for i in range(2000)}},
        {"parts": {"delta": {"a": np.ones(12, np.float32)}}},
        {"parts": {"delta": {"a": np.ones(10, np.float32)}, "extra": {"a": np.ones(1, np.float32)}}},
        {"parts": {"delta": {"a": np.full(10, np.nan, np.float32)}}},
        {"parts": {"delta": {"a": np.full(10, np.inf, ml_dtypes.bfloat16)}}},
        {"parts": {"delta": {"x" * 100_000: np.ones(1, np.float32)}}},
    ],
)
def test_updates_that_stay_here(tmp_path, changes):
    with pytest.raises(PolicyError):
        checked(update(tmp_path, **changes))


def test_an_evaluation_carries_no_tensors(tmp_path):
    with pytest.raises(PolicyError, match="parts"):
        checked(update(tmp_path), dataclasses.replace(PLAN, task="evaluate"))


def test_that_a_filter_was_applied_is_seen_in_the_update(tmp_path):
    rules = Policy(require_filters={"clip": {"max_norm": 1.0}})
    norm = float(np.sqrt(10 * 0.25))
    weighed = {"delta": {"a": np.full(10, 0.5 * 3, np.float32)}}
    for changes in ({}, {"parts": weighed, "weight": 3.0}):
        with pytest.raises(PolicyError, match=f"norm {norm:g}"):
            checked(update(tmp_path, **changes), rules=rules)
    inside = {"delta": {"a": np.full(10, 3 / np.sqrt(10), np.float32)}}
    checked(update(tmp_path, parts=inside, weight=3.0), rules=rules)
    with pytest.raises(PolicyError, match="norm 3"):
        checked(update(tmp_path, parts=inside, weight=1.0), rules=rules)
    rounded = {"delta": {"a": (np.full(10, 3 / np.sqrt(10)) * 1.003).astype(ml_dtypes.bfloat16)}}
    checked(update(tmp_path, parts=rounded, weight=3.0), rules=rules)


def test_an_unweighed_part_counts_as_it_is(tmp_path):
    rules = Policy(require_filters={"clip": {"max_norm": 1.0}})
    plan = dataclasses.replace(PLAN, parts={"control": {"a": np.zeros(10, np.float32)}})
    parts = {"delta": {"a": np.zeros(10, np.float32)}, "control": {"a": np.full(10, 1.0, np.float32)}}
    plain = {"strategy": {"name": "scaffold", "objective": "sites"}, "train": {"optimizer": "sgd"}}
    with pytest.raises(PolicyError, match=r"norm 3.16"):
        checked(update(tmp_path, parts=parts, weight=1000.0), plan, rules, **plain)


def test_behind_a_robust_rule_no_part_counts_as_weighed(tmp_path):
    rules = Policy(require_filters={"clip": {"max_norm": 1.0}})
    robust = {"strategy": {"name": "fedavg", "robust": {"rule": "median", "malicious": 1}}}
    parts = {"delta": {"a": np.full(10, 1.0, np.float32)}}
    checked(update(tmp_path, parts=parts, weight=1000.0), rules=rules)
    with pytest.raises(PolicyError, match=r"norm 3.16"):
        checked(update(tmp_path, parts=parts, weight=1000.0), rules=rules, **robust)


MASKS = {"secure_aggregation": {"minimum": 4}}
KEYS = {"homomorphic_encryption": {"minimum": 4, "key_site": "a"}}


@pytest.mark.parametrize(
    ("rules", "values", "reason"),
    [
        ({"privacy": {"summed_with": 3}}, {}, r"no \[secure_aggregation\]"),
        ({"privacy": {"summed_with": 5}}, KEYS, r"homomorphic_encryption.minimum = 4; this site's"),
        ({"privacy": {"key_sites": ["b"]}}, KEYS, "key_site = a; this site trusts with the key: b"),
        ({"privacy": {"key_sites": []}}, {"homomorphic_encryption": {}}, "none named; this site .*: nobody"),
        ({"privacy": {"summed_with": 5}}, MASKS, "minimum = 4; .* at least 5"),
        ({"privacy": {"summed_with": 4}}, MASKS, None),
        ({"policy": {"require_filters": {"clip": {"max_norm": 1.0}}}}, MASKS, None),
        (
            {"policy": {"require_filters": {"clip": {"max_norm": 1.0}}, "modules": ["ours:f"]}},
            {**MASKS, "filters": [{"name": "clip", "max_norm": 1.0}, "ours:f"]},
            "does not show that it was applied",
        ),
        ({"policy": {"modules": ["ours:s"]}}, {**MASKS, "strategy": {"name": "ours:s"}}, "known to its own code only"),
    ],
)
def test_what_a_site_asks_of_masks(ana, rules, values, reason):
    given = bundle(ana, **{"filters": [{"name": "clip", "max_norm": 1.0}], **values})
    if reason is None:
        policy.decide(given, "s0", settings(**rules))
        return
    with pytest.raises(PolicyError, match=reason):
        policy.decide(given, "s0", settings(**rules))


def test_a_budget_held_against_examples_needs_to_see_their_number(ana):
    rules = {
        "data": {"notes": {"train": "notes.jsonl"}},
        "privacy": {"budgets": {"notes": {"epsilon": 8.0, "delta": 1e-5, "unit": "example", "adversary": "server"}}},
    }
    private = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    values = {"data": {"train": "site:notes"}, "privacy": private, "baselines": {"local": False}}
    policy.decide(bundle(ana, **values), "s0", settings(**rules))
    with pytest.raises(PolicyError, match="in a secret sum their number does not show"):
        policy.decide(bundle(ana, **values, **MASKS), "s0", settings(**rules))


def session(number: int, sites: tuple[str, ...]) -> Terms:
    ring = encoding({SCALARS: {WEIGHT: Range(0.0, 1.0, 2**-20)}}, len(sites))
    return Terms("toy", number, 1, sites, ring)


@pytest.mark.parametrize(
    ("number", "sites", "task"),
    [
        (4, ("a", "b", "c", "d"), "train"),
        (5, ("a", "b", "c", "d"), "evaluate"),
        (4, ("a", "b", "c"), None),  # the server leaves one out
        (5, ("a", "b", "c", "d", "e"), None),
        (6, ("a", "b", "c", "d"), None),  # another round's
    ],
)
def test_a_session_is_of_the_round_and_of_the_sites_that_were_signed(number, sites, task):
    signed = job(rounds=3, cohort={"sites": ["d", "c", "b", "a"]}, **MASKS)
    given = Assignment("t", "toy-1", "0" * 64, "advertise", "toy", 2, "p", b"")
    if task is not None:
        assert policy.check_session(session(number, sites), signed, given) == task
        return
    with pytest.raises(PolicyError, match=r"another's|has it ask a, b, c, d"):
        policy.check_session(session(number, sites), signed, given)


def test_a_session_of_a_round_that_the_job_does_not_have():
    given = Assignment("t", "toy-1", "0" * 64, "advertise", "toy", 4, "p", b"")
    with pytest.raises(PolicyError, match="another's"):
        policy.check_session(session(8, ("a", "b", "c")), job(rounds=3, **MASKS), given)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight": 2.0},
        {"sums": {"loss_sum": 1.0}},
        {"logged": {"loss": ((1, 0.5),)}},
        {"parts": {"masked": {"vector": np.zeros(3, np.uint32)}}},
        {"parts": {"delta": {"w": np.zeros(4, np.float32)}}},
        {"site": "s1"},
        {"round": 2},
    ],
)
def test_only_one_masked_vector_leaves(tmp_path, changes):
    terms = session(2, ("a", "b", "c"))
    vector = np.zeros(terms.encoding.size, terms.encoding.dtype)
    values = {
        "site": "s0",
        "round": 1,
        "version": 0,
        "parts": {"masked": {"vector": vector}},
        "weight": 1.0,
        "sums": {},
    }
    wire.spool(Update(**{**values, **changes}), tmp_path / "update")
    plan = Plan("toy", 1, "train", 0, {"w": np.zeros(4, np.float32)})
    layout = {"masked": {"vector": Spec(vector.dtype.name, vector.shape)}}
    if not changes:
        policy.check_hidden(tmp_path / "update", plan, "s0", layout)
        return
    with pytest.raises(PolicyError, match="something else than a masked or encrypted update"):
        policy.check_hidden(tmp_path / "update", plan, "s0", layout)
    with pytest.raises(PolicyError, match="something else"):
        policy.check_hidden(tmp_path / "update", plan, "s0", None)
