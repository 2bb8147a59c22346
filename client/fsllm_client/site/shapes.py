"""Which tensors a plan's adapter has on a base model: ``python -m fsllm_client.site.shapes FOLDER < plan.json``.

Run in a process of its own, because it needs torch and the daemon's command must not hold it. Prints a JSON array of
[name, shape]. The model's weights are not read.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from fsllm_common.errors import FsllmError, InputError, ModelUnusable
from fsllm_common.plan import Plan, canonical_json, plan_from_json

_GAVE_UP: Final = 3


def adapter_shapes(plan: Plan, folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the adapter's tensors on the model in ``folder``, from a process that is started for it.

    Raises:
        ModelUnusable: MODEL_UNSUITABLE: the adapter does not fit.
        InputError: TRAINER_MISSING: the process can not import the training stack.

    """
    command = [sys.executable, "-m", "fsllm_client.site.shapes", str(folder)]
    done = subprocess.run(command, input=canonical_json(plan), capture_output=True, check=False)
    if done.returncode == _GAVE_UP:
        raise ModelUnusable("MODEL_UNSUITABLE", done.stderr.decode(errors="replace").strip().splitlines()[-1])
    if done.returncode:
        last = next(reversed(done.stderr.decode(errors="replace").strip().splitlines()), "no word")
        raise InputError("TRAINER_MISSING", f"The adapter's tensors could not be listed: {last}")
    return {name: tuple(shape) for name, shape in json.loads(done.stdout)}


def main() -> int:
    """Print the shapes for the plan on standard input."""
    # Lazy: the function above runs in processes without torch.
    from fsllm_client.trainer.adapters import adapter_parameters, attach
    from fsllm_client.trainer.base_model import check_folder, shape_of_model

    folder = Path(sys.argv[1])
    try:
        plan = plan_from_json(sys.stdin.buffer.read())
        check_folder(folder)
        tensors = adapter_parameters(attach(plan, shape_of_model(folder)))
    except FsllmError as error:
        sys.stderr.write(f"{error.message}\n")
        return _GAVE_UP
    sys.stdout.write(json.dumps([(name, list(tensor.shape)) for name, tensor in tensors.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
