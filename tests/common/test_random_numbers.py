"""The hash that every draw comes from is SplitMix64, bit by bit."""

from __future__ import annotations

import numpy as np

from bico_ds.common.random_numbers import stream


def test_a_stream_is_the_one_that_others_publish_for_its_seed():
    """Values of https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert stream(np.array([1234567], dtype=np.uint64), np.arange(5)).tolist() == expected


def test_any_word_of_a_stream_is_had_without_those_before_it():
    key, far = np.array([3], dtype=np.uint64), np.array([2**62])
    by_hand = (3 + (2**62 + 1) * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        by_hand = (by_hand ^ by_hand >> shift) * factor % 2**64
    assert stream(key, far).tolist() == [by_hand]
