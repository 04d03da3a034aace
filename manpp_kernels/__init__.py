"""Training by gradient-isolated local blocks: fused kernels for EMA, scale-bias and detach, and a trainer."""

import importlib.metadata

from manpp_kernels.backends import available, use_backend, why_not
from manpp_kernels.ema import ModelEma, ema_multi_avg_fn
from manpp_kernels.ops.detach_buffer import DetachBuffer
from manpp_kernels.ops.detach_copy import detach_copy
from manpp_kernels.ops.ema_scale_update import ema_scale_update
from manpp_kernels.ops.scale_bias_mix import scale_bias_mix
from manpp_kernels.plan import EmaPlan
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

__all__ = [
    "DetachBuffer",
    "EmaPlan",
    "LocalTrainer",
    "ModelEma",
    "TrainerConfig",
    "available",
    "detach_copy",
    "ema_multi_avg_fn",
    "ema_scale_update",
    "scale_bias_mix",
    "use_backend",
    "why_not",
]

try:
    __version__ = importlib.metadata.version("manpp-kernels")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
