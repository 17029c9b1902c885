# SPDX-License-Identifier: Apache-2.0
"""Metrics as TensorBoard event files, written without torch."""

from __future__ import annotations

import math
import time
from pathlib import Path

from hansa import registry
from hansa.core.values import RoundRecord


class TensorBoard:
    """Writes the shared model's metrics, each site's under its name, and what scripts logged, at their own steps."""

    def __init__(self, directory: Path) -> None:
        self._writer = registry.load_object("tensorboard.summary.writer.event_file_writer:EventFileWriter")(
            str(directory)
        )
        self._event = registry.load_object("tensorboard.compat.proto.event_pb2:Event")
        self._summary = registry.load_object("tensorboard.compat.proto.summary_pb2:Summary")

    def write(self, record: RoundRecord) -> None:
        """Add one round's scalars."""
        values = dict(record.metrics)
        for site, metrics in record.site_metrics.items():
            values |= {f"{site}/{name}": value for name, value in metrics.items()}
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = self._event(wall_time=time.time(), step=record.round, summary=self._summary(value=scalars))
        self._writer.add_event(event)
        for site, logged in record.logged.items():
            for name, points in logged.items():
                for step, value in points:
                    scalar = self._summary.Value(
                        tag=f"{site}/logged/{name}", simple_value=math.nan if value is None else value
                    )
                    at = record.round if step is None else step
                    self._writer.add_event(
                        self._event(wall_time=time.time(), step=at, summary=self._summary(value=[scalar]))
                    )
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
