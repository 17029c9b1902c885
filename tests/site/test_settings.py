# SPDX-License-Identifier: Apache-2.0
"""``site.toml``: its errors name the nearest key, and its default text is valid."""

from __future__ import annotations

import re
import tomllib

import pytest

from hansa.errors import JobError
from hansa.pki.provision import provision
from hansa.site.settings import SiteSettings, commented, load


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "server: this key is needed"),
        ('server = "a:1"\n[polcy]\n', "Did you mean 'policy'"),
        ('server = "a:1"\n[policy]\nmax_round = 3\n', "Did you mean 'max_rounds'"),
        ('server = "a:1"\n[policy]\nmax_rounds = 0\n', "policy.max_rounds"),
        ('server = "a:1"\n[data.notes]\npath = "x"\n', "data.notes.train"),
        ('server = "a:1"\n[data."../x"]\ntrain = "x"\n', "data"),
        ("server = ", "can't be read"),
        ("\0", "can't be read"),
    ],
)
def test_errors_say_what_to_change(tmp_path, text, message):
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(JobError, match=re.escape(message)):
        load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(JobError, match="hansa provision"):
        load(tmp_path / "site.toml")


def test_the_default_text_is_valid_with_and_without_its_comments(tmp_path):
    """Every setting stands there once, and means what its section says when its ``#`` is taken away."""
    made = provision(tmp_path / "fed", "lab", "127.0.0.1", ["s0"], ["ana"], site_settings=commented())
    path = made.sites["s0"] / "site.toml"
    assert load(path) == SiteSettings(server="127.0.0.1:8470")
    text = re.sub(r"^# (?=(\[|\"|[a-z_]+ = ))", "", path.read_text(), flags=re.MULTILINE)
    path.write_text(text)
    found = load(path)
    assert found.policy.plugin is not None
    assert found.data["notes"].test is not None
    assert found.models
    values = tomllib.loads(text)
    for name, field in SiteSettings.model_fields.items():
        assert name in values
        if isinstance(values[name], dict) and name in ("policy", "resources", "privacy"):
            assert set(values[name]) == set(type(field.default).model_fields)
