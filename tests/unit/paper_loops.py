"""Two rounds of each method's client half as its paper writes them down, in plain torch.

They share nothing with what they check but the batches.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from plain_site import Site
from rules_site import Tensors

from fsllm_client.data.batches import Step
from fsllm_common.philox import signs, stream

RATE, STEPS, EPS = 0.15, 3, 0.4
RATES = {"fedmezo": 0.03, "fedkseed": 0.03}
"""Of methods whose step is along one direction, and as long as all elements together make it."""


def _minus(one: Tensors, other: Tensors) -> Tensors:
    return {name: one[name] - other[name] for name in other}


def _descend(at: Tensors, gradient: Tensors, rate: float = RATE) -> Tensors:
    return {name: at[name] - rate * gradient[name] if name in gradient else at[name] for name in at}


def _pulled(gradient: Tensors, at: Tensors, to: Tensors, strength: float) -> Tensors:
    return {name: gradient[name] + strength * (at[name] - to[name]) for name in gradient}


def _only(tensors: Tensors, letter: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if f"lora_{letter}" in name}


# Each: (site, batches, version's adapter, its other tensors, what the site keeps) -> (upload, kept, model to evaluate
# as a function of the version). What is kept is changed in place.
Kept = dict[str, Tensors]
Outcome = tuple[Tensors, Callable[[Tensors], Tensors]]


def scaffold_steps(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    c = {name: extra[f"control/{name}"] for name in x}
    c_k = kept.setdefault("c_k", {name: torch.zeros_like(tensor) for name, tensor in x.items()})
    y = x
    for _ in range(STEPS):
        g = site.gradient(y, next(batches))
        y = _descend(y, {name: g[name] - c_k[name] + c[name] for name in g})
    fresh = {name: c_k[name] - c[name] + (x[name] - y[name]) / (STEPS * RATE) for name in x}
    kept["c_k"] = fresh
    return {**_minus(y, x), **{f"control/{name}": fresh[name] - c_k[name] for name in x}}, lambda version: version


def scaffold_gradient(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    c = {name: extra[f"control/{name}"] for name in x}
    c_k = kept.setdefault("c_k", {name: torch.zeros_like(tensor) for name, tensor in x.items()})
    seen = [site.gradient(x, next(batches)) for _ in range(STEPS)]
    y = x
    for _ in range(STEPS):
        g = site.gradient(y, next(batches))
        y = _descend(y, {name: g[name] - c_k[name] + c[name] for name in g})
    fresh = {name: sum(g[name] for g in seen) / STEPS for name in x}
    kept["c_k"] = fresh
    return {**_minus(y, x), **{f"control/{name}": fresh[name] - c_k[name] for name in x}}, lambda version: version


def fednova(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    y = x
    for _ in range(STEPS):
        y = _descend(y, _pulled(site.gradient(y, next(batches)), y, x, 0.3))
    return _minus(y, x), lambda version: version


def fedprox(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    # FedNova's loop: what a site does is the same, and only what its update counts for is not.
    return fednova(site, batches, x, extra, kept)


def ditto(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    w, v = x, kept.get("v", x)
    for _ in range(STEPS):
        w = _descend(w, site.gradient(w, next(batches)))
    for _ in range(2):
        v = _descend(v, _pulled(site.gradient(v, next(batches)), v, x, 0.5))
    kept["v"] = v
    return _minus(w, x), lambda version: v


def pfedme(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    w, theta = x, x
    for _ in range(STEPS):
        step = next(batches)
        for _ in range(2):
            theta = _descend(theta, _pulled(site.gradient(theta, step), theta, w, 0.7), 0.1)
        w = {name: w[name] - RATE * 0.7 * (w[name] - theta[name]) for name in w}
    kept["theta"] = theta
    return _minus(w, x), lambda version: theta


def apfl(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    w, v = x, kept.get("v", x)
    alpha = float(kept["alpha"][""]) if "alpha" in kept else 0.6
    for _ in range(STEPS):
        step = next(batches)
        mixture = {name: alpha * v[name] + (1 - alpha) * w[name] for name in w}
        of_w, of_mixture = site.gradient(w, step), site.gradient(mixture, step)
        slope = sum(float(((v[name] - w[name]) * of_mixture[name]).sum()) for name in w)
        w, v = _descend(w, of_w), _descend(v, of_mixture, RATE * alpha)
        alpha = min(1.0, max(0.0, alpha - RATE * slope))
    kept["v"], kept["alpha"] = v, {"": torch.tensor(alpha)}
    return _minus(w, x), lambda version: {n: alpha * v[n] + (1 - alpha) * version[n] for n in version}


def fedper(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    own = kept.get("b", _only(x, "B"))
    y = {**x, **own}
    for _ in range(STEPS):
        y = _descend(y, site.gradient(y, next(batches)))
    own = kept["b"] = _only(y, "B")
    return _minus(y, _only(x, "A")), lambda version: {**version, **own}


def fedrep(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    y = {**x, **kept.get("a", _only(x, "A"))}
    for _ in range(5):  # 1.5 times 3, rounded up
        y = _descend(y, _only(site.gradient(y, next(batches)), "A"))
    for _ in range(STEPS):
        y = _descend(y, _only(site.gradient(y, next(batches)), "B"))
    own = kept["a"] = _only(y, "A")
    return _minus(y, _only(x, "B")), lambda version: {**version, **own}


def fdlora(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    shared, own = x, kept.get("own", x)
    for _ in range(STEPS):
        shared = _descend(shared, site.gradient(shared, next(batches)))
    for _ in range(2):
        own = _descend(own, site.gradient(own, next(batches)))
    step = next(batches)
    losses: dict[tuple[float, float], float] = {}

    def loss(w: tuple[float, float]) -> float:
        if w not in losses:
            mixed = {name: w[0] * own[name] + w[1] * x[name] for name in x}
            losses[w] = site.loss(mixed, step) + 0.01 * (abs(w[0]) + abs(w[1]))
        return losses[w]

    w = tuple(kept["w"][""].tolist()) if "w" in kept else (0.5, 0.5)
    for stride in (0.5, 0.25):
        while True:
            near = [(w[0] + d, w[1] + e) for d, e in ((stride, 0), (-stride, 0), (0, stride), (0, -stride))]
            best = min(near, key=loss)
            if loss(best) >= loss(w):
                break
            w = best
    kept["own"], kept["w"] = own, {"": torch.tensor(w)}
    return _minus(shared, x), lambda version: {n: w[0] * own[n] + w[1] * version[n] for n in version}


def fedalt(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    """Layer by layer in its own words: the mixture as two LoRAs whose products are weighed."""
    count = float(extra["scalars/updates"])
    own = kept.get("own", x)
    # In this test's federation the second version counts the site among its makers.
    rest = {n: (count * x[n] - own[n]) / (count - 1) for n in x} if kept else x
    gates = kept.get("gates") or {n: torch.zeros(2, t.shape[1]) for n, t in x.items() if n.endswith("lora_A.weight")}
    for _ in range(STEPS):
        leaves = {n: gate.clone().requires_grad_() for n, gate in gates.items()}
        with site.mixing(leaves, rest):
            own = _descend(own, site.gradient(own, next(batches)))
        gates = {n: gates[n] - RATE * leaf.grad for n, leaf in leaves.items()}
    kept["own"], kept["gates"] = own, gates
    return {**_minus(own, x), "scalars/updates": torch.zeros(1)}, lambda version: own


def ffa_lora(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    y = x
    for _ in range(STEPS):
        y = _descend(y, _only(site.gradient(y, next(batches)), "B"))
    return _minus(y, _only(x, "B")), lambda version: version


def rolora(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    letter = "A" if "trained once" in kept else "B"
    kept["trained once"] = {}
    y = x
    for _ in range(STEPS):
        y = _descend(y, _only(site.gradient(y, next(batches)), letter))
    return _minus(y, _only(x, letter)), lambda version: version


def _drawn(site: Site, round_: int, step: int) -> int:
    text = f"11/{site.number}/{round_}/{step}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _along(at: Tensors, key: int, far: float, prefix: str = "") -> Tensors:
    return {
        name: (value.double() + far * torch.from_numpy(signs(tuple(value.shape), key, stream(prefix + name)))).float()
        for name, value in at.items()
    }


def _slope(site: Site, at: Tensors, key: int, step: Step) -> float:
    return (site.loss(_along(at, key, EPS), step) - site.loss(_along(at, key, -EPS), step)) / (2 * EPS)


def fedmezo(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    round_ = 2 if "first" in kept else 1
    kept["first"] = {}
    y = x
    for number in range(1, STEPS + 1):
        key = _drawn(site, round_, number)
        y = _along(y, key, -RATES["fedmezo"] * _slope(site, y, key, next(batches)))
    return _minus(y, x), lambda version: version


def fedkseed(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    round_ = 2 if "first" in kept else 1
    kept["first"] = {}
    start = x
    for j, coefficient in enumerate(extra["scalars/coefficients"].tolist()):
        start = _along(start, j + (11 << 32), -RATES["fedkseed"] * coefficient)
    y, sums, amplitudes, draws = start, torch.zeros(8), torch.zeros(8), torch.zeros(8)
    for number in range(1, STEPS + 1):
        j = _drawn(site, round_, number) % 8
        if pro := "scalars/draws" in extra:
            amplitude, count = extra["scalars/amplitudes"].double(), extra["scalars/draws"].double()
            means = torch.where(count > 0, amplitude / count, 0.0)
            low, high = means.aminmax()
            limits = torch.softmax((means - low) / max(high - low, 1e-30), 0).cumsum(0)
            j = int((limits <= _drawn(site, round_, number) % 2**64 / 2**64).sum())
        rho = _slope(site, y, j + (11 << 32), next(batches))
        y = _along(y, j + (11 << 32), -RATES["fedkseed"] * rho)
        sums[j] += rho
        amplitudes[j] += abs(rho)
        draws[j] += 1
    added = {"scalars/amplitudes": amplitudes, "scalars/draws": draws} if pro else {}
    return {"scalars/coefficients": sums, **added}, lambda version: start


def ferret(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    round_ = 2 if "first" in kept else 1
    kept["first"] = {}
    sizes = {name: tensor.numel() for name, tensor in sorted(x.items())}
    counts = {name: max(1, 60 * size // sum(sizes.values())) for name, size in sizes.items()}
    ends = dict(zip(counts, itertools.accumulate(counts.values()), strict=True))
    start = dict(x)
    for number in range(1, 5):
        for name, count in counts.items():
            own = extra[f"scalars/{number:05d}"][ends[name] - count : ends[name]]
            for j, coordinate in enumerate(own.tolist()):
                start |= _along({name: start[name]}, j + (11 << 32), coordinate, f"{number}/")
    y = start
    for _ in range(STEPS):
        y = _descend(y, site.gradient(y, next(batches)))
    found = [
        (signs((size,), j + (11 << 32), stream(f"{round_}/{name}")) @ (y[name] - start[name]).flatten().numpy()).item()
        / counts[name]
        for name, size in sizes.items()
        for j in range(counts[name])
    ]
    return {f"scalars/{round_:05d}": torch.tensor(found)}, lambda version: start


def fedask(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    modules = sorted(name.removesuffix(".lora_A.weight") for name in x if "lora_A" in name)
    s = 16 / 3
    second = "local" in kept
    if not second:
        y = x
        for _ in range(STEPS):
            y = _descend(y, site.gradient(y, next(batches)))
        kept["local"] = y
    upload = {}
    for module in modules:
        a, b = (kept["local"][f"{module}.lora_{key}.weight"] for key in "AB")
        if second:
            upload[f"sketch/{module}.lora_Z"] = s * a.T @ (b.T @ extra[f"sketch/{module}.lora_Q"])
        else:
            upload[f"sketch/{module}.lora_Y"] = s * b @ (a @ extra[f"sketch/{module}.lora_O"])
    return upload, lambda version: version


def fedex(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    round_ = 2 if "first" in kept else 1
    kept["first"] = {}
    weights = [math.exp(value) for value in extra["scalars/arms"].tolist()]
    theta = [weight / sum(weights) for weight in weights]
    digest = hashlib.blake2b(f"11/{round_}/{site.number}/arm".encode(), digest_size=8).digest()
    drawn = int.from_bytes(digest, "little") / 2**64
    arm = next(index for index in range(3) if drawn < sum(theta[: index + 1]))
    y = x
    for _ in range(STEPS):
        y = _descend(y, site.gradient(y, next(batches)), RATE * (0.5, 1.0, 2.0)[arm])
    worth = [0.0] * 3
    worth[arm] = (site.validation_loss(y) - site.validation_loss(x)) / theta[arm]
    return {**_minus(y, x), "scalars/arms": torch.tensor(worth)}, lambda version: version


def hetlora(site: Site, batches: Iterator[Step], x: Tensors, extra: Tensors, kept: Kept) -> Outcome:
    """Pruning with gamma 0.7: of 3 ranks 2 are kept, and then 1."""
    pairs = [(n, n.replace("lora_A", "lora_B")) for n in x if "lora_A" in n]
    ranks = {a: int(kept["ranks"][a]) if kept else 3 for a, _ in pairs}

    def last(at: Tensors, a: str, b: str) -> torch.Tensor:
        first = {3: 2, 2: 1, 1: 1}[ranks[a]]
        return at[b][:, first:].norm() * at[a][first:].norm()

    def cut(at: Tensors) -> Tensors:
        made = dict(at)
        for a, b in pairs:
            left = (torch.arange(3) < ranks[a]).float()
            made[a], made[b] = at[a] * left[:, None], at[b] * left
        return made

    y = cut(x)
    before = {a: float(last(y, a, b)) for a, b in pairs}
    for _ in range(STEPS):
        leaves = {n: tensor.clone().requires_grad_() for n, tensor in y.items()}
        sum(0.05 * last(leaves, a, b) for a, b in pairs if float(last(y, a, b))).backward()
        gradient = site.gradient(y, next(batches))
        y = _descend(y, {n: g + (leaves[n].grad if leaves[n].grad is not None else 0) for n, g in gradient.items()})
    fallen = [a for a, b in pairs if float(last(y, a, b)) < before[a]]
    assert fallen
    ranks |= {a: {3: 2, 2: 1}[ranks[a]] for a in fallen}
    kept["ranks"] = {a: torch.tensor(rank) for a, rank in ranks.items()}
    return _minus(cut(y), x), lambda version: version


CASES: dict[str, tuple[Callable[..., Outcome], str, dict[str, Any]]] = {
    "scaffold-steps": (scaffold_steps, "scaffold", {"estimate": "steps"}),
    "scaffold-gradient": (scaffold_gradient, "scaffold", {}),
    "fednova": (fednova, "fednova", {"mu": 0.3}),
    "fedprox": (fedprox, "fedprox", {"mu": 0.3}),
    "ditto": (ditto, "ditto", {"pull": 0.5, "steps": 2}),
    "pfedme": (pfedme, "pfedme", {"pull": 0.7, "inner_steps": 2, "inner_learning_rate": 0.1}),
    "apfl": (apfl, "apfl", {"alpha": 0.6}),
    "fedper": (fedper, "fedper", {}),
    "fdlora": (fdlora, "fdlora", {"steps": 2, "halvings": 2, "price": 0.01}),
    "fedalt": (fedalt, "fedalt", {}),
    "ffa-lora": (ffa_lora, "ffa-lora", {}),
    "rolora": (rolora, "rolora", {}),
    "fedmezo": (fedmezo, "fedmezo", {"eps": EPS}),
    "fedkseed": (fedkseed, "fedkseed", {"eps": EPS, "seeds": 8}),
    "fedkseed-pro": (fedkseed, "fedkseed", {"eps": EPS, "seeds": 8, "draw": "amplitude"}),
    "fedask": (fedask, "fedask", {}),
    "ferret": (ferret, "ferret", {"coordinates": 60}),
    "fedex": (fedex, "fedex", {"learning_rates": "0.5,1,2"}),
    "hetlora": (hetlora, "hetlora", {"prune_penalty": 0.05, "keep": 0.7}),
    "fedrep": (fedrep, "fedrep", {"personal": "lora_A", "personal_share": 1.5}),
}
