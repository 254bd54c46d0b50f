"""A split never parts a source."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_training.micrograph.splits import GroupedFolds, LeakyError


def test_two_crops_of_one_source_in_two_folds_are_refused() -> None:
    with pytest.raises(LeakyError, match="source 'spot 1' is in folds 0 and 1"):
        GroupedFolds(("spot 1", "spot 2", "spot 1"), np.array([0, 0, 1]))


@given(st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=60), st.integers(2, 4), st.integers(0, 99))
def test_folds_are_whole_sources_and_all_items(letters: list[str], folds: int, seed: int) -> None:
    if len(set(letters)) < folds:
        with pytest.raises(ValueError, match="the number of sources"):
            GroupedFolds.draw(letters, folds, seed)
        return
    split = GroupedFolds.draw(letters, folds, seed)
    assert split.folds == folds
    for fold in range(folds):
        inside, outside = split.held_out(fold), split.trained_on(fold)
        assert sorted([*inside, *outside]) == list(range(len(letters)))
        assert not {letters[i] for i in inside} & {letters[i] for i in outside}
    sizes = Counter(split.fold[letters.index(name)] for name in set(letters))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    np.testing.assert_array_equal(split.fold, GroupedFolds.draw(letters, folds, seed).fold)


def test_folds_have_their_share_of_each_class() -> None:
    sources = [f"image {i // 4}" for i in range(240)]
    labels = [(i // 4) % 3 for i in range(240)]
    split = GroupedFolds.draw(sources, 5, seed=2, labels=labels)
    for fold in range(5):
        assert Counter(labels[i] for i in split.held_out(fold)) == {0: 16, 1: 16, 2: 16}
    assert np.any(split.fold != GroupedFolds.draw(sources, 5, seed=3, labels=labels).fold)


@pytest.mark.parametrize(
    ("fold", "message"),
    [([0, 2], r"none in \[1\]"), ([-1, 0], "numbers from 0"), ([0], "one an item")],
)
def test_what_is_no_split_is_refused(fold: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedFolds(("a", "b"), np.array(fold))


def test_a_fold_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="fold 5: expected 0 to 1"):
        GroupedFolds(("a", "b"), np.array([0, 1])).held_out(5)
