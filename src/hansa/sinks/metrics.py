# SPDX-License-Identifier: Apache-2.0
"""Metrics as JSON lines (every record, whole) and CSV (round, site or ``all``, metric, value)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, TextIO

import msgspec

from hansa.core import storage
from hansa.core.values import RoundRecord
from hansa.errors import StorageError


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records in a JSON-lines file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            records.append(msgspec.json.decode(line))
        except msgspec.DecodeError as error:
            if number == len(lines) - 1:
                break
            raise StorageError(f"{path}:{number + 1} is damaged: {error}.") from error
    return records


class JsonLines:
    """Appends each record as one line; lines of rounds after ``after`` are dropped first."""

    def __init__(self, path: Path, after: int = 0) -> None:
        self.records = [r for r in read_records(path) if r["round"] <= after]
        storage.write_atomic(path, b"".join(msgspec.json.encode(record) + b"\n" for record in self.records))
        self._file = path.open("ab")

    def write(self, record: RoundRecord) -> None:
        """Append one record."""
        value = record.as_json()
        self.records.append(value)
        self._file.write(msgspec.json.encode(value) + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Csv:
    """Writes one row a (round, site, metric); the shared model's rows have the site ``all``."""

    def __init__(self, path: Path, earlier: list[dict[str, Any]]) -> None:
        self._file: TextIO = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(["round", "site", "metric", "value"])
        for record in earlier:
            self._rows(record)
        self._file.flush()

    def write(self, record: RoundRecord) -> None:
        """Append one record's rows."""
        self._rows(record.as_json())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _rows(self, record: dict[str, Any]) -> None:
        for site, metrics in (("all", record["metrics"]), *record["site_metrics"].items()):
            for name, value in metrics.items():
                self._writer.writerow([record["round"], site, name, value])
