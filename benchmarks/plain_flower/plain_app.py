"""Flower's FedAvg over a model of random numbers; the clients do nothing. Times and peak memory go to a file."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client_app = ClientApp()  # one by one: Flower looks for these names without running the file
server_app = ServerApp()


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@client_app.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"]
    # Out of the message and in again, as a client that trains would have to.
    state = {name: array.numpy() for name, array in arrays.items()}
    answer = ArrayRecord({name: Array(value) for name, value in state.items()})
    metrics = MetricRecord({"num-examples": 1, "peak": peak_mib()})
    return Message(RecordDict({"arrays": answer, "metrics": metrics}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    count, arrays = int(float(config["millions"]) * 1e6), int(config["arrays"])
    rng = np.random.default_rng(0)
    initial = ArrayRecord(
        {f"tensor_{i}": Array(rng.standard_normal(count // arrays, dtype=np.float32)) for i in range(arrays)}
    )
    times: list[float] = []

    def note(server_round: int, arrays: ArrayRecord) -> None:
        times.append(time.time())

    clients = int(config["clients"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    result = strategy.start(grid, initial, num_rounds=int(config["rounds"]), evaluate_fn=note)
    peaks = [record["peak"] for record in result.train_metrics_clientapp.values()]
    Path(str(config["result"])).write_text(
        json.dumps({"times": times, "server_mib": peak_mib(), "client_mib": max(peaks)})
    )
