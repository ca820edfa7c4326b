"""Seeds: one for each purpose, and the same ones from version to version, since a run's bits hang on them."""

from saekit.seeds import derived_seed, seed_for


def test_each_purpose_and_each_number_has_its_own_seed() -> None:
    seeds = [seed_for(seed, purpose) for seed in (0, 1) for purpose in ("weights", "torch", "listeners")]
    seeds += [derived_seed(word, *numbers) for word in ("shuffle", "pass") for numbers in ((0, 1), (1, 0), (1,), (10,))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch and numpy take


def test_the_seeds_are_those_of_earlier_versions() -> None:
    assert seed_for(0, "weights") == 133_441_691_874_178_746
    assert derived_seed("shuffle", 0, 3) == 7_475_571_636_874_588_264
