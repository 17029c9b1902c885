# SPDX-License-Identifier: Apache-2.0
"""What runs at a site; and, for training scripts of one's own, the client API: ``import hansa.client as flare``."""

from hansa.client.script import (
    FLModel,
    ParamsType,
    get_job_id,
    get_site_name,
    init,
    is_evaluate,
    is_running,
    is_train,
    receive,
    send,
    system_info,
)

__all__ = [
    "FLModel",
    "ParamsType",
    "get_job_id",
    "get_site_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_train",
    "receive",
    "send",
    "system_info",
]
