"""What is said while DeepSpeed's converter works; the conversion itself is in the distributed tests."""

from __future__ import annotations

import shutil
import threading

from bico_ds.checkpoint.universal import _size


def test_the_size_of_a_folder_whose_parts_are_removed_meanwhile_is_that_of_the_rest(tmp_path):
    """The converter removes what it has merged, while its progress is told."""
    folder = tmp_path / "partial"
    for number in range(500):
        part = folder / "tmp" / str(number) / "0"
        part.mkdir(parents=True)
        (part / "fp32.pt").write_bytes(b"1234")
    sizes = [_size(folder)]
    removing = threading.Thread(target=shutil.rmtree, args=(folder,))
    removing.start()
    while removing.is_alive():
        sizes.append(_size(folder))
    assert sizes[0] == 2000
    assert _size(folder) == 0
    assert sizes == sorted(sizes, reverse=True)
