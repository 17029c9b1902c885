# SPDX-License-Identifier: Apache-2.0
"""How this process gives memory back.

By default, glibc takes each buffer of a few hundred KiB or more from the system and returns it at once, so every frame
of a transfer costs a system call and a page fault for each 4 KiB of it. Keeping a few of them is worth more than any
option of gRPC.
"""

from __future__ import annotations

import ctypes
import platform

_MMAP_THRESHOLD = -3
_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_ARENA_MAX = -8


def tune_allocator() -> None:
    """Keep buffers up to 32 MiB for the next one; to be called before threads start. Only glibc needs it."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 256 << 20)
        libc.mallopt(_TOP_PAD, 16 << 20)
        libc.mallopt(_ARENA_MAX, 2)  # each arena keeps buffers of its own, and gRPC's threads would make many
