# SPDX-License-Identifier: Apache-2.0
"""What a server lets a lead's job run and read: nothing that its operator has not named."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import toys
from federations import loopback
from hansa.bundle import Bundle
from hansa.errors import PolicyError
from hansa.pki.identity import Identity
from hansa.server.policy import at_server, decide
from hansa.server.settings import ServerSettings
from members import members


@pytest.fixture(scope="module")
def ana(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return members(tmp_path_factory.mktemp("federation")).lead.identity


def bundle(signer: Identity, files: tuple[str, ...] = (), **values: Any) -> Bundle:
    job = toys.job(**{"recipe": {"name": "causal-lm"}, **values})
    return Bundle(job, signer, dict.fromkeys(files, (1, "0" * 64)), datetime.now(UTC))


IN_PROCESS = (
    {"strategy": {"name": "os:system", "command": "true"}},
    {"workflow": "os:system"},
    {"filters": ["clip", "os:system"]},
)


def test_a_job_that_is_handed_on_names_its_sites(ana: Identity, tmp_path: Path) -> None:
    """It is refused at once, and not only by each site."""
    with pytest.raises(PolicyError, match=r"does not name them.*cohort.sites"):
        decide(bundle(ana, workflow="cyclic"), ServerSettings(), tmp_path)
    decide(bundle(ana, workflow="cyclic", cohort={"sites": ["s0", "s1"]}), ServerSettings(), tmp_path)


@pytest.mark.parametrize("values", IN_PROCESS)
def test_what_runs_in_the_server_itself_is_the_operator_s_alone(ana: Identity, values: dict, tmp_path: Path) -> None:
    for policy in ({}, {"signers": ["ana"]}, {"modules": ["os:path"]}):
        with pytest.raises(PolicyError, match="in the server itself"):
            decide(bundle(ana, **values), ServerSettings(policy=policy), tmp_path)
    decide(bundle(ana, **values), ServerSettings(policy={"modules": ["os:system"]}), tmp_path)


@pytest.mark.parametrize(
    ("values", "files"),
    [
        ({"recipe": {"name": "toys:build"}}, ()),
        ({"recipe": {"name": "script"}}, ()),
        ({"recipe": {"name": "causal-lm", "trust_remote_code": True}}, ()),
        ({"model": {"config": {"auto_map": {"AutoModel": "mine.Model"}}}}, ()),
        ({}, ("weights.pkl",)),
    ],
)
def test_what_runs_beside_it_is_of_trusted_signers(
    ana: Identity, values: dict, files: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(PolicyError, match=r"This server runs code of: ben \(policy.signers in server.toml\)"):
        decide(bundle(ana, files, **values), ServerSettings(policy={"signers": ["ben"]}), tmp_path)
    decide(bundle(ana, files, **values), ServerSettings(policy={"signers": ["ana"]}), tmp_path)


def test_an_installed_recipe_and_a_partition_need_no_trust(ana: Identity, tmp_path: Path) -> None:
    decide(bundle(ana), ServerSettings(), tmp_path)
    decide(bundle(ana, partition="ours:split"), ServerSettings(), tmp_path)
    settings = ServerSettings(policy={"modules": ["toys:build"]})
    decide(bundle(ana, recipe={"name": "toys:build"}), settings, tmp_path)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("base", "../../others-0001/model"),
        ("base", "package:some/../../../etc"),
        ("tokenizer", "/etc"),
        ("tokenizer", "~/secret"),
        ("factory", "/srv/hansa/jobs/others-0001/initial.safetensors"),
    ],
)
def test_a_job_reads_its_own_files_and_the_server_s_models(ana: Identity, key: str, path: str, tmp_path: Path) -> None:
    settings = ServerSettings(models={"ours": "models/ours"})
    with pytest.raises(PolicyError, match=f"model.{key} .* this server's disk.* models: ours"):
        decide(bundle(ana, model={key: path}), settings, tmp_path)
    for own in ("base", "org/name", "package:some/model"):
        assert at_server(toys.job(model={"base": own}), ["s0"], settings, tmp_path).model.base == own
    known = at_server(toys.job(model={"base": "ours"}), ["s0"], settings, tmp_path)
    assert known.model.base == str(tmp_path / "models" / "ours")


def test_more_threads_than_the_server_gives_are_refused_not_cut(ana: Identity, tmp_path: Path) -> None:
    settings = ServerSettings(compute={"threads": 2})
    decide(bundle(ana, engine={"threads": 2}), settings, tmp_path)
    with pytest.raises(PolicyError, match="3 CPU threads; this server gives 2"):
        decide(bundle(ana, engine={"threads": 3}), settings, tmp_path)


@pytest.mark.timeout(60)
async def test_a_lead_s_command_is_not_carried_out_by_the_server(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    async with loopback(tmp_path) as federation, federation.lead() as lead:
        with pytest.raises(PolicyError, match="strategy is 'os:system'"):
            await lead.submit(toys.job(strategy={"name": "os:system", "command": f"touch {mark}"}))
        assert not list((federation.made.server / "jobs").iterdir())
    assert not mark.exists()


@pytest.mark.timeout(60)
async def test_a_model_that_is_too_large_ends_its_job(tmp_path: Path) -> None:
    async with loopback(tmp_path, toys.SITES, max_model_bytes=100_000) as federation:
        for site in toys.SITES:
            await federation.start(site)
        view = await federation.run(toys.job(recipe={"size": 100_000}))
    assert (view.line.state, view.line.kind) == ("failed", "PolicyError")
    assert "this server allows 100,000" in view.line.error
