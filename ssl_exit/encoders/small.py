"""Encoders for small images: He et al.'s ResNets for CIFAR (arXiv 1512.03385, section 4.2), ResNet-18 with a small
stem, and the demonstration's network for digits of 8 x 8 pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (option A: every second pixel, channels zero-padded)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.pad = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Three groups of `blocks` basic blocks with 16, 32 and 64 channels: (N, 3, H, W) -> (N, 64)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._group(16, 16, blocks, 1)
        self.layer2 = self._group(16, 32, blocks, 2)
        self.layer3 = self._group(32, 64, blocks, 2)

    @staticmethod
    def _group(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


def resnet20_cifar() -> CifarResNet:
    """ResNet-20 for 32-pixel images, without its classifier: (N, 3, 32, 32) -> (N, 64)."""
    return CifarResNet(3)


def resnet56_cifar() -> CifarResNet:
    """ResNet-56 for 32-pixel images, without its classifier: (N, 3, 32, 32) -> (N, 64)."""
    return CifarResNet(9)


def resnet18_cifar(padding: int = 1) -> nn.Module:
    """torchvision's ResNet-18 with a 3x3 stem, stride 1, no max-pool: (N, 3, 32, 32) -> (N, 512)."""
    from torchvision.models import resnet18

    encoder = resnet18()
    encoder.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
    encoder.maxpool = nn.Identity()
    encoder.fc = nn.Identity()
    return encoder


def resnet18_sololearn() -> nn.Module:
    """The same as solo-learn has it for CIFAR: its stem pads by 2, so that maps are 34 pixels wide."""
    return resnet18_cifar(padding=2)


def resnet18_lightly() -> nn.Module:
    """The same as in lightly's CIFAR-10 benchmark, children of its own ResNet-18 in a row: (N, 3, 32, 32) -> (N, 512).

    Keys are numbers, and no activation follows the first normalisation.
    """
    from lightly.models import ResNetGenerator

    layers = list(ResNetGenerator("resnet-18").children())[:-1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def digits_encoder() -> nn.Module:
    """Eight 3x3 convolutions with 32, 64 and 128 channels: (N, 1, 8, 8) -> (N, 128)."""
    encoder = nn.Sequential()
    channels = 1
    for i, (out, stride) in enumerate([(32, 1)] * 3 + [(64, 2), (64, 1), (64, 1), (128, 2), (128, 1)], start=1):
        block = nn.Sequential()
        block.add_module("conv", nn.Conv2d(channels, out, 3, stride, 1, bias=False))
        block.add_module("norm", nn.BatchNorm2d(out))
        block.add_module("relu", nn.ReLU())
        encoder.add_module(f"block{i}", block)
        channels = out
    encoder.add_module("pool", nn.AdaptiveAvgPool2d(1))
    encoder.add_module("flatten", nn.Flatten())
    return encoder
