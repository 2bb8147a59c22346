# mypy: ignore-errors
# Runs inside NVIDIA FLARE's own environment, as the custom code of a job: its types are not installed here.
"""A site that sends back what it received, by FLARE's client API."""

import nvflare.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
