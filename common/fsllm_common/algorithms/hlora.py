"""HLoRA (2025, arXiv 2503.00813): the mean product by the sites' examples, cut by SVD to every site's rank.

It is FlexLoRA's rule, which it was published after.
"""

from __future__ import annotations

from typing import ClassVar

from fsllm_common.algorithms.flexlora import FlexLoRA


class HLoRA(FlexLoRA):
    """FlexLoRA under its other name."""

    name: ClassVar[str] = "hlora"
