# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# No deadline: a shared machine is slow at times, and that is no defect.
hypothesis.settings.register_profile("hansa", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("hansa")

# A shell that starts the tests in the background has them ignore SIGINT, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Return a function that finds a data set in ``shared/data`` beside the checkout, and skips where there is none."""

    def find(name: str) -> Path:
        path = Path(__file__).parents[2] / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"needs the data set {name!r} in shared/data beside the checkout")
        return path

    return find
