"""The graph of any network: traced once, kept as a program of our own, run op by op."""

from pared.graph.eager import Eager
from pared.graph.interpret import Interpreted, Lineage, Operand, View, interpret, watch
from pared.graph.operators import DEVICE, Ref
from pared.graph.program import Dynamic, Input, Node, Program, State
from pared.graph.trace import trace

__all__ = [
    "DEVICE", "Dynamic", "Eager", "Input", "Interpreted", "Lineage", "Node", "Operand", "Program", "Ref", "State", "View",
    "interpret", "trace", "watch",
]  # fmt: skip
