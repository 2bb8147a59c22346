"""The adapter that a personalised method has made for this site alone: where the trainer leaves it, and its export.

The trainer writes it whenever it trains a round or measures a version, as one safetensors file with the adapter's
configuration, so that the export needs no model and no torch. The folder is complete when adapter_config.json lies in
it: that is written last. Of a method that mixes the adapter with another one (``LocalRule.beside``) the other is in
``rest``, an adapter itself, and what mixes them in ``mixer.safetensors``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fsllm_common.algorithms import algorithm_class
from fsllm_common.algorithms.local_rule import GATE, REST
from fsllm_common.errors import SettingsInvalid
from fsllm_common.files import disk_errors, write_atomic
from fsllm_common.plan import Plan

if TYPE_CHECKING:
    from fsllm_common.tensors.arrays import Array

FILE: Final = "own-adapter.safetensors"
"""In a run's private folder."""

_WEIGHTS: Final = "adapter_model.safetensors"
_CONFIG: Final = "adapter_config.json"
_REST: Final = "rest"
_MIXER: Final = "mixer.safetensors"


@dataclass(frozen=True, slots=True)
class OwnAdapter:
    """What was exported."""

    tensors: int
    version: int | None
    """The version whose shared tensors are in it; None where an older fsllm has left it and did not say."""
    round: int | None
    """The round up to which the site's own part of it was trained; ``version``, where that version was measured."""
    mixed: bool = False
    """It is to be mixed with the adapter in ``rest``, by ``mixer.safetensors``."""


def facts(config: str, version: int, round_number: int) -> dict[str, str]:
    """Return the metadata of ``FILE``: the PEFT configuration in JSON, and of what the adapter is."""
    return {"adapter_config": config, "version": str(version), "round": str(round_number)}


def export_own(private: Path, plan: Path, folder: Path, *, force: bool) -> OwnAdapter:
    """Write a run's own adapter into ``folder`` as PEFT loads it.

    Args:
        private: The run's private folder.
        plan: The file with the run's plan, in JSON.
        folder: Where to; made when absent.
        force: Replace an adapter that is there.

    Raises:
        SettingsInvalid: There is none, or an adapter is in the folder and ``force`` is not set.
        PlanInvalid: There is none, and the package of the run's method is not installed any more.
        Unavailable: DISK_FULL, DISK_FAILED.

    """
    # Here, because numpy is not for the small commands.
    from safetensors import safe_open
    from safetensors.numpy import save

    from fsllm_client.trainer.export import as_peft

    source = private / FILE
    if not source.is_file():
        raise _missing(plan)
    whole = (_WEIGHTS, _CONFIG, _REST, _MIXER)
    if not force and (present := [name for name in whole if (folder / name).exists()]):
        raise SettingsInvalid(
            f"{folder} holds {', '.join(present)} already", cure="Name another folder, or replace them with --force."
        )
    with disk_errors(folder):
        with safe_open(source, framework="numpy") as file:
            metadata = file.metadata()
            every = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        rest, gates = (_take(every, prefix) for prefix in (REST, GATE))
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (folder / _CONFIG, folder / _MIXER, *(folder / _REST / name for name in (_CONFIG, _WEIGHTS))):
            stale.unlink(missing_ok=True)
        config = json.loads(metadata["adapter_config"])
        if rest:
            write_atomic(folder / _MIXER, save(gates, {"format": "pt"}))
            _write(folder / _REST, *as_peft(rest, config))
        tensors, config = as_peft(every, config)
        _write(folder, tensors, config)
    version, round_number = (int(metadata[key]) if key in metadata else None for key in ("version", "round"))
    return OwnAdapter(len(tensors), version, round_number, mixed=bool(rest))


def _write(folder: Path, tensors: "dict[str, Array]", config: dict[str, object]) -> None:
    from safetensors.numpy import save

    folder.mkdir(exist_ok=True)
    write_atomic(folder / _WEIGHTS, save(tensors, {"format": "pt"}))
    write_atomic(folder / _CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _take(tensors: "dict[str, Array]", prefix: str) -> "dict[str, Array]":
    """Take out what has names that begin with a prefix, and return it by the rest of the names."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def _missing(path: Path) -> SettingsInvalid:
    """Return the error that says why a run has left no adapter of its own."""
    plan = Plan.model_validate_json(path.read_bytes())  # it was judged when it came
    name, method = plan.algorithm.name, algorithm_class(plan.algorithm.name)(plan)
    shared = "What the sites share is exported by the operator: fsllm run export RUN -o FOLDER"
    if not method.personalised:
        return SettingsInvalid(f"{name} makes one model for all sites, and none for this site alone", cure=shared)
    if not method.leaves_adapter:
        message = f"{name}'s model of this site is more than an adapter: it changes how the base model computes"
        return SettingsInvalid(message, cure=shared)
    return SettingsInvalid(
        "this site has no adapter of its own for this run yet",
        cure="It is there once this site has trained a round of the run, or measured a version.",
    )
