# SPDX-License-Identifier: Apache-2.0
"""What a script is told over its link."""

TASK = {
    "type": "task",
    "task": "train",
    "job": "j",
    "round": 1,
    "rounds": 2,
    "meta": {},
    "correction": None,
    "private": None,
}
