# SPDX-License-Identifier: Apache-2.0
"""Submit FedAvg over a NumPy array to a running NVIDIA FLARE, and wait for its end.

python flare_job.py FOLDER SITES ROUNDS     FOLDER has model.npy, stamps/, and the kit of admin@bench.org
"""

import sys
import time
from pathlib import Path

from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.fuel.flare_api.flare_api import new_secure_session


def main() -> None:
    folder, sites, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    recipe = NumpyFedAvgRecipe(
        name="peers",
        initial_ckpt=str(folder / "model.npy"),
        min_clients=sites,
        num_rounds=rounds,
        train_script=str(Path(__file__).with_name("flare_site.py")),
        train_args=str(folder / "stamps"),
    )
    recipe.export(str(folder / "jobs"))
    session = new_secure_session("admin@bench.org", str(next(folder.rglob("admin@bench.org"))), timeout=60.0)
    while len(session.get_system_info().client_info) < sites:
        time.sleep(0.5)
    job = session.submit_job(str(folder / "jobs" / "peers"))
    _, meta = session.monitor_job_and_return_job_meta(job, poll_interval=1.0)
    session.close()
    if meta["status"] != "FINISHED:COMPLETED":
        raise SystemExit(f"The job ended as {meta['status']}.")


if __name__ == "__main__":
    main()
