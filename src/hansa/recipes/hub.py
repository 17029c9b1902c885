# SPDX-License-Identifier: Apache-2.0
"""Whether the model and data hub can be reached, asked once and quickly instead of by a minute of retries."""

from __future__ import annotations

import functools
import urllib.error
import urllib.request

PROBE_S = 5.0
"""Seconds that the hub has to answer."""


@functools.cache
def online() -> bool:
    """Say whether the hub answers (False under ``HF_HUB_OFFLINE``); the answer holds for this process."""
    from huggingface_hub import constants

    if forced_offline():
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_S):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def forced_offline() -> bool:
    """Say whether the user has forbidden the network (``HF_HUB_OFFLINE``), so that only the cache is used."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
