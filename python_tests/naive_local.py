"""One training step of each rule, a second time: plain functions on dictionaries of tensors, nothing of the package.

Parameters go by the names of the user's model (``layer1.0.conv1.weight``) and of the auxiliary networks
(``0.transform.ema.conv1.weight``). Everything is float64 and slow, and follows the papers' formulas line by line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


def below(tensors: Tensors, prefix: str) -> Tensors:
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}


def batch_norm(x, weight, bias, running=None):
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims, keepdim=True)
    var = ((x - mean) ** 2).mean(dims, keepdim=True)
    if running is not None:
        n = x.numel() // x.shape[1]
        with torch.no_grad():
            running["running_mean"].mul_(0.9).add_(0.1 * mean.flatten())
            running["running_var"].mul_(0.9).add_(0.1 * var.flatten() * n / (n - 1))
            running["num_batches_tracked"].add_(1)
    shape = [1, -1] + [1] * (x.dim() - 2)
    return (x - mean) / torch.sqrt(var + 1e-5) * weight.view(shape) + bias.view(shape)


def unit(x, p: Tensors, running: Tensors | None = None):
    """A basic block; ``running`` has its buffers, None for an auxiliary copy."""

    def norm(name, y):
        stats = None if running is None else below(running, name)
        return batch_norm(y, p[f"{name}.weight"], p[f"{name}.bias"], stats)

    strided = "downsample.0.weight" in p
    y = norm("bn1", F.conv2d(x, p["conv1.weight"], stride=2 if strided else 1, padding=1)).clamp(min=0)
    y = norm("bn2", F.conv2d(y, p["conv2.weight"], padding=1))
    shortcut = norm("downsample.1", F.conv2d(x, p["downsample.0.weight"], stride=2)) if strided else x
    return (y + shortcut).clamp(min=0)


def pool(x, size):
    n, c, h, w = x.shape
    return x.reshape(n, c, size, h // size, size, w // size).mean((3, 5))


def head(x, p: Tensors, width: str):
    """The DGL head; its parameters are taken in the order of its layers."""
    values = iter(p[k] for k in p if not k.endswith(("running_mean", "running_var", "num_batches_tracked")))
    if width == "linear":
        return x.mean((2, 3)) @ next(values).T + next(values)
    x = pool(x, min(8, x.shape[2])) if width == "wide" else pool(x, math.ceil(x.shape[2] / 4))
    for _ in range(3):
        x = batch_norm(F.conv2d(x, next(values)), next(values), next(values)).clamp(min=0)
    x = x.mean((2, 3)) if width == "wide" else pool(x, min(2, x.shape[2])).flatten(1)
    for _ in range(3 if width == "wide" else 2):
        x = batch_norm(x @ next(values).T, next(values), next(values)).clamp(min=0)
    return x @ next(values).T + next(values)


def cross_entropy(logits, targets):
    return (torch.logsumexp(logits, 1) - logits.gather(1, targets[:, None])[:, 0]).mean()


@dataclass
class Sgd:
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-2
    buffers: Tensors = field(default_factory=dict)

    def step(self, name, p, g):
        g = g + self.weight_decay * p
        b = self.buffers[name] = g.clone() if name not in self.buffers else self.momentum * self.buffers[name] + g
        return p - self.lr * (g + self.momentum * b)


@dataclass
class Adam:
    lr: float = 1e-2
    eps: float = 1e-4  # large, as Adam divides the rounding errors of vanishing gradients by it
    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def step(self, name, p, g):
        t = self.steps[name] = self.steps.get(name, 0) + 1
        m = self.first[name] = 0.9 * self.first.get(name, torch.zeros_like(p)) + 0.1 * g
        v = self.second[name] = 0.999 * self.second.get(name, torch.zeros_like(p)) + 0.001 * g * g
        return p - self.lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + self.eps)


@dataclass
class Naive:
    """A whole training: ``model`` and ``auxiliary`` are its state, ``blocks`` the names of each block's segments."""

    model: Tensors
    auxiliary: Tensors
    blocks: list[list[str]]
    optimizer: Sgd | Adam
    kind: str  # "head", "sum", "activation" or "parameter"
    width: str = "wide"
    order: str = "published"
    momentum: float = 0.995
    total: float = 2.0

    def segment(self, name, x, p):
        if name == "stem":
            x = F.conv2d(x, p["conv1.weight"], padding=1)
            return batch_norm(x, p["bn1.weight"], p["bn1.bias"], below(self.model, "bn1")).clamp(min=0)
        return unit(x, below(p, name), below(self.model, name))

    def names(self, j):
        """The trainable tensors of block j."""
        own = []
        for name in self.blocks[j]:
            own += ["conv1.weight", "bn1.weight", "bn1.bias"] if name == "stem" else []
            own += [k for k in self.model if k.startswith(name + ".") and "running" not in k and "batches" not in k]
        own += ["fc.weight", "fc.bias"] if j == len(self.blocks) - 1 else []
        prefix = f"{j}."
        return own, [
            k
            for k in self.auxiliary
            if k.startswith(prefix) and ".ema." not in k and "running" not in k and "batches" not in k
        ]

    def loss(self, j, x, targets, p: Tensors, a: Tensors):
        for name in self.blocks[j]:
            x = self.segment(name, x, p)
        if j == len(self.blocks) - 1:
            return x, cross_entropy(x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"], targets)
        if self.kind == "head":
            return x, cross_entropy(head(x, below(a, f"{j}.head"), self.width), targets)
        lb, ema = below(a, f"{j}.transform.lb"), below(a, f"{j}.transform.ema")
        if self.kind == "sum":
            y = unit(x, lb) + unit(x, ema)
        else:
            s = a[f"{j}.transform.scale"]
            if self.kind == "activation":
                y = s * unit(x, lb) + (self.total - s) * unit(x, ema)
            else:
                y = unit(x, {k: s * lb[k] + (self.total - s) * ema[k] for k in lb})
        return x, cross_entropy(head(y, below(a, f"{j}.host.head"), self.width), targets)

    def move_ema(self, j):
        if self.kind == "head" or j == len(self.blocks) - 1:
            return
        source = self.blocks[j + 1][0]
        for k in list(self.auxiliary):
            prefix = f"{j}.transform.ema."
            if k.startswith(prefix):
                theta = self.model[f"{source}.{k[len(prefix) :]}"]
                self.auxiliary[k] = self.momentum * self.auxiliary[k] + (1 - self.momentum) * theta

    def step(self, images, targets):
        """Returns the losses and the gradients of all parameters."""
        losses, gradients = [], {}
        if self.order == "unlocked":
            for j in range(len(self.blocks)):
                self.move_ema(j)
        x = images
        for j in range(len(self.blocks)):
            own, aux = self.names(j)
            p = {k: v.clone().requires_grad_(k in own) for k, v in self.model.items() if v.is_floating_point()}
            a = {k: v.clone().requires_grad_(k in aux) for k, v in self.auxiliary.items() if v.is_floating_point()}
            x, loss = self.loss(j, x, targets, p, a)
            x = x.detach()
            found = torch.autograd.grad(loss, [p[k] for k in own] + [a[k] for k in aux])
            losses.append(loss.detach())
            mine = dict(zip(own + aux, found, strict=True))
            gradients.update(mine)
            if self.order == "unlocked":
                self.optimize(mine)
            else:
                self.move_ema(j)
        if self.order == "published":
            self.optimize(gradients)
        return losses, gradients

    def optimize(self, gradients):
        for k, g in gradients.items():
            where = self.model if k in self.model else self.auxiliary
            where[k] = self.optimizer.step(k, where[k], g)
