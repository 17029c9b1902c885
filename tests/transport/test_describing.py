# SPDX-License-Identifier: Apache-2.0
"""What is described while it is read is what `describe` says of the file."""

import filecmp
import io

import numpy as np
import pytest

from hansa.core import storage, wire
from hansa.core import tree as trees
from hansa.core.values import Plan
from hansa.errors import StorageError
from hansa.transport import describing
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


MANY = {f"t{i:04d}": np.full(7, i, np.float32) for i in range(3000)}
LARGE = {"w": np.arange(5 * trees.BLOCK + 3, dtype=np.float64), "half": np.ones(9 * trees.BLOCK, np.float16)}
LONG = {"x" * 1000 + f"{i:04d}": np.full(1, i) for i in range(3000)}


@pytest.mark.parametrize(
    "params", [{}, {"w": np.zeros(0)}, MANY, LARGE, LONG], ids=["no", "empty", "many", "large", "long"]
)
def test_a_plan_is_described_while_it_is_written(tmp_path, params):
    plan = Plan("job", 1, "train", 0, params, {"control": {name: leaf * 2 for name, leaf in params.items()}})
    path, again = tmp_path / "plan", tmp_path / "again"
    path.write_bytes(b"z" * 100_000_000)
    with storage.rewritten(path) as file:
        manifest = describing.write(file, wire.encoded_plan(plan))
    with again.open("wb") as file:
        assert wire.write_plan(file, plan) == path.stat().st_size
    assert filecmp.cmp(path, again, shallow=False)
    assert manifest == describe(path, wire.cuts(path))


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
