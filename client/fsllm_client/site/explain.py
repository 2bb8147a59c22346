"""What a plan would send from this site, for the person who answers for its data: `fsllm-client explain PLAN`."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from fsllm.v1.tensors_pb2 import TensorRole
from fsllm_client.site import synthetic
from fsllm_client.site.machine import Machine
from fsllm_client.site.policy import MEASURED, UNMEASURED, Policy, Role
from fsllm_client.site.privacy import noise_of, part_in, trains
from fsllm_client.site.shapes import adapter_shapes
from fsllm_common.accounting.budget import epsilon_of
from fsllm_common.algorithms import algorithm_class
from fsllm_common.errors import FsllmError
from fsllm_common.plan import Plan
from fsllm_common.tensors.manifest import WIDTH, WIRE_TYPES, role_of

_ALWAYS: Final = {
    "Hello": "the versions of protocol and software, the ids of orders in hand, the number of GPUs and their memory, "
    "this host's memory, and whether the training stack is installed",
    "Answer": "accepted, declined, failed or done, with a reason and a sentence; it may name files and lines, but no "
    "content",
    "Heartbeat": "nothing; it says that the daemon lives",
    "Certificate request": "a new public key, signed by its key; the certificate names federation, role and site",
    "Download request": "the digest of the version wanted, and an offset",
}
_NEVER: Final = (
    "a row of the data, any text, any token",
    "the base model or any part of it",
    "private keys and join tokens after their first use",
    "optimizer state, gradients of single steps or examples",
    "names of files and folders, except in the message of a refusal",
    "the policy and the privacy ledger, except the line that a refusal names and the run's epsilon",
)


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One tensor as it leaves."""

    name: str
    shape: tuple[int, ...]
    role: str
    element_type: str
    bytes: int
    rounds: int
    """In how many rounds of the run it is sent."""


@dataclass(slots=True)
class Explanation:
    """The whole answer; ``--json`` prints these fields."""

    plan: str
    role: Role
    accepted: bool
    waits_for_person: bool
    refusals: list[str]
    rounds: int
    messages: dict[str, str]
    """Kind: what is in it."""
    metrics: list[str]
    counts: list[str]
    tensors: list[TensorLine] = field(default_factory=list)
    tensors_unknown: str = ""
    """Why the tensors could not be listed; empty when they could."""
    kept: list[str] = field(default_factory=list)
    """Tensors that are trained here and stay here."""
    bytes_per_round: int = 0
    """At most."""
    bytes_in_all: int = 0
    privacy: str = ""
    epsilon: float | None = None
    never: tuple[str, ...] = _NEVER


def explain(plan: Plan, policy: Policy, role: Role, machine: Machine) -> Explanation:
    """Say what ``plan`` would send from this site, and whether its policy accepts it."""
    learns = trains(plan)
    part = part_in(plan, role)
    noise = noise_of(plan, part)
    refusals = [refusal.message for refusal in policy.refusals(plan, part)]
    epsilon = epsilon_of(noise.multiplier, plan.rounds, noise.delta) if noise is not None else None
    if epsilon is not None:
        try:
            policy.refuse_epsilon(epsilon, 0.0, planned=True)
        except FsllmError as error:
            refusals.append(error.message)
    try:
        policy.model_folder(plan.model.name)
    except FsllmError as error:
        refusals.append(error.message)
    evaluated = policy.evaluation_metrics(plan) if learns else []
    found = Explanation(
        plan=plan.name,
        role=role,
        accepted=not refusals,
        waits_for_person=not policy.accept.automatic,
        refusals=refusals,
        rounds=plan.rounds,
        messages=_messages(plan, policy, role, evaluated),
        metrics=_metrics(plan, policy, part, evaluated),
        counts=[] if part == "evaluator" else ["steps"] if noise is not None else ["examples", "tokens", "steps"],
        epsilon=epsilon,
        privacy=_privacy(plan, learns, part, epsilon),
    )
    if part == "site":
        _add_tensors(found, plan, policy, machine)
    return found


def _messages(plan: Plan, policy: Policy, role: Role, evaluated: list[str]) -> dict[str, str]:
    messages, part = dict(_ALWAYS), part_in(plan, role)
    loss = ", the training loss" if part == "site" and policy.loss_may_leave(plan) else ""
    messages["Progress"] = f"the activity, how much of it is done, its speed, the learning rate{loss}"
    if evaluated:
        messages["Done"] = f"{', '.join(evaluated)}, each with the number of examples or tokens behind it"
    if part == "site":
        messages["Upload"] = "once a round: the manifest and the tensors below, the counts and the metrics"
    if role == "site":
        messages["Upload of version 0"] = (
            "only when this site is chosen to build it: all tensors of the adapter as they begin, made from the seed"
        )
    return messages


def _metrics(plan: Plan, policy: Policy, part: Role, evaluated: list[str]) -> list[str]:
    if part == "evaluator":
        return evaluated
    every = dict.fromkeys((*MEASURED, *UNMEASURED), 0.0)
    noised = noise_of(plan, part) is not None
    clips = bool(plan.pipeline)
    absent = {
        "epsilon": not noised,
        "noise_deviation": not noised,
        "clip_norm": not clips,
        "clipped": not clips,
        "delta_norm": not clips,
    }
    kept = policy.update_metrics(every, noised=noised) if trains(plan) else {}
    return [*(name for name in kept if not absent.get(name, False)), *evaluated]


def _privacy(plan: Plan, learns: bool, part: Role, epsilon: float | None) -> str:
    if not learns:
        return "The algorithm reads no data; the tensors are constants."
    if part == "evaluator":
        return "Nothing is trained here; what is measured is sent without noise."
    if epsilon is None:
        return (
            "No noise: the text does not leave, but the tensors are not differentially private and may tell something "
            "of the rows they were trained on."
        )
    noise = noise_of(plan, part)
    delta = noise.delta if noise is not None else 0.0
    return (
        f"Each delta is clipped and noised here, before it leaves: epsilon {epsilon:.3g} at delta {delta:g} over all "
        f"{plan.rounds} rounds, for this site's whole contribution. Evaluation metrics are not noised and not covered."
    )


def _add_tensors(found: Explanation, plan: Plan, policy: Policy, machine: Machine) -> None:
    try:
        if not trains(plan):
            shapes = synthetic.shapes(plan)
        else:
            folder = policy.model_folder(plan.model.name)
            if machine.missing:
                found.tensors_unknown = f"{', '.join(machine.missing)} not installed: the adapter can not be made here"
                return
            if folder is None:
                found.tensors_unknown = f"{plan.model.name} is no model"
                return
            shapes = adapter_shapes(plan.with_rank(policy.rank(plan, "site")), folder)
    except FsllmError as error:
        found.tensors_unknown = error.message
        return
    width = WIDTH[WIRE_TYPES[plan.wire.element_type]]
    algorithm = algorithm_class(plan.algorithm.name)(plan)
    if learns := trains(plan):
        shapes = {**shapes, **{name: array.shape for name, array in algorithm.extra(shapes).items()}}  # noqa: S610 (no Django)
    schedule = Counter(algorithm.moving(round_) for round_ in range(1, plan.rounds + 1))
    moving: Counter[str] = Counter()
    for parts, rounds in schedule.items():
        moving.update(dict.fromkeys(parts, rounds))
    found.kept = sorted(name for name in shapes if learns and role_of(name) in algorithm.personal)
    found.tensors = [
        TensorLine(
            name=name,
            shape=shape,
            role=TensorRole.Name(role_of(name)).removeprefix("TENSOR_ROLE_").lower(),
            element_type=plan.wire.element_type,
            bytes=math.prod(shape) * width,
            rounds=rounds,
        )
        for name, shape in sorted(shapes.items(), key=lambda item: item[0].encode())
        if (rounds := moving[algorithm.part_of(name, role_of(name))]) and name not in found.kept
    ]
    of_part: Counter[str] = Counter()
    for line in found.tensors:
        of_part[algorithm.part_of(line.name, role_of(line.name))] += line.bytes
    found.bytes_per_round = max(sum(of_part[part] for part in parts) for parts in schedule)
    found.bytes_in_all = sum(line.bytes * line.rounds for line in found.tensors)


def lines(found: Explanation) -> list[str]:
    """Return the explanation as text."""
    if found.refusals:
        verdict = ["This site's policy REFUSES the plan:", *(f"  - {refusal}" for refusal in found.refusals)]
    elif found.waits_for_person:
        verdict = ["This site's policy allows the plan; it begins when someone says `fsllm-client accept RUN`."]
    else:
        verdict = ["This site's policy accepts the plan."]
    out = [
        f"Plan {found.plan}, {found.rounds} rounds, as {found.role}",
        *verdict,
        "",
        "What leaves, by kind of message:",
    ]
    out += [f"  {kind}: {content}" for kind, content in found.messages.items()]
    out += ["", f"Metrics beside an update or evaluation: {', '.join(found.metrics) or 'none'}"]
    out += [f"Counts beside an update: {', '.join(found.counts) or 'none'}"]
    if found.tensors_unknown:
        out += ["", f"Tensors: can not be listed here: {found.tensors_unknown}"]
    elif found.tensors:
        out += ["", f"Tensors of an update: {len(found.tensors)}"]
        width = max(len(line.name) for line in found.tensors)
        out += [
            f"  {line.name:{width}}  {'x'.join(map(str, line.shape)) or 'scalar':>14}  {line.role:9}  "
            f"{line.element_type}  {line.bytes:>12,} bytes"
            + (f" in {line.rounds} of {found.rounds} rounds" if line.rounds < found.rounds else "")
            for line in found.tensors
        ]
        most = "" if all(line.rounds == found.rounds for line in found.tensors) else "at most "
        total = f"{found.bytes_in_all:,} bytes in all {found.rounds} rounds"
        out += [f"  {most}{found.bytes_per_round:,} bytes a round, {total}"]
    if found.kept:
        out += [f"Tensors that are trained here and stay here: {len(found.kept)}, e.g. {found.kept[0]}"]
    out += ["", f"Privacy: {found.privacy}", "", "What never leaves:"]
    out += [f"  {thing}" for thing in found.never]
    return out
