"""A module's tensors together: what methods look at that aggregate products of factors rather than factors.

A LoRA module adds s B A to its weight, B (m, r), A (r, n), s = alpha / r (rsLoRA: alpha / sqrt(r)). Sites of different
ranks have different shapes and scales, so that only their products can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fsllm_common.algorithms.algorithm import Refusal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fsllm_common.plan import Plan

    Tensors: TypeAlias = Mapping[str, npt.NDArray[np.float64]]

OTHER_FACTORS: Final = Refusal(
    "algorithm.name, train.optimizer_state",
    lambda method: method.plan.train.optimizer_state == "keep",
    "this method begins each round with other factors than the last one has trained, drawn anew or rotated, which an "
    "optimizer's moments are not of: say optimizer_state: reset",
)
"""Of methods whose A and B are not those that the sites have trained, nor their mean."""

_NAME: Final = re.compile(
    r"(?:(?:control|sketch)/|base_delta/[^/]*/)?(.+)\.lora_(?:embedding_)?([A-Z]|magnitude_vector)\b.*"
)


def module_and_key(name: str) -> tuple[str, str]:
    """Return the module that a tensor belongs to and what it is there: A, B, R, U, V, Y, Z or magnitude_vector.

    A tensor of no LoRA module is a module by itself, whose key is empty.
    """
    found = _NAME.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


def by_module(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the names of tensors by their module and key, in the order in which the modules come first."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        module, key = module_and_key(name)
        found.setdefault(module, {})[key] = name
    return found


def scale(plan: Plan, rank: int) -> float:
    """Return s of a module of this rank."""
    return plan.adapter.alpha / (math.sqrt(rank) if plan.adapter.kind == "rslora" else rank)


def of_rank(key: str, shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return the shape that a module's tensor has at a smaller rank: (rank, n) of A, (m, rank) of B, (rank, rank) of R.

    Others are the same at any.
    """
    return tuple(min(size, rank) if axis in _RANKED.get(key, ()) else size for axis, size in enumerate(shape))


def cut(key: str, array: npt.NDArray[np.floating[Any]], rank: int, plan: Plan) -> npt.NDArray[np.floating[Any]]:
    """Return a tensor of the plan's rank as a site of ``rank`` gets it, so that s B A keeps its first terms.

    Those are the first rows of A and columns of B, rescaled by s / s_rank, and R's first rows and columns.
    """
    whole = plan.adapter.rank
    if rank == whole or key not in _RANKED:
        return array
    first = array[tuple(slice(size) for size in of_rank(key, array.shape, rank))]
    return first * (scale(plan, whole) / scale(plan, rank)) if key == "B" else first


_RANKED: Final[Mapping[str, tuple[int, ...]]] = {"A": (0,), "B": (1,), "R": (0, 1)}
"""Which axes of a module's tensors are as long as the adapter's rank."""


@dataclass(frozen=True, slots=True)
class LayerUpdate:
    """What one site made of a module."""

    share: float
    rank: int
    """Of its adapter."""
    scale: float
    """s of this rank."""
    tensors: Tensors
    """Its tensors after training, by key: the base version's in float32, plus the delta that the site sent.

    The site itself started from these as the wire had rounded them; what that has lost is not to be lost here.
    """


@dataclass(frozen=True, slots=True)
class Layer:
    """A module in one round, in float64."""

    round: int
    module: str
    base: Tensors
    """The base version's tensors by key, those that do not move too: the server's own, in float32."""
    scale: float
    """s of the base version's rank, which is the plan's."""
    updates: Sequence[LayerUpdate]
    base_delta: Sequence[Tensors]
    """What was added to the module's weight in earlier rounds: U (m, R), V (R, n) of each entry."""

    @property
    def is_lora(self) -> bool:
        """The module has the two factors."""
        return {"A", "B"} <= self.base.keys()

    def mean(self, key: str, shares: Sequence[float] | None = None) -> npt.NDArray[np.float64]:
        """Return sum_k w_k X_k at the plan's rank: what a smaller rank lacks is 0, and B_k counts as (s_k / s) B_k.

        So wherever the other factor is the same at all sites, but for the ranks, s B A is the mean of s_k B_k A_k.

        Args:
            key: Which of the tensors.
            shares: w_k; the updates' own when not given.

        """
        total = self.base[key] * 0
        for update, share in zip(self.updates, shares or [update.share for update in self.updates], strict=True):
            sent = update.tensors[key]
            there = tuple(slice(size) for size in sent.shape)
            total[there] += share * (update.scale / self.scale if key == "B" else 1.0) * sent
        return total

    def stacked(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return U (m, R) and V (R, n), R the sum of the ranks, of which U V = sum_k p_k s_k B_k A_k (FLoRA)."""
        import numpy as np

        wide = [update.share * update.scale * update.tensors["B"] for update in self.updates]
        return np.concatenate(wide, axis=1), np.concatenate([update.tensors["A"] for update in self.updates])


def truncated_svd(
    wide: npt.NDArray[np.float64], tall: npt.NDArray[np.float64], rank: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return U S (m, rank) and V^T (rank, n), the best approximation of this rank of the product ``wide @ tall``.

    QR of both factors, and the SVD of a core of their inner size R: the product is not formed. It is where R is no
    smaller than m or n, for then the dense one is as cheap. Columns beyond the product's rank are 0. Signs are fixed,
    so that the result is a function of the product: the largest element of each column of U is positive.

    Args:
        wide: (m, R).
        tall: (R, n).
        rank: Of the result.

    """
    import numpy as np

    inner = wide.shape[1]
    if inner >= min(wide.shape[0], tall.shape[1]):
        left, values, right = np.linalg.svd(wide @ tall, full_matrices=False)
    else:
        q_wide, r_wide = np.linalg.qr(wide)
        q_tall, r_tall = np.linalg.qr(tall.T)
        left, values, right = np.linalg.svd(r_wide @ r_tall.T)
        left, right = q_wide @ left, right @ q_tall.T
    kept = min(rank, len(values))
    left, values, right = left[:, :kept], values[:kept], right[:kept]
    sign = np.sign(left[np.abs(left).argmax(axis=0), np.arange(kept)])
    sign[sign == 0] = 1
    first = np.zeros((wide.shape[0], rank))
    second = np.zeros((rank, tall.shape[1]))
    first[:, :kept] = left * (values * sign)
    second[:kept] = right * sign[:, None]
    return first, second
