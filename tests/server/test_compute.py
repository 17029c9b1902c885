# SPDX-License-Identifier: Apache-2.0
"""The worker beside the server: what a job's code there can see of the server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import toys
from hansa.core.config import Job
from hansa.server.compute import Compute

pytestmark = pytest.mark.timeout(60)


def build(job: Job) -> toys.Quadratics:
    """Write down the environment that the job's code finds itself in."""
    Path(str(job.recipe.options["seen"])).write_text(json.dumps(dict(os.environ)))
    return toys.Quadratics()


async def test_the_server_s_secrets_do_not_reach_a_job_s_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "secret")
    job = toys.job(recipe={"name": "server.test_compute:build", "seen": str(tmp_path / "seen.json")})
    async with Compute(job, tmp_path / "work", environment={"HF_HUB_OFFLINE": "1"}) as compute:
        assert list(compute.sites) == list(toys.SITES)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert "secret" not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["PATH"] == os.environ["PATH"]
