# SPDX-License-Identifier: Apache-2.0
"""The draws that promises rest on: their distribution, what they depend on, and how the secret is kept."""

import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest, norm

from hansa.core.lazy import BLOCK
from hansa.errors import StorageError
from hansa.privacy.draws import KEY_BYTES, Secret

SIZE = 2 * BLOCK + 1234
SECRET = Secret(bytes(range(KEY_BYTES)))


def gaussian(std: float, *labels: int | str, size: int = SIZE, secret: Secret = SECRET) -> np.ndarray[Any, Any]:
    return np.asarray(secret.gaussian((size,), np.dtype(np.float64), std, *labels))


@pytest.mark.parametrize("std", [1e-3, 1.0, 7.5])
def test_the_noise_has_the_right_deviation_and_no_other(std: float) -> None:
    drawn = gaussian(std, "noise", 1, size=20_000)
    assert kstest(drawn, norm(scale=std).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert kstest(drawn, norm(scale=wrong * std).cdf).pvalue < 1e-9


def test_float32_noise_has_the_right_deviation() -> None:
    drawn = np.asarray(SECRET.gaussian((100, 200), np.dtype(np.float32), 2.5, "noise"))
    assert drawn.dtype == np.float32
    assert drawn.shape == (100, 200)
    assert kstest(drawn.ravel(), norm(scale=2.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 0), (0, 1), (17, 90), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (5, SIZE), (SIZE - 1, SIZE)],
)
def test_any_slice_has_the_draws_of_the_whole(start: int, stop: int) -> None:
    leaf = SECRET.gaussian((SIZE,), np.dtype(np.float32), 3.0, "noise", 4)
    np.testing.assert_array_equal(leaf[start:stop], np.asarray(leaf)[start:stop])


def test_draws_depend_on_secret_and_labels_and_on_nothing_else() -> None:
    first = gaussian(1.0, "noise", 1, "w")
    np.testing.assert_array_equal(first, gaussian(1.0, "noise", 1, "w", secret=Secret(bytes(range(KEY_BYTES)))))
    others = [
        gaussian(1.0, "noise", 2, "w"),
        gaussian(1.0, "noise", 1, "v"),
        gaussian(1.0, "noise", 1),
        gaussian(1.0, "noise", "1w"),
        gaussian(1.0, "noise", 1, "w", secret=Secret.fresh()),
        np.roll(first, BLOCK),
    ]
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(SIZE)


def test_labels_are_kept_apart() -> None:
    a, b = SECRET.generator("ab", "c"), SECRET.generator("a", "bc")
    assert a.integers(1 << 62) != b.integers(1 << 62)


def test_fresh_secrets_differ() -> None:
    assert Secret.fresh().generator("x").integers(1 << 62) != Secret.fresh().generator("x").integers(1 << 62)


def test_a_kept_secret_is_its_owners_alone_and_survives(tmp_path: Path) -> None:
    path = tmp_path / "work" / "secret"
    before = os.umask(0)
    try:
        first = Secret.kept(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["secret"]
    again = Secret.kept(path)
    assert first.generator("x").integers(1 << 62) == again.generator("x").integers(1 << 62)


@pytest.mark.parametrize("damage", [b"", b"short", bytes(KEY_BYTES + 1)])
def test_a_damaged_secret_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "secret").write_bytes(damage)
    with pytest.raises(StorageError, match="is damaged"):
        Secret.kept(tmp_path / "secret")


def test_a_secret_that_cant_be_kept_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="Can't keep the secret"):
        Secret.kept(tmp_path / "file" / "secret")


def _draw(path: Path, barrier: Any, found: Any) -> None:
    barrier.wait()
    found.put(int(Secret.kept(path).generator("x").integers(1 << 62)))


def test_processes_that_make_it_at_once_get_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(3), context.Queue()
    makers = [context.Process(target=_draw, args=(tmp_path / "secret", barrier, found)) for _ in range(3)]
    for maker in makers:
        maker.start()
    draws = {found.get(timeout=60) for _ in makers}
    for maker in makers:
        maker.join()
    assert len(draws) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]
