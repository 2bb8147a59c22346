"""Flower's own aggregations of the arrays in a file. Run with the Python of an environment that has ``flwr``.

python flwr_aggregates.py IN.npz OUT.npz
"""

import sys

import numpy as np
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvgM, aggregate

given = np.load(sys.argv[1])
rows, examples = given["rows"], [int(number) for number in given["examples"]]
results = [([row], number) for row, number in zip(rows, examples, strict=True)]

value, versions = given["base"], []
fedavgm = FedAvgM(initial_parameters=ndarrays_to_parameters([value]), server_learning_rate=0.7, server_momentum=0.9)
fedavgm.initialize_parameters(None)
for round_, deltas in enumerate(given["deltas"], start=1):
    sent = [ndarrays_to_parameters([value + delta]) for delta in deltas]
    fits = [
        (None, FitRes(Status(Code.OK, ""), parameters, number, {}))
        for parameters, number in zip(sent, examples, strict=False)
    ]
    parameters, _ = fedavgm.aggregate_fit(round_, fits, [])
    (value,) = parameters_to_ndarrays(parameters)
    versions.append(value)

many = [([row], 1) for row in given["many"]]
np.savez(
    sys.argv[2],
    bulyan=aggregate.aggregate_bulyan(many, 3, aggregate.aggregate_krum, to_keep=0)[0],
    fedavg=aggregate.aggregate(results)[0],
    median=aggregate.aggregate_median(results)[0],
    trimmed=aggregate.aggregate_trimmed_avg(results, 0.25)[0],
    krum=aggregate.aggregate_krum(results, 2, 0)[0],
    multikrum=aggregate.aggregate_krum(results, 2, 4)[0],
    fedavgm=np.array(versions),
)
