# SPDX-License-Identifier: Apache-2.0
"""A report made by hand, whose comparison can be worked out in one's head."""

from __future__ import annotations

from typing import Any

from hansa.core.config import parse


def scores(overall: float, **by_site: float) -> dict[str, Any]:
    return {
        "overall": {"loss": overall / 10, "perplexity": overall},
        "by_site": {site: {"loss": value / 10, "perplexity": value} for site, value in by_site.items()},
    }


def record(number: int, overall: float | None, **by_site: float) -> dict[str, Any]:
    judged = scores(overall, **by_site) if overall is not None else {"overall": {}, "by_site": {}}
    return {
        "format": 1,
        "job": "hand",
        "round": number,
        "version": number,
        "asked": ["a", "b"],
        "accepted": ["a"],
        "absent": [{"site": "b", "kind": "late", "reason": "took 3.00 s, the deadline is 2 s"}],
        "metrics": {"train_loss": 3.0 - number / 10, **judged["overall"]},
        "site_metrics": {
            "a": {"train_loss": 3.0, "train_seconds": 0.5, **judged["by_site"].get("a", {})},
            **({"b": judged["by_site"]["b"]} if "b" in judged["by_site"] else {}),
        },
        "notes": {},
        "bytes_down": 2_000_000,
        "bytes_up": 1_000_000,
        "seconds": 1.25,
    }


def report(**changes: Any) -> dict[str, Any]:
    """Return the report; keyword arguments replace its keys, and ``settings`` are the job's."""
    settings = changes.pop("settings", {})
    job = parse({"name": "hand", "rounds": 3, "recipe": "causal-lm", **settings})
    values = {
        "format": 1,
        "run": "hand-0001",
        "job": job.model_dump(mode="json"),
        "hansa": "0.1.0",
        "platform": "a machine",
        "created": "2026-01-02T03:04:05+00:00",
        "seconds": 12.0,
        "sites": [
            {"site": "a", "counts": {"train": 30, "test": 10}, "labels": {"yes": 20, "no": 10}},
            {"site": "b", "counts": {"train": 3, "test": 1}, "labels": {"no": 3}},
        ],
        "rounds": [record(1, 9.5, a=7.5, b=11.0), record(2, None), record(3, 7.0, a=6.0, b=7.5)],
        "model": {"round": 3, "parameters": 1234567, "bytes": 4938268, "sha256": "0" * 64},
        "baselines": {
            "base": scores(10.0, a=8.0, b=12.0),
            "local.a": scores(9.0, a=5.0, b=13.0),
            "local.b": scores(11.5, a=10.0, b=6.0),
            "central": scores(6.25, a=5.5, b=6.5),
        },
        "failed_baselines": {},
        "samples": [],
    }
    return {**values, **changes}
