# SPDX-License-Identifier: Apache-2.0
"""The log: one line an event, whoever wrote it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

EVENTS = """
    import logging
    import sys
    import structlog
    from hansa.server import logs

    logs.set_up(sys.argv[1])
    with logs.bound(job="j1", site="north", round=3):
        logging.getLogger("hansa.transport").warning("%s was refused: %s", "Answer", "bad\\nforged line\\x1b[2Jend")
        structlog.get_logger("hansa").info("accepted", bytes=5, who="a\\nb")
    logging.getLogger("hansa").info("after")
    logging.getLogger("uvicorn.error").info("not heard")
    logging.getLogger("uvicorn.error").warning("heard")
    try:
        raise ValueError("broken\\nvalue")
    except ValueError:
        logging.getLogger("hansa").exception("failed")
"""


def said(log_format: str) -> list[str]:
    code = textwrap.dedent(EVENTS)
    done = subprocess.run([sys.executable, "-c", code, log_format], check=True, capture_output=True, text=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_is_one_object_a_line() -> None:
    lines = [json.loads(line) for line in said("json")]
    assert len(lines) == 5
    first, second, third, fourth, last = lines
    assert (first["job"], first["site"], first["round"], first["level"]) == ("j1", "north", 3, "warning")
    assert first["event"] == "Answer was refused: bad\\nforged line\\x1b[2Jend"
    assert first["logger"] == "hansa.transport"
    assert (second["event"], second["bytes"], second["who"], second["job"]) == ("accepted", 5, "a\\nb", "j1")
    assert (third["event"], "job" in third) == ("after", False)
    assert fourth["event"] == "heard"
    assert "ValueError: broken" in last["exception"]
    assert all(line["timestamp"].endswith("Z") for line in lines)


def test_for_people_it_is_one_line_too() -> None:
    lines = said("console")
    refused = [line for line in lines if "was refused" in line]
    assert len(refused) == 1
    assert "\\nforged line\\x1b[2Jend" in refused[0]
    assert "job=j1" in refused[0]
    assert not any(line.startswith("forged") for line in lines)
    assert not any("\x1b" in line for line in lines)
    assert any("ValueError: broken" in line for line in lines)


@pytest.mark.parametrize("module", ["store", "blobs", "http", "logs", "settings"])
def test_the_server_loads_no_framework(module: str) -> None:
    code = f"import sys, hansa.server.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "transformers", "peft"} & set(done.stdout.split())
