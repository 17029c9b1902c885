# SPDX-License-Identifier: Apache-2.0
"""The public names exist, are sorted, and mean what their home says."""

import importlib

import hansa


def test_public_names_are_true_and_sorted():
    assert hansa.__all__ == sorted(hansa.__all__)
    assert set(hansa.__all__) == {*hansa._HOMES, "__version__"}
    for name, home in hansa._HOMES.items():
        assert getattr(hansa, name) is getattr(importlib.import_module(home), name)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(hansa, "fedavgg")
