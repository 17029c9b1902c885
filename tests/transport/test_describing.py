# SPDX-License-Identifier: Apache-2.0
"""What is described while it is read is what `describe` says of the file."""

import io

import pytest

from hansa.errors import StorageError
from hansa.transport.describing import Describing
from hansa.transport.pieces import describe

CUTS = ([0, 10, 10, 4_000_000, 4_000_100], [0, 4_000_100], [0, 1, 4_000_100])


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("step", [4_000_100, 1 << 20, 999_983])
def test_the_manifest_is_that_of_the_file(tmp_path, cuts, step):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 15_625 + b"x" * 100)
    with path.open("rb") as file:
        described = Describing(file, cuts)
        read = b"".join(iter(lambda: described.read(step), b""))
    assert read == path.read_bytes()
    assert described.manifest() == describe(path, cuts)


def test_an_empty_file_has_no_pieces(tmp_path):
    described = Describing(io.BytesIO(), [0])
    assert described.read(1) == b""
    assert described.manifest().pieces == ()
    (tmp_path / "file").touch()
    assert described.manifest() == describe(tmp_path / "file", [0])


@pytest.mark.parametrize("num_bytes", [0, 99, 101])
def test_other_bytes_than_there_were_to_be_have_no_manifest(num_bytes):
    described = Describing(io.BytesIO(b"x" * num_bytes), [0, 40, 100])
    while described.read(30):
        pass
    with pytest.raises(StorageError, match="changed"):
        described.manifest()
