"""CRC-32C, the checksum of event files, by numpy: byte by byte in Python it is most of what a step's record costs.

A checksum is linear over XOR: it is that of all bytes by themselves, each moved to its place in the block.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed (RFC 3720, appendix B.4)
_BLOCK = 1024  # bytes at once: their table has 1 MB


def masked_crc32c(content: bytes) -> int:
    """The checksum of these bytes as TensorFlow's record files have it: rotated, with a number added."""
    checksum = crc32c(content)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(content: bytes) -> int:
    """The checksum of these bytes, below 2**32."""
    table, state = _table(), 0xFFFFFFFF
    for start in range(0, len(content), _BLOCK):
        block = np.frombuffer(content[start : start + _BLOCK], dtype=np.uint8).copy()
        # What the bytes before have left falls on the next four.
        block[:4] ^= np.frombuffer(state.to_bytes(4, "little"), dtype=np.uint8)[: len(block)]
        moved = table[np.arange(_BLOCK - len(block), _BLOCK), block]
        state = int(np.bitwise_xor.reduce(moved)) ^ (state >> 8 * len(block))
    return state ^ 0xFFFFFFFF


@cache
def _table() -> NDArray[np.uint32]:
    """What each byte, at each place of a block, gives to the checksum after the block: [_BLOCK, 256]."""
    bytes_alone: NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        bytes_alone = np.where(bytes_alone & 1, bytes_alone >> 1 ^ _POLYNOMIAL, bytes_alone >> 1).astype(
            np.uint32
        )
    table = np.empty((_BLOCK, 256), dtype=np.uint32)
    table[-1] = bytes_alone
    for place in range(_BLOCK - 2, -1, -1):
        later = table[place + 1]
        table[place] = (later >> 8) ^ bytes_alone[later & 0xFF]
    return table
