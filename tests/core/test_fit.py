# SPDX-License-Identifier: Apache-2.0
"""The fit check: every rule fires on its pair and on nothing else, and says what to do instead."""

from __future__ import annotations

import itertools

import pytest

from hansa.core import fit
from hansa.core.fit import Piece, Trait, check_fit, conflicts
from hansa.errors import FitError

PAIRS = [frozenset(rule.traits) for rule in fit.RULES if len(rule.traits) == 2]
CLIP = Piece("filter", "clip", frozenset({Trait.CLIPS}))
WEIGH = Piece("filter", "weigh", frozenset({Trait.WEIGHS}))
CAST = Piece("filter", "cast", frozenset({Trait.ENCODES}))


def piece(family: str, name: str, *traits: Trait) -> Piece:
    return Piece(family, name, frozenset(traits))


def named(rule: fit.Rule) -> str:
    return "-".join(trait.name for trait in rule.traits)


def holders(rule: fit.Rule) -> list[Piece]:
    """Return a piece for each of a rule's traits."""
    return [piece(f"family{place}", f"piece{place}", trait) for place, trait in enumerate(rule.traits)]


def without_needs(*traits: Trait) -> list[Piece]:
    """Return a piece that has whatever ``traits`` need."""
    return [piece("needed", need.needed.name, need.needed) for need in fit.NEEDS if need.trait in traits]


@pytest.mark.parametrize("rule", fit.RULES, ids=named)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_rule_fires_on_its_pieces_and_names_all_and_an_alternative(rule: fit.Rule, swapped: bool) -> None:
    pieces = holders(rule)
    found = [
        str(conflict)
        for conflict in conflicts(pieces[::-1] if swapped else pieces)
        if conflict.reason == rule.reason and len(conflict.pieces) > 1
    ]
    first, *others = map(str, pieces)
    assert found == [f"{first} does not compose with {' and '.join(others)}: {rule.reason} Instead: {rule.instead}"]


def test_the_error_has_the_exit_code_of_its_kind() -> None:
    with pytest.raises(FitError) as caught:
        check_fit([piece("a", "a", Trait.MASKED), piece("b", "b", Trait.RELAYS)])
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("rule", fit.RULES, ids=named)
def test_a_rule_needs_all_its_traits(rule: fit.Rule) -> None:
    pieces = holders(rule)
    for left_out in range(len(pieces)):
        rest = pieces[:left_out] + pieces[left_out + 1 :]
        needs = [each for one in rest for each in without_needs(*one.traits)]
        plain = [piece("engine", "plain"), piece("strategy", "plain")]
        assert conflicts([*rest, *needs, *plain]) == []


def test_no_rule_fires_on_any_other_pair() -> None:
    for a, b in itertools.product(Trait, Trait):
        found = conflicts([piece("strategy", "alpha", a), piece("engine", "beta", b)])
        assert sum(len(conflict.pieces) == 2 for conflict in found) == PAIRS.count(frozenset({a, b})), (a, b)


def test_no_triple_stands_where_a_pair_would_do() -> None:
    for rule in fit.RULES:
        for pair in itertools.combinations(rule.traits, 2):
            assert len(rule.traits) == 2 or frozenset(pair) not in PAIRS, rule


@pytest.mark.parametrize("need", fit.NEEDS, ids=lambda need: f"{need.trait.name}-{need.needed.name}")
def test_what_a_piece_needs_is_missed_and_found(need: fit.Need) -> None:
    needy, giver = piece("privacy", "alpha", need.trait), piece("engine", "beta", need.needed)
    with pytest.raises(FitError, match="privacy 'alpha': ") as caught:
        check_fit([needy, piece("engine", "plain")])
    assert need.reason in str(caught.value)
    assert need.instead in str(caught.value)
    check_fit([needy, giver])
    check_fit([giver])


def test_a_piece_that_needs_updates_is_held_against_how_many_are_asked() -> None:
    pieces = [Piece("rule", "krum", frozenset(), 5), Piece("masks", "masks", frozenset(), 3)]
    check_fit(pieces)
    check_fit(pieces, asked=5)
    (one,) = conflicts(pieces, asked=4)
    assert str(one).startswith("rule 'krum': it needs at least 5 updates, and a round asks 4 sites.")
    assert len(conflicts(pieces, asked=2)) == 2


def test_every_rule_ends_in_words_for_people() -> None:
    for rule in (*fit.RULES, *fit.NEEDS):
        assert rule.reason.endswith(".")
        assert rule.instead.endswith(".")
    assert len(set(PAIRS)) == len(PAIRS), "two rules for one pair"


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
    assert sorted((c.pieces[0].name, c.pieces[1].name) for c in found) == sorted(wrong_pairs)
    for conflict in found:
        assert conflict.instead == f"put {conflict.pieces[0].name!r} before {conflict.pieces[1].name!r}."


def test_a_filter_that_does_none_of_these_may_stand_anywhere() -> None:
    own = piece("filter", "own")
    for order in itertools.permutations([own, CLIP, WEIGH, CAST]):
        if [p for p in order if p is not own] == [CLIP, WEIGH, CAST]:
            check_fit(order)


def test_a_filter_counts_as_its_last_step() -> None:
    both = piece("filter", "both", Trait.CLIPS, Trait.ENCODES)
    check_fit([CLIP, WEIGH, both])
    assert [str(c.pieces[1]) for c in conflicts([both, WEIGH])] == ["filter 'both'"]


def test_the_order_is_that_of_filters_only() -> None:
    check_fit([piece("engine", "a", Trait.ENCODES), CLIP, piece("site", "b", Trait.CLIPS)])


def test_two_filters_of_the_same_kind_compose() -> None:
    check_fit([CLIP, piece("filter", "clip", Trait.CLIPS), WEIGH])
