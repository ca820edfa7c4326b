"""What is planted in the generated sets is there, and is what the labels say."""

import pytest
import saekit_gear.sets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_gear.sets import (
    ABILITIES,
    ARCHETYPES,
    CLASSES,
    COMBINATIONS,
    CONCEPTS,
    ITEMS,
    LONGEST,
    SEASONS,
    WEAPONS,
    batches,
    generate,
    show,
)

from saekit import Items, as_text


def has(sets, name: str) -> torch.Tensor:
    """[n], whether an item is in each set."""
    return (sets.items == ITEMS.index(name) + 1).any(1)


def label(sets, name: str) -> torch.Tensor:
    return sets.labels[:, CONCEPTS.index(name)] > 0.5


@pytest.fixture(scope="module")
def many():
    return generate(20_000, (7,))


@pytest.fixture(scope="module")
def without_effects():
    """The same sets, but for what combinations bring and keep away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saekit_gear.sets, "_effects", lambda combined: 0.0)
        return generate(20_000, (7,))


@given(st.integers(0, 2**31), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_a_set_has_a_season_a_weapon_and_five_to_eight_abilities(seed, n):
    sets = generate(n, (seed,))
    for row, mask, labels in zip(sets.items.tolist(), sets.mask.tolist(), sets.labels, strict=True):
        assert [item > 0 for item in row] == mask and len(row) == LONGEST
        names = [ITEMS[item - 1] for item in row if item]
        assert len(set(names)) == len(names)
        weapons, abilities = [n for n in names if n in WEAPONS], [n for n in names if n in ABILITIES]
        assert len(weapons) == 1 == sum(n in SEASONS for n in names) and 5 <= len(abilities) <= 8
        told = {name for name, there in zip(CONCEPTS, labels.tolist(), strict=True) if there}
        assert told & set(CLASSES) == {weapons[0].split()[0]} and len(told & set(ARCHETYPES)) == 1
        assert {" + ".join(p) for p in COMBINATIONS if set(p) <= set(abilities)} == told - set(CLASSES) - set(ARCHETYPES)


def test_equal_seeds_give_equal_sets_and_others_do_not():
    first, again, other = generate(64, (3, 1)), generate(64, (3, 1)), generate(64, (3, 2))
    assert torch.equal(first.items, again.items) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.items, other.items)


@pytest.mark.parametrize("archetype", ARCHETYPES)
def test_an_archetype_is_its_core(many, archetype):
    own = label(many, archetype)
    for ability in ARCHETYPES[archetype]:
        assert has(many, ability)[own].float().mean() > 2 * has(many, ability)[~own].float().mean()


@pytest.mark.parametrize("pair", COMBINATIONS)
def test_a_combination_does_what_neither_of_the_two_does_alone(many, without_effects, pair):
    one, other = (has(many, ability) for ability in pair)
    assert torch.equal(one & other, label(many, " + ".join(pair))) and (one & other).float().mean() > 0.07  # 45% of the sets / 6
    (brought, kept_away), (brought_anyhow, kept_anyhow) = (
        [float(has(sets, ability)[label(sets, " + ".join(pair))].float().mean()) for ability in COMBINATIONS[pair]]
        for sets in (many, without_effects)
    )
    assert brought > brought_anyhow + 0.2 and kept_away < 0.9 * kept_anyhow


def test_every_second_archetype_rises_from_season_to_season(many):
    for number, archetype in enumerate(ARCHETYPES):
        first, last = (label(many, archetype)[has(many, season)].float().mean() for season in (SEASONS[0], SEASONS[-1]))
        assert last > 1.5 * first if number % 2 else first > 1.5 * last


def test_a_pass_is_new_sets_and_what_is_held_out_is_always_the_same():
    first, again, later, held_out = (
        next(iter(batches(*of)))["items"] for of in (("train", 0), ("train", 0), ("train", 1), ("held_out", 0))
    )
    assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first, held_out)


def test_a_set_is_shown_as_a_set_with_what_is_planted_in_it():
    sets = generate(1, (11,))
    example = show(sets._asdict(), 0)
    assert isinstance(example, Items) and len(example.parts) == int(sets.mask.sum())
    assert example.caption.split(", ") == [n for n, there in zip(CONCEPTS, sets.labels[0].tolist(), strict=True) if there]
    assert as_text(example).endswith(f"({example.caption})")
