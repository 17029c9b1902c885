# SPDX-License-Identifier: Apache-2.0
"""The release's version, as the package's metadata has it."""

from __future__ import annotations

import importlib.metadata

VERSION = importlib.metadata.version("hansa")
