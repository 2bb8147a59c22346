# mypy: ignore-errors
# Runs inside Flower's own environment: its types are not installed here.
"""FedAvg as Flower has it, over so many made-up float32 arrays, with sites that send back what they received."""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


class Rounds(FedAvg):
    """Flower's strategy, which notes when each round ends."""

    times = ""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate, and note the time."""
        result = super().aggregate_train(server_round, replies)
        with Path(self.times).open("a") as file:
            file.write(f"{time.time()}\n")
        return result


@client.train()
def train(message: Message, context: Context) -> Message:
    """Send the arrays back."""
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Do the rounds."""
    config = context.run_config
    array = np.random.default_rng(1).standard_normal(
        int(config["mebibytes"] * 2**20 / 4 / config["tensors"]), dtype=np.float32
    )
    sites = config["sites"]
    strategy = Rounds(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.times = config["times"]
    arrays = ArrayRecord([array + np.float32(at) for at in range(config["tensors"])])
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=config["rounds"], timeout=3600)
