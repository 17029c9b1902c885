# SPDX-License-Identifier: Apache-2.0
"""What a message between sites costs: sealing and opening a file, in processor time, memory and bytes.

    python benchmarks/sealed.py [--mib 1024]

One process makes two sites' keys, seals the file for the other, and opens it again; file and folder are the disk's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from hansa.pki import sealed
from hansa.pki.identities import Identities
from hansa.pki.kit import Kit
from hansa.pki.provision import provision


def anonymous_mib() -> float:
    """Return this process's anonymous memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    """Measure, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=1024)
    mib = parser.parse_args().mib
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        made = provision(folder / "federation", "lab", "127.0.0.1:8470", ["a", "b"], ["ana"])
        a, b = (Identities(Kit(made.sites[site])) for site in "ab")
        contents, message, opened = folder / "contents", folder / "message", folder / "opened"
        with contents.open("wb") as file:
            for _ in range(mib):
                file.write(os.urandom(1 << 20))
        key, place = sealed.new_key(), sealed.Place("0" * 64, "job", 1)
        to = sealed.read_address(sealed.address(key, place, "b", b), place, "b", a)
        before, begun = anonymous_mib(), time.process_time()
        sealed.seal(contents, message, to, "a", ("a",), a)
        between = time.process_time()
        sealed.unseal(message, opened, key, place, "a", "b", b)
        ended, after = time.process_time(), anonymous_mib()
        grown = message.stat().st_size - contents.stat().st_size
    print(
        f"{mib} MiB: sealed in {between - begun:.2f} s, opened in {ended - between:.2f} s of processor time; "
        f"anonymous memory {before:.0f} MiB before, {after:.0f} MiB after; {grown:,} bytes longer"
    )


if __name__ == "__main__":
    main()
