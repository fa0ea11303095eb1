"""One budget: what every technique costs and harms at every site, and the least harmful choice."""

from pared.budget.allocate import Plan, allocate, curve, smallest
from pared.budget.calibrate import gather
from pared.budget.options import Offers, fixed_bits, options
from pared.budget.sensitivity import sensitivity

__all__ = ["Offers", "Plan", "allocate", "curve", "fixed_bits", "gather", "options", "sensitivity", "smallest"]
