"""One rule per operator: which channels of what it reads are the same, and which channels its result has."""

from __future__ import annotations

from collections.abc import Mapping

from pared.graph.call import Rule
from pared.graph.rules import arrangement, choosing, elementwise, products, recurrent, reductions
from pared.graph.rules.elementwise import pointwise, unknown

RULES: Mapping[str, Rule] = {
    **elementwise.RULES,
    **products.RULES,
    **reductions.RULES,
    **arrangement.RULES,
    **choosing.RULES,
    **recurrent.RULES,
}
"""Operator name to rule. What is not listed and not marked point-wise by torch keeps everything it reads whole."""

__all__ = ["RULES", "pointwise", "unknown"]
