"""End to end: one block, one backward pass through all of it. What local learning is compared with."""

from __future__ import annotations

from manpp_kernels.local.rules import Rule, register


@register("e2e")
class EndToEnd(Rule):
    """Backpropagation through the whole network."""

    any_outputs = True

    def default_blocks(self, segments: int) -> int:
        return 1

    def check(self, segments: int, blocks: int) -> None:
        if blocks != 1:
            raise ValueError(f"end-to-end training has 1 block, and blocks is {blocks}; leave it away or choose a rule")
