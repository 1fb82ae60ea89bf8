from hypothesis import given, settings
from hypothesis import strategies as st

from e2mc_hf.data.seeds import derive_seed, permutation

PARTS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4)


def test_the_seed_of_given_parts_never_changes():
    assert derive_seed(0, 1, 2, 3) == 16958249009808338657


@given(PARTS, PARTS)
@settings(deadline=None, database=None, max_examples=50)
def test_different_parts_give_different_seeds(first, second):
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)


def test_a_large_part_does_not_spill_into_the_next():
    assert derive_seed(2**32, 5) != derive_seed(0, 1, 5)
    assert derive_seed(1, 2) != derive_seed(1, 2, 0)


def test_a_permutation_depends_on_its_parts_alone():
    assert permutation(50, 0, 1) == permutation(50, 0, 1)
    assert permutation(50, 0, 1) != permutation(50, 0, 2)
    assert sorted(permutation(50, 0, 1)) == list(range(50))
