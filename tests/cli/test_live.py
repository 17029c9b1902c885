# SPDX-License-Identifier: Apache-2.0
"""What people see while a run works: a live screen on a terminal, lines in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

import toys
from hansa.cli import live
from hansa.core.values import Plan
from hansa.simulation.run import run
from hansa.sinks.text import number

JOB = {"rounds": 3, "baselines": {"base": True, "local": True}}


def seen(screen: live.Screen) -> str:
    """Return what is on the screen."""
    paper = Console(file=io.StringIO(), width=100, color_system=None)
    paper.print(screen.live.get_renderable())
    return paper.file.getvalue()


def watched(tmp_path, terminal: bool, **values):
    """Run the toy job and return what was shown, and what the screen held after each round."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None, height=40)
    job = toys.job(**{**JOB, **values}, output={"dir": str(tmp_path)})
    screens = []
    with live.shown(console, job) as progress:
        if isinstance(progress, live.Screen):
            shown = progress.round

            def round(record):
                shown(record)
                screens.append(seen(progress))

            progress.round = round
        run(job, progress=progress)
    return out.getvalue(), screens


def test_a_terminal_shows_stages_sites_bytes_and_metrics(tmp_path):
    out, screens = watched(tmp_path, terminal=True)
    second = screens[1]
    assert re.search(r"federated training .* 1/3 about \d", second)
    assert "training loss" in second
    assert "240 B down, 192 B up" in second  # 2 rounds x 3 sites x (40 down, 32 up)
    for site in toys.SITES:
        assert re.search(rf"{site} +evaluated +\d", second)
    for stage in ("checking the sites' data", "federated training  3/3", "baselines  9/9", "saving the model"):
        assert f"✓ {stage}" in out
    losses = [float(x) for x in re.findall(r"  loss ([\d.]+)", "".join(screens))]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert re.findall(r"best ([\d.]+)", screens[2]) == [number(losses[2])]


def test_an_absent_site_stays_on_the_screen(tmp_path):
    out, screens = watched(tmp_path, terminal=True, recipe={"faults": {"s1:2": "raise"}})
    assert "round 2: s1 is lost: RuntimeError: the disk of this site is on fire" in out
    assert re.search(r"s1 +lost: RuntimeError", screens[1])
    assert re.search(r"s1 +evaluated", screens[2])


def test_many_sites_do_not_fill_the_screen(tmp_path):
    screen = live.Screen(Console(file=io.StringIO(), force_terminal=True, width=100), toys.job())
    screen.stage("federated training", 3)
    screen.ask(Plan("j", 1, "train", 0, {}), [f"site-{i:03d}" for i in range(100)])
    assert len(seen(screen).splitlines()) < 20
    assert "and 86 more" in seen(screen)


def test_a_log_has_a_line_a_round_and_no_control_characters(tmp_path):
    out, _ = watched(tmp_path, terminal=False, recipe={"faults": {"s1:2": "raise"}})
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    rounds = [line for line in lines if re.match(r"round \d/3, loss [\d.]+, training loss", line)]
    assert len(rounds) == 3
    assert "2 of 3 sites" in rounds[1]
    assert "360 B down, 256 B up" in rounds[2]
    assert any(line.startswith("round 2: s1 is lost: RuntimeError") for line in lines)


def test_a_resumed_run_counts_from_where_it_stopped(tmp_path):
    job = toys.job(rounds=4, output={"dir": str(tmp_path)}, recipe={"faults": {"s0:3": "raise", "s1:3": "raise"}})
    with pytest.raises(Exception, match="quorum"):
        run(job)
    out = io.StringIO()
    with (
        pytest.raises(Exception, match="quorum"),
        live.shown(Console(file=out, force_terminal=True, width=100, color_system=None), job) as progress,
    ):
        run(job, resume=True, progress=progress)
    assert "Going on after round 2." in out.getvalue()
    assert "✗ federated training  2/4" in out.getvalue()
    assert "✓ federated training" not in out.getvalue()
