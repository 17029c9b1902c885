# SPDX-License-Identifier: Apache-2.0
"""A Flower app: FedAvg over NumPy arrays, every parameter multiplied by a constant. When a site gets a model is
written to ``STAMPS/SITE``.
"""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    config = context.run_config
    size = round(config["tensor-mib"] * (1 << 20)) // 4
    values = np.random.default_rng(0).normal(size=size).astype(np.float32)
    count = max(1, round(config["mib"] / config["tensor-mib"]))
    sites = config["sites"]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.start(grid, ArrayRecord([values] * count), num_rounds=config["rounds"])


@client.train()
def train(message: Message, context: Context) -> Message:
    with (Path(context.run_config["stamps"]) / context.node_config["site"]).open("a") as stamps:
        stamps.write(f"{time.time()}\n")
    trained = [value * np.float32(1.001) for value in message.content["arrays"].to_numpy_ndarrays()]
    content = RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)
