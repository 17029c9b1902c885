# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: after every round, what the next one needs, whole or not at all.

    checkpoints/000003/model.safetensors    the shared parameters (float32 where natively half precision)
    checkpoints/000003/state.hansa          the strategy's state
    checkpoints/000003/record.json          the round's record, acknowledgements, native dtypes, format

A folder appears by one rename after all its files are durable. The last ``keep`` and the best one stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hansa.core import settle, storage, wire
from hansa.core import tree as trees
from hansa.core.tree import Tree
from hansa.core.values import Model, RoundRecord, Snapshot
from hansa.errors import StorageError, VersionError

FORMAT = 1


class _Record(msgspec.Struct):
    format: int
    round: int
    version: int
    dtypes: dict[str, str]
    acknowledged: dict[str, int]
    record: dict[str, Any]


class Checkpoints:
    """The sink that makes rounds durable, and reads them again.

    Args:
        directory: the folder of checkpoints.
        keep: how many of the latest stay.
        metric: selects the best round, by ``mode`` (``min`` or ``max``).
        spares: who gets the files of old checkpoints, over which new ones are written.
    """

    def __init__(
        self, directory: Path, keep: int, metric: str, mode: str, spares: storage.Spares | None = None
    ) -> None:
        self._directory = directory
        self._keep = keep
        self._metric = metric
        self._sign = 1 if mode == "min" else -1
        self._spares = spares
        self._best_path = directory / "best.json"
        directory.mkdir(parents=True, exist_ok=True)
        self.best: Mapping[str, Any] | None = storage.read_json(self._best_path) if self._best_path.exists() else None

    def write(self, record: RoundRecord) -> None:
        """Write the round, then note the best, then delete what is no longer needed.

        Raises:
            StorageError: the disk is full; earlier checkpoints are untouched.
        """
        temporary = self._directory / ".writing"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for name, path in record.files.items():
                storage.link(path, temporary / name)
        except OSError as error:
            raise storage.full(temporary, error) from error
        if settle.MODEL not in record.files:
            self._take_over(temporary / settle.MODEL, [record.model.params])
            storage.save_tree(temporary / settle.MODEL, record.model.params)
        if settle.STATE not in record.files:
            self._take_over(temporary / settle.STATE, record.state.values())
            settle.save_state(temporary / settle.STATE, record.state)
        entry = _Record(
            FORMAT,
            record.round,
            record.model.version,
            dict(record.model.dtypes),
            dict(record.acknowledged),
            record.as_json(),
        )
        storage.write_whole(temporary / "record.json", storage.to_json(entry))
        storage.publish(temporary, self._directory / f"{record.round:06d}")
        self._note_best(record)
        self._prune()

    def _take_over(self, path: Path, content: Iterable[Tree]) -> None:
        """Make a file that is to hold ``content`` from a spare one, if there is one."""
        if self._spares is not None:
            self._spares.take(path, sum(map(trees.num_bytes, content)))

    def close(self) -> None:
        """Nothing is open."""

    def rounds(self) -> list[int]:
        """Return the rounds on disk, in order."""
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())

    def load(self, round: int | None = None) -> Snapshot | None:
        """Return the state after ``round``, or after the last one on disk; None if there is none.

        Raises:
            StorageError: the checkpoint can't be read.
            VersionError: another release wrote it in a format this one does not read.
        """
        if round is None:
            found = self.rounds()
            if not found:
                return None
            round = found[-1]
        folder = self._directory / f"{round:06d}"
        entry = self._entry(folder)
        params = storage.load_tree(folder / settle.MODEL)
        _, state = wire.open_parts(folder / settle.STATE)
        return Snapshot(round, Model(entry.version, params, entry.dtypes), state, entry.acknowledged)

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the rounds on disk."""
        return [self._entry(self._directory / f"{number:06d}").record for number in self.rounds()]

    def forget_after(self, round: int) -> None:
        """Delete a best mark from after ``round``: those rounds will be done again."""
        if self.best and self.best["round"] > round:
            self._best_path.unlink(missing_ok=True)
            self.best = None

    def _entry(self, folder: Path) -> _Record:
        raw = storage.read_json(folder / "record.json")
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else None
            raise VersionError(f"{folder} has checkpoint format {found}; this release reads {FORMAT}.")
        try:
            return msgspec.convert(raw, _Record)
        except msgspec.ValidationError as error:
            raise StorageError(f"{folder / 'record.json'} is damaged: {error}.") from error

    def _note_best(self, record: RoundRecord) -> None:
        value = record.metrics.get(self._metric)
        if value is None or value != value:
            return
        if self.best is None or self._sign * value < self._sign * self.best["value"]:
            self.best = {"round": record.round, "metric": self._metric, "value": value}
            storage.write_json(self._best_path, self.best)

    def _prune(self) -> None:
        kept = {*self.rounds()[-self._keep :], self.best["round"] if self.best else -1}
        for number in self.rounds():
            if number not in kept:
                folder = self._directory / f"{number:06d}"
                if self._spares is not None:
                    for name in (settle.MODEL, settle.STATE):
                        self._spares.give(folder / name)
                shutil.rmtree(folder, ignore_errors=True)


def early_stop(records: Sequence[Mapping[str, Any]], metric: str, mode: str, patience: int | None) -> bool:
    """Say whether the last ``patience`` evaluations brought no better ``metric``."""
    sign = 1 if mode == "min" else -1
    values: list[float] = [sign * record["metrics"][metric] for record in records if metric in record["metrics"]]
    if patience is None or len(values) <= patience:
        return False
    return min(values[-patience:]) >= min(values[:-patience])
