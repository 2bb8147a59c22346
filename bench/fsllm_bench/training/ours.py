"""A site's worker: the very session that carries out a daemon's orders, in a process of its own."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from fsllm_bench.training.setting import Setting

_APART: Final = 1000
"""Rounds between the numbers of two chains, so that they take the batches in other orders."""


def serve(setting: Setting, turns: Connection) -> None:
    """Carry out a round a turn, each a pass over the rows; the first word is the path of version 0, which it builds.

    A turn is ("train", chain) and is answered with (seconds, path of the adapter after the round), or ("loss", path)
    and is answered with the adapter's loss on the held-out rows; None ends it. Each chain of rounds begins at version 0
    and takes the batches in an order of its own. The seconds are the whole order's: reading the base, training, keeping
    the optimizer's state and writing the delta, and also what a worker does while the round is gathered.
    """
    from fsllm_client.trainer.group import join
    from fsllm_client.trainer.orders import Build, Evaluate, Prepare, Train
    from fsllm_client.trainer.session import Session
    from fsllm_client.trainer.tensor_files import read_tensors, write_tensors

    group = join(0, 1)
    session = Session(lambda: group, lambda report: None, lambda: False)
    session.carry_out(Prepare(run_id="bench", plan=setting.plan, model=setting.model, data=setting.data, role="site"))
    first = setting.folder / "version-0.safetensors"
    session.carry_out(Build(adapter=first))
    turns.send(first)
    versions: dict[int, tuple[int, Path]] = {}
    while (turn := turns.recv()) is not None:
        match turn:
            case ("train", int() as chain):
                number, base = versions.get(chain, (0, first))
                number += 1
                delta = setting.folder / "delta.safetensors"
                private = setting.folder / f"private-{chain}"
                order = Train(round=chain * _APART + number, base=base, delta=delta, resume=private)
                began = time.monotonic()
                done = session.carry_out(order)
                session.look_ahead()
                seconds = time.monotonic() - began
                if done.counts["tokens"] != setting.answer_tokens:
                    raise ValueError(f"a pass held {done.counts['tokens']} answer tokens, not {setting.answer_tokens}")
                start, change = read_tensors(base), read_tensors(delta)
                version = setting.folder / f"ours-{chain}-{number}.safetensors"
                write_tensors(version, {name: start[name] + change[name] for name in start})
                versions[chain] = number, version
                turns.send((seconds, version))
            case ("loss", Path() as adapter):
                turns.send(session.carry_out(Evaluate(adapter=adapter)).metrics["loss"])
