"""Gradient-isolated training made practical: fused kernels for EMA, scale-bias and detach, and a local-learning trainer."""

from manpp_kernels.backends import available, use_backend, why_not
from manpp_kernels.ops.detach_copy import detach_copy
from manpp_kernels.ops.ema_scale_update import ema_scale_update
from manpp_kernels.ops.scale_bias_mix import scale_bias_mix
from manpp_kernels.plan import EmaPlan

__all__ = ["EmaPlan", "available", "detach_copy", "ema_scale_update", "scale_bias_mix", "use_backend", "why_not"]
