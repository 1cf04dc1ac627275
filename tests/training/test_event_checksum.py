"""Event files have the checksums by which their readers know a record."""

from __future__ import annotations

import numpy as np
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as tensorboard_s

from bico_ds.training.callbacks.tensorboard.checksum import crc32c, masked_crc32c


def test_the_checksum_of_any_number_of_bytes_is_tensorboard_s():
    draw = np.random.default_rng()
    lengths = [*range(9), *range(1022, 1030), *draw.integers(1030, 9000, 4)]
    for content in (draw.bytes(length) for length in lengths):
        assert masked_crc32c(content) == tensorboard_s(content), len(content)


def test_the_checksum_is_that_of_the_standard():
    assert crc32c(bytes(32)) == 0x8A9136AA, "RFC 3720, appendix B.4"
    assert crc32c(bytes(range(32))) == 0x46DD794E
