# SPDX-License-Identifier: Apache-2.0
"""The fit check: every rule fires on its pair and on nothing else, and says what to do instead."""

from __future__ import annotations

import itertools

import pytest

from hansa.core import fit
from hansa.core.fit import Piece, Trait, check_fit, conflicts
from hansa.errors import FitError

PAIRS = {(rule.first, rule.second) for rule in fit._RULES}
CLIP = Piece("filter", "clip", frozenset({Trait.CLIPS}))
WEIGH = Piece("filter", "weigh", frozenset({Trait.WEIGHS}))
CAST = Piece("filter", "cast", frozenset({Trait.ENCODES}))


def piece(family: str, name: str, *traits: Trait) -> Piece:
    return Piece(family, name, frozenset(traits))


@pytest.mark.parametrize("rule", fit._RULES, ids=lambda rule: f"{rule.first.name}-{rule.second.name}")
@pytest.mark.parametrize("swapped", [False, True])
def test_a_rule_fires_on_its_pair_and_names_both_and_an_alternative(rule: fit._Rule, swapped: bool) -> None:
    one = piece("strategy", "alpha", rule.first)
    other = piece("engine", "beta", rule.second)
    with pytest.raises(FitError) as caught:
        check_fit([other, one] if swapped else [one, other])
    text = str(caught.value)
    assert text.startswith("strategy 'alpha' does not compose with engine 'beta': ")
    assert rule.reason in text
    assert text.endswith(f"Instead: {rule.instead}")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("rule", fit._RULES, ids=lambda rule: f"{rule.first.name}-{rule.second.name}")
def test_a_rule_needs_both_its_traits(rule: fit._Rule) -> None:
    one, other = piece("strategy", "alpha", rule.first), piece("engine", "beta", rule.second)
    for alone in (one, other):
        assert conflicts([alone, piece("engine", "plain"), piece("strategy", "plain")]) == []


def test_no_rule_fires_on_any_other_pair() -> None:
    for a, b in itertools.product(Trait, Trait):
        found = conflicts([piece("strategy", "alpha", a), piece("engine", "beta", b)])
        assert len(found) == len({(a, b), (b, a)} & PAIRS), (a, b)


def test_every_rule_ends_in_words_for_people() -> None:
    for rule in fit._RULES:
        assert rule.reason.endswith(".")
        assert rule.instead.endswith(".")
    assert len(PAIRS) == len(fit._RULES), "two rules for one pair"


def test_traits_are_told_apart() -> None:
    assert len({trait.value for trait in Trait}) == len(Trait)


def test_nothing_and_sound_mixes_compose() -> None:
    check_fit([])
    check_fit([piece("strategy", "fedavg"), CLIP, WEIGH, CAST, piece("engine", "local", Trait.VECTORISED)])


def test_every_conflict_is_told_at_once() -> None:
    pieces = [
        piece("strategy", "scaffold", Trait.STEP_LEVEL, Trait.PLAIN_STEPS),
        piece("recipe", "script", Trait.OPAQUE_STEPS, Trait.ADAPTIVE_STEPS),
        CAST,
        CLIP,
    ]
    with pytest.raises(FitError) as caught:
        check_fit(pieces)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("order", [*itertools.permutations([CLIP, WEIGH, CAST])])
def test_filters_clip_then_weigh_then_encode(order: tuple[Piece, ...]) -> None:
    right = [CLIP, WEIGH, CAST]
    wrong_pairs = [
        (later.name, earlier.name)
        for earlier, later in itertools.combinations(order, 2)
        if right.index(later) < right.index(earlier)
    ]
    found = conflicts(order)
    assert sorted((c.first.name, c.second.name) for c in found) == sorted(wrong_pairs)
    for conflict in found:
        assert conflict.instead == f"put {conflict.first.name!r} before {conflict.second.name!r}."


def test_a_filter_that_does_none_of_these_may_stand_anywhere() -> None:
    own = piece("filter", "own")
    for order in itertools.permutations([own, CLIP, WEIGH, CAST]):
        if [p for p in order if p is not own] == [CLIP, WEIGH, CAST]:
            check_fit(order)


def test_a_filter_counts_as_its_last_step() -> None:
    both = piece("filter", "both", Trait.CLIPS, Trait.ENCODES)
    check_fit([CLIP, WEIGH, both])
    assert [str(c.second) for c in conflicts([both, WEIGH])] == ["filter 'both'"]


def test_the_order_is_that_of_filters_only() -> None:
    check_fit([piece("engine", "a", Trait.ENCODES), CLIP, piece("site", "b", Trait.CLIPS)])


def test_two_filters_of_the_same_kind_compose() -> None:
    check_fit([CLIP, piece("filter", "clip", Trait.CLIPS), WEIGH])
