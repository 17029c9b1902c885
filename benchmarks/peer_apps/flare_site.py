# SPDX-License-Identifier: Apache-2.0
"""What a site of NVIDIA FLARE runs: every parameter is multiplied by a constant. When a model comes is written to
``STAMPS/SITE``; STAMPS is the first argument.
"""

import sys
import time
from pathlib import Path

import numpy as np
import nvflare.client as flare


def main() -> None:
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        with (Path(sys.argv[1]) / flare.get_site_name()).open("a") as stamps:
            stamps.write(f"{time.time()}\n")
        trained = {name: value * np.float32(1.001) for name, value in model.params.items()}
        flare.send(flare.FLModel(params=trained, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main()
