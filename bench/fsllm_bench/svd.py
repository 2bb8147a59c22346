"""FlexLoRA's server step, factored and dense: ``python -m fsllm_bench.svd``."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from fsllm_bench.report import markdown, write_section
from fsllm_common.algorithms.layers import truncated_svd

RANK: Final = 16
COLUMNS: Final = ("matrix", "sites of rank 16", "dense, s", "factored, s", "times faster", "relative difference")


def seconds(work: Callable[[], object], times: int) -> float:
    """Return the median of so many runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def dense(wide: np.ndarray, tall: np.ndarray) -> np.ndarray:
    """Return the best approximation of rank 16 of the product, from the product."""
    left, values, right = np.linalg.svd(wide @ tall, full_matrices=False)
    best: np.ndarray = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    return best


@click.command()
@click.option("--size", default=2048, show_default=True, help="Of the square matrix.")
@click.option("--write", default=None, type=click.Path(path_type=Path, exists=True), help="The page to write.")
def main(size: int, write: Path | None) -> None:
    """Time the truncated SVD of a module's mean product: by its factors, and by the dense matrix."""
    random = np.random.default_rng(0)
    table = Table(*COLUMNS, title="FlexLoRA's server step for one module")
    rows: list[list[str]] = []
    for sites in (4, 10, 32):
        wide, tall = random.normal(size=(size, RANK * sites)), random.normal(size=(RANK * sites, size))
        left, right = truncated_svd(wide, tall, RANK)
        best = dense(wide, tall)
        difference = float(np.linalg.norm(left @ right - best) / np.linalg.norm(best))
        slow = seconds(lambda w=wide, t=tall: dense(w, t), 1)  # type: ignore[misc]
        fast = seconds(lambda w=wide, t=tall: truncated_svd(w, t, RANK), 5)  # type: ignore[misc]
        rows.append(
            [f"{size} x {size}", str(sites), f"{slow:.2f}", f"{fast:.3f}", f"{slow / fast:.0f}", f"{difference:.0e}"]
        )
        table.add_row(*rows[-1])
    Console().print(table)
    if write is not None:
        write_section(write, "svd", ["python -m fsllm_bench.svd"], markdown(COLUMNS, rows))


if __name__ == "__main__":
    main()
