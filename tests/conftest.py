# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from __future__ import annotations

import hypothesis

# No deadline: a shared machine is slow at times, and that is no defect.
hypothesis.settings.register_profile("hansa", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("hansa")
