"""Derived seeds: the ones that earlier versions drew, so that runs go on with the same tasks."""

from __future__ import annotations

import itertools

import numpy as np

from leap_dist.protocol.seeds import derived_seed


def test_a_text_counts_as_its_bytes_and_a_number_as_itself() -> None:
    """NumPy promises that its SeedSequence never changes."""
    assert derived_seed(3, "pong") == np.random.SeedSequence((3, *b"pong")).generate_state(1)[0]
    assert derived_seed(0, 7, 1) == np.random.SeedSequence((0, 7, 1)).generate_state(1)[0]


def test_seeds_depend_on_every_part_and_on_their_order() -> None:
    keys = [*itertools.product(range(30), ["pong", "qbert"]), *itertools.product(range(30), range(30))]
    assert len({derived_seed(*key) for key in keys}) == len(keys)
