"""Local learning: a model's partition, the auxiliary networks, the rules, and the local blocks made of them."""

from manpp_kernels.local.auxiliary import Auxiliary, Classifier, EmaUpdates, Site
from manpp_kernels.local.memory import SavedTensorMeter, StepMemory, measure_step_memory
from manpp_kernels.local.network import BlockOutput, LocalBlock, LocalNetwork
from manpp_kernels.local.partition import Partition, partition
from manpp_kernels.local.parts import Parts, adapt
from manpp_kernels.local.rules import Rule, make_rule, register
from manpp_kernels.local.rules import names as rule_names

__all__ = [
    "Auxiliary",
    "BlockOutput",
    "Classifier",
    "EmaUpdates",
    "LocalBlock",
    "LocalNetwork",
    "Partition",
    "Parts",
    "Rule",
    "SavedTensorMeter",
    "Site",
    "StepMemory",
    "adapt",
    "make_rule",
    "measure_step_memory",
    "partition",
    "register",
    "rule_names",
]
