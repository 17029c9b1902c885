# SPDX-License-Identifier: Apache-2.0
"""Sinks of rounds: metrics as JSON lines and CSV, TensorBoard, checkpoints and what they choose."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

import toys
from hansa.core.storage import Spares
from hansa.core.values import Absence, Model, RoundRecord
from hansa.errors import StorageError
from hansa.runs.run import list_runs
from hansa.simulation.run import run
from hansa.sinks.checkpoint import Checkpoints, early_stop
from hansa.sinks.metrics import Csv, JsonLines, read_records


def record(number: int, **metrics: float) -> RoundRecord:
    params = {"w": np.full(3, number, np.float32)}
    return RoundRecord(
        job="j",
        round=number,
        asked=("a", "b"),
        accepted=("a",),
        absent=(Absence("b", "lost", "gone"),),
        metrics=metrics,
        site_metrics={"a": {"train_loss": number / 2, **metrics}},
        notes={"norm": 0.5},
        bytes_down=24,
        bytes_up=12,
        seconds=0.25,
        model=Model.start(params),
        state={"velocity": {"w": np.full(3, -number, np.float32)}},
        acknowledged={"a": number},
    )


# --- metrics -----------------------------------------------------------------------------------------------------


def test_records_come_back_as_they_were_written(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl")
    records = [record(n, loss=1 / n) for n in (1, 2, 3)]
    for each in records:
        sink.write(each)
    sink.close()
    assert read_records(tmp_path / "metrics.jsonl") == [each.as_json() for each in records]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["format"] for line in lines] == [1, 1, 1]


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_torn_last_line_is_left_out_and_written_again(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for n in (1, 2):
        sink.write(record(n, loss=1.0))
    sink.close()
    path.write_bytes(path.read_bytes()[: -cut - 1])
    assert [r["round"] for r in read_records(path)] == [1]
    again = JsonLines(path, after=1)
    again.write(record(2, loss=0.5))
    again.close()
    assert [(r["round"], r["metrics"]["loss"]) for r in read_records(path)] == [(1, 1.0), (2, 0.5)]


def test_a_line_torn_in_the_middle_of_the_file_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"round"\n{"round": 3}\n')
    with pytest.raises(StorageError, match=r"metrics\.jsonl:2 is damaged"):
        read_records(path)


def test_rounds_after_the_checkpoint_are_dropped_from_both_files(tmp_path):
    lines, rows = JsonLines(tmp_path / "m.jsonl"), Csv(tmp_path / "m.csv", [])
    for n in (1, 2, 3):
        lines.write(record(n, loss=float(n)))
        rows.write(record(n, loss=float(n)))
    lines.close()
    rows.close()
    lines = JsonLines(tmp_path / "m.jsonl", after=2)
    rows = Csv(tmp_path / "m.csv", lines.records)
    lines.close()
    rows.close()
    assert [r["round"] for r in read_records(tmp_path / "m.jsonl")] == [1, 2]
    with (tmp_path / "m.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["round"] for row in found} == {"1", "2"}


def test_csv_has_a_row_a_metric(tmp_path):
    rows = Csv(tmp_path / "m.csv", [])
    rows.write(record(1, loss=0.1, accuracy=0.9))
    rows.close()
    with (tmp_path / "m.csv").open(newline="") as file:
        found = [(r["round"], r["site"], r["metric"], float(r["value"])) for r in csv.DictReader(file)]
    assert found == [
        ("1", "all", "loss", 0.1),
        ("1", "all", "accuracy", 0.9),
        ("1", "a", "train_loss", 0.5),
        ("1", "a", "loss", 0.1),
        ("1", "a", "accuracy", 0.9),
    ]


# --- TensorBoard -------------------------------------------------------------------------------------------------


def test_tensorboard_reads_what_was_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = run(toys.job(rounds=3, output={"dir": str(tmp_path), "tensorboard": True}))
    events = accumulator.EventAccumulator(str(done.directory / "tensorboard"))
    events.Reload()
    for site, metrics in (("", done.records[0]["metrics"]), *done.records[0]["site_metrics"].items()):
        for metric in metrics:
            tag = f"{site}/{metric}" if site else metric
            values = [r["site_metrics"][site][metric] if site else r["metrics"][metric] for r in done.records]
            found = events.Scalars(tag)
            assert [event.step for event in found] == [1, 2, 3]
            assert [event.value for event in found] == pytest.approx(values, rel=1e-6)
    assert "s1/train_loss" in events.Tags()["scalars"]


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    sink = Checkpoints(tmp_path, 2, "loss", "min")
    sink.write(record(1, loss=1.0))
    found = Checkpoints(tmp_path, 2, "loss", "min").load()
    assert found is not None
    assert (found.round, found.acknowledged) == (1, {"a": 1})
    np.testing.assert_array_equal(found.model.params["w"], np.ones(3, np.float32))
    np.testing.assert_array_equal(found.state["velocity"]["w"], -np.ones(3, np.float32))
    assert sink.records() == [record(1, loss=1.0).as_json()]


def test_checkpoints_are_written_over_those_that_are_gone(tmp_path):
    spares = Spares(tmp_path / "spare")
    sink = Checkpoints(tmp_path / "checkpoints", 1, "loss", "min", spares)
    files = set()
    for n in range(1, 9):
        large = {"w": np.full(1 << 18, n, np.float32)}
        sink.write(replace(record(n), model=Model.start(large), state={"velocity": large}))
        folder = tmp_path / "checkpoints" / f"{n:06d}"
        files |= {path.stat().st_ino for path in folder.iterdir() if path.stat().st_size >= 1 << 20}
    assert len(list((tmp_path / "spare").iterdir())) <= 2
    assert len(files) <= 4
    found = sink.load()
    assert found is not None
    assert (found.model.params["w"] == 8).all()


@pytest.mark.parametrize(
    ("mode", "losses", "best", "kept"),
    [
        ("min", [3.0, 1.0, 2.0, 2.5, 4.0], 2, [2, 4, 5]),
        ("max", [3.0, 1.0, 2.0, 2.5, 2.0], 1, [1, 4, 5]),
        ("min", [5.0, 4.0, 3.0, 2.0, 1.0], 5, [4, 5]),
        ("min", [1.0, 1.0, 1.0, 1.0, 1.0], 1, [1, 4, 5]),
        ("min", [float("nan"), 2.0, float("nan"), 3.0, 4.0], 2, [2, 4, 5]),
    ],
)
def test_the_best_and_the_last_are_kept(tmp_path, mode, losses, best, kept):
    sink = Checkpoints(tmp_path, 2, "loss", mode)
    for n, loss in enumerate(losses, start=1):
        sink.write(record(n, loss=loss))
    assert sink.best is not None
    assert sink.best["round"] == best
    assert sink.rounds() == kept
    again = Checkpoints(tmp_path, 2, "loss", mode)
    assert again.best == sink.best
    chosen = again.load(best)
    assert chosen is not None
    assert chosen.model.params["w"][0] == best


def test_a_round_that_was_not_judged_is_never_the_best(tmp_path):
    sink = Checkpoints(tmp_path, 1, "loss", "min")
    sink.write(record(1))
    assert sink.best is None
    sink.write(record(2, loss=9.0))
    sink.write(record(3))
    assert sink.best is not None
    assert sink.best["round"] == 2
    assert sink.rounds() == [2, 3]


def test_the_best_mark_of_a_round_that_is_done_again_is_forgotten(tmp_path):
    sink = Checkpoints(tmp_path, 3, "loss", "min")
    sink.write(record(1, loss=2.0))
    sink.write(record(2, loss=1.0))
    sink.forget_after(1)
    assert sink.best is None
    assert Checkpoints(tmp_path, 3, "loss", "min").best is None


@pytest.mark.parametrize(
    ("values", "patience", "stop"),
    [
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 2.0, 2.5], 1, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 2.0], 2, True),
        ([3.0, 2.0, 2.5, 1.9], 2, False),
        ([3.0, 4.0, 5.0], None, False),
        ([3.0], 1, False),
    ],
)
def test_early_stopping(values, patience, stop):
    lower = [{"metrics": {"loss": value}} for value in values]
    unjudged = [entry for pair in zip(lower, [{"metrics": {}}] * len(lower), strict=True) for entry in pair]
    higher = [{"metrics": {"loss": -value}} for value in values]
    assert early_stop(lower, "loss", "min", patience) is stop
    assert early_stop(unjudged, "loss", "min", patience) is stop
    assert early_stop(higher, "loss", "max", patience) is stop


class Diverging(toys.Quadratics):
    """Its held-out loss falls until round 2 and rises from then on."""

    def evaluate(self, site, plan):
        return {"loss_sum": abs(plan.round - 2) + 1.0, "examples": 1}


@pytest.mark.parametrize(("model", "chosen"), [("best", 2), ("last", 4)])
def test_a_run_stops_early_and_saves_what_the_job_says(tmp_path, model, chosen):
    job = toys.job(rounds=9, evaluation={"patience": 2}, output={"dir": str(tmp_path), "model": model, "keep": 1})
    done = run(job, program=Diverging())
    assert [r["round"] for r in done.records] == [1, 2, 3, 4]
    assert done.report["model"]["round"] == chosen
    again = run(job, program=Diverging(), resume=done.id)
    assert [r["round"] for r in again.records] == [1, 2, 3, 4]
    assert len(list_runs(tmp_path)) == 1
