"""Networks that torchvision and timm lack: the CIFAR ResNets of He et al. (CVPR 2016, section 4.2)."""

from manpp_kernels.models.cifar_resnet import (
    MODELS,
    BasicBlock,
    CifarResNet,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)

__all__ = ["MODELS", "BasicBlock", "CifarResNet", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
