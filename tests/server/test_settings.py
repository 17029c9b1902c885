# SPDX-License-Identifier: Apache-2.0
"""server.toml: defaults < file < flags, and errors that say what to write instead."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from hansa.errors import JobError
from hansa.server.settings import ServerSettings, commented, load, split_address


def test_defaults_then_the_file_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    assert load(path) == ServerSettings()
    path.write_text('listen = "10.0.0.1:9000"\nlease_s = 30\n[quota]\njobs = 3\n')
    settings = load(path, ["quota.bytes=100", "lease_s=20", "http=off"])
    assert settings.listen_address == ("10.0.0.1", 9000)
    assert (settings.lease_s, settings.quota.jobs, settings.quota.bytes) == (20, 3, 100)
    assert settings.http_address is None


def test_health_is_on_loopback_unless_told_otherwise() -> None:
    assert ServerSettings().http_address == ("127.0.0.1", 8471)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("listn = 'x:1'", "listn: unknown key. Did you mean 'listen'?"),
        ("[quota]\njob = 1", "quota.job: unknown key. Did you mean 'jobs'?"),
        ("endpoint = 'x'", "endpoint: unknown key. Did you mean 's3.endpoint'?"),
        ("max_running_jobs = 0", "max_running_jobs: Input should be greater than 0 (got 0)."),
        ("listen = '::1:8470'", "listen: an IPv6 address stands in brackets"),
        ("listen = 'host'", "listen: an address is HOST:PORT"),
        ("listen = ':1'", "listen: an address is HOST:PORT"),
        ("http = 'x:99999'", "http: an address is HOST:PORT"),
        ("lease_s = nan", "lease_s: "),
        ("database = 'mysql://x'", "database: a database is sqlite:///PATH or postgresql://USER@HOST/NAME"),
        ("blobs = 'gs://x'", "blobs: a blob store is s3://BUCKET"),
        ("blobs = 's3:///x'", "blobs: a blob store is s3://BUCKET"),
        ("log_format = 'xml'", "log_format: "),
        ("[quota", "can't be read"),
        ("lease_s = 'x' = 1", "can't be read"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "server.toml"
    path.write_text(text)
    with pytest.raises(JobError) as caught:
        load(path)
    assert message in str(caught.value)
    assert "server.toml" in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(JobError, match="can't be read"):
        load(tmp_path / "server.toml")


def test_the_commented_file_names_every_setting_and_is_valid_with_and_without_comments() -> None:
    text = commented()
    assert tomllib.loads(text) == {}
    bare = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#") and not line.startswith("# "))
    values = tomllib.loads(bare)
    assert {"listen", *values} == set(ServerSettings.model_fields)
    for name, section in ServerSettings():
        if isinstance(section, BaseModel):
            assert set(values[name]) == set(type(section).model_fields)
    ServerSettings(**values)


def test_addresses() -> None:
    assert split_address("0.0.0.0:0") == ("0.0.0.0", 0)
    assert split_address("[::]:8470") == ("::", 8470)
    for wrong in ("", ":", "x", "x:", "x:-1", "x:65536", "x:٣", "[::1:5"):
        with pytest.raises(ValueError):
            split_address(wrong)
