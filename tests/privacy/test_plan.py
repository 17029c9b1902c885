# SPDX-License-Identifier: Apache-2.0
"""What a plan promises to whom, by mechanism, and what it refuses."""

from typing import Any

import pytest

from hansa.core.config import Job, PrivacySection
from hansa.errors import JobError, PrivacyError
from hansa.privacy.accounting import Release, epsilon
from hansa.privacy.plan import FEW_SITES, NOT_COVERED, PrivacyPlan, Terms, plan_of, steps_of, terms_of_job

SITES = 1000
DELTA = 1e-6


def job(privacy: dict[str, Any] | None, rounds: int = 20, **values: Any) -> Job:
    section = None if privacy is None else {"clip": 1.0, "delta": DELTA, **privacy}
    return Job(name="plan", rounds=rounds, recipe={"name": "script"}, privacy=section, **values)


def planned(privacy: dict[str, Any], sites: int = SITES, examples: int | None = None, **values: Any) -> PrivacyPlan:
    plan = plan_of(job(privacy, **values), sites, examples)
    assert plan is not None
    return plan


def claimed(plan: PrivacyPlan) -> dict[str, float | None]:
    return {claim.adversary: claim.epsilon for claim in plan.claims}


def test_no_section_no_promise() -> None:
    assert plan_of(job(None), SITES) is None
    assert terms_of_job(job(None)) is None


def test_central_claims_sampling_only_against_those_who_cant_see_the_cohort() -> None:
    plan = planned({"mechanism": "central", "noise_multiplier": 1.0}, cohort={"sample": 0.05})
    assert claimed(plan) == {
        "the public": epsilon([Release(1.0, 0.05, 20)], DELTA),
        "the sites": epsilon([Release(1.0, 1.0, 20)], DELTA),
        "the server": None,
    }
    assert (plan.unit, plan.neighbours) == ("a user, whose device is a site", "one site added or removed")
    assert "Poisson, rate 0.05" in plan.sampling
    assert plan.warnings == ()


def test_central_without_sampling_claims_the_same_for_both() -> None:
    plan = planned({"mechanism": "central", "noise_multiplier": 4.0})
    found = claimed(plan)
    assert found["the public"] == found["the sites"] == epsilon([Release(4.0, 1.0, 20)], DELTA)
    assert plan.sampling == "everybody, every round"


def test_local_claims_the_same_against_everybody_for_data_replaced() -> None:
    plan = planned({"mechanism": "local", "noise_multiplier": 20.0}, cohort={"sample": 5})
    assert set(claimed(plan).values()) == {epsilon([Release(10.0, 1.0, 20)], DELTA)}
    assert plan.neighbours == "the site's data are replaced by any other"


def test_dp_ftrl_is_one_release_whatever_the_rounds() -> None:
    for rounds in (20, 200):
        plan = planned({"mechanism": "dp-ftrl", "noise_multiplier": 2.0}, rounds=rounds)
        spent = epsilon([Release(2.0)], DELTA)
        assert claimed(plan) == {"the public": spent, "the sites": spent, "the server": None}


def test_dp_sgd_claims_the_same_against_everybody_for_examples() -> None:
    plan = planned(
        {"mechanism": "dp-sgd", "noise_multiplier": 1.0},
        sites=3,
        examples=5000,
        train={"batch_size": 50, "epochs": 1.0},
    )
    assert plan.terms == Terms(plan.terms.section, 20 * 100, 0.01)
    assert set(claimed(plan).values()) == {epsilon([Release(1.0, 0.01, 2000)], DELTA)}
    assert plan.unit == "an example of a site's training data"
    assert plan.warnings == ()


@pytest.mark.parametrize(
    ("train", "examples", "steps"),
    [
        ({"batch_size": 50, "epochs": 1.0}, 5000, 100),
        ({"batch_size": 50, "epochs": 0.5}, 4990, 50),
        ({"batch_size": 50, "epochs": 2.0}, 10, 1),
        ({"batch_size": 50, "steps": 7}, 5000, 7),
    ],
)
def test_local_steps(train: dict[str, Any], examples: int, steps: int) -> None:
    assert steps_of(job(None, train=train), examples) == steps


def test_a_batch_larger_than_the_data_is_no_sampling() -> None:
    plan = planned({"mechanism": "dp-sgd", "noise_multiplier": 9.0}, examples=10, train={"batch_size": 50, "steps": 2})
    assert plan.terms.rate == 1.0


@pytest.mark.parametrize(
    ("privacy", "values", "adversary"),
    [
        ({"mechanism": "central"}, {"cohort": {"sample": 0.1}}, "the public"),
        ({"mechanism": "local"}, {}, "the server"),
        ({"mechanism": "dp-sgd"}, {"examples": 4000, "train": {"batch_size": 40, "steps": 10}}, "the server"),
        ({"mechanism": "dp-ftrl"}, {}, "the sites"),
        ({"mechanism": "local", "accountant": "zcdp"}, {}, "the server"),
        ({"mechanism": "central", "accountant": "rdp"}, {"cohort": {"sample": 0.1}}, "the public"),
    ],
)
def test_an_epsilon_asked_is_met_from_below(privacy: dict[str, Any], values: dict[str, Any], adversary: str) -> None:
    plan = planned({**privacy, "epsilon": 2.0}, **values)
    spent = claimed(plan)[adversary]
    assert spent is not None
    assert 0.99 * 2 < spent <= 2
    assert plan.as_json()["noise_multiplier"] == plan.terms.noise_multiplier > 0


def test_the_code_that_runs_and_the_code_that_states_epsilon_take_the_same_terms() -> None:
    for mechanism in ("central", "local", "dp-ftrl"):
        asked = job({"mechanism": mechanism, "epsilon": 3.0}, cohort={"sample": 0.1 if mechanism == "central" else 1.0})
        plan = plan_of(asked, SITES)
        assert plan is not None
        assert plan.terms == terms_of_job(asked)


def test_each_sites_terms_of_dp_sgd_are_its_own() -> None:
    assert terms_of_job(job({"mechanism": "dp-sgd", "noise_multiplier": 1.0})) is None


@pytest.mark.parametrize(
    ("privacy", "values", "message"),
    [
        ({"mechanism": "central", "noise_multiplier": 1.0, "unit": "example"}, {}, "does not hide one example"),
        ({"mechanism": "dp-sgd", "noise_multiplier": 1.0, "unit": "user"}, {"examples": 9}, "does not hide one user"),
        ({"mechanism": "dp-sgd", "noise_multiplier": 1.0}, {}, "none is known here"),
        ({"mechanism": "local", "noise_multiplier": 1.0, "adaptive_clip": {}}, {}, "is for mechanism = 'central'"),
        ({"mechanism": "local", "noise_multiplier": 1.0, "weight_cap": 5.0}, {}, "weight_cap bounds"),
        ({"mechanism": "local", "epsilon": 1e-7}, {"rounds": 100_000}, "No noise multiplier up to"),
    ],
)
def test_refused(privacy: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        planned(privacy, **values)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"noise_multiplier": 1.0, "epsilon": 1.0},
        {"noise_multiplier": 0.0},
        {"epsilon": -1.0},
        {"epsilon": 1.0, "clip": 0.0},
        {"epsilon": 1.0, "delta": 0.0},
        {"epsilon": 1.0, "delta": 1.0},
    ],
)
def test_a_section_that_says_nothing_or_nonsense(wrong: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="privacy"):
        job({"mechanism": "local", **wrong})


def test_warnings() -> None:
    few = planned({"mechanism": "central", "noise_multiplier": 1.0}, sites=FEW_SITES - 1)
    assert any("noise hides a whole site" in warning for warning in few.warnings)
    large = planned({"mechanism": "central", "noise_multiplier": 1.0, "delta": 1e-3}, sites=SITES)
    assert any("1/1000" in warning for warning in large.warnings)
    examples = planned({"mechanism": "dp-sgd", "noise_multiplier": 1.0, "delta": 1e-3}, examples=1000)
    assert any("number of examples" in warning for warning in examples.warnings)


def test_a_plan_as_json_says_everything() -> None:
    said = planned({"mechanism": "central", "noise_multiplier": 1.0, "unit": "site"}).as_json()
    assert said["unit"] == "a site"
    assert [claim["adversary"] for claim in said["claims"]] == ["the public", "the sites", "the server"]
    assert said["claims"][2]["epsilon"] is None
    assert said["not_covered"] == list(NOT_COVERED)
    assert (said["clip"], said["delta"], said["accountant"]) == (1.0, DELTA, "pld")


def test_local_noise_counts_for_data_replaced() -> None:
    section = PrivacySection(mechanism="local", clip=2.0, noise_multiplier=3.0, delta=DELTA)
    assert Terms(section, 5).releases == [Release(1.5, 1.0, 5)]
