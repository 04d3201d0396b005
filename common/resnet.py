# SPDX-License-Identifier: MIT
"""ResNet-18, -34 and -50 (He et al. 2015, 1512.03385) of any width and without a classifier, from torchvision's blocks.

Parameter names are torchvision's, so `torchvision.models.resnet18().load_state_dict(ours, strict=False)` misses only
`fc.*` when the stem is "imagenet" and the width 64.
"""
import functools

import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1


class Conv3x3(nn.Conv2d):
    """3x3, padded by 1. A map of one pixel only meets the centre of the kernel, so only that is used: the same values
    at a ninth of the work, and torch's bf16 gradient for stride 2 is wrong there on CPUs (2.11 to 2.15)."""

    def forward(self, x):
        if x.shape[2:] == (1, 1):
            return F.conv2d(x, self.weight[:, :, 1:2, 1:2])
        return super().forward(x)


class NarrowShortcut(nn.Conv2d):
    """1x1 with stride 2 for fewer than 8 channels, by slicing the pixels: the same values. On CPUs without AVX-512 the
    gradient of torch's own strided version writes out of bounds (2.4 to 2.14, channels_last)."""

    def forward(self, x):
        return F.conv2d(x[:, :, ::2, ::2], self.weight)


class ResNet(nn.Module):
    """(N, in_channels, H, W) floats to (N, feature_dim), the mean over the last map.

    stem: "imagenet" is the 7x7 stride-2 convolution with max-pool; "cifar" is a 3x3 convolution at full resolution, for
        images of about 32 pixels, of which the other stem would discard 15/16 of the positions at once.
    width: channels of the first stage (64 in the paper), doubled by each later stage.
    norm_layer: makes a normalisation layer for a number of channels.
    """

    def __init__(self, block, layers, stem="cifar", width=64, in_channels=3, norm_layer=nn.BatchNorm2d):
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem is 'cifar' or 'imagenet', not {stem!r}")
        kernel = dict(kernel_size=7, stride=2, padding=3) if stem == "imagenet" else dict(kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(in_channels, width, **kernel, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        channels = width
        for stage, depth in enumerate(layers):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                out = width * 2**stage * block.expansion
                shortcut = None
                if stride != 1 or channels != out:
                    shortcut = nn.Sequential(conv1x1(channels, out, stride), norm_layer(out))
                blocks.append(block(channels, width * 2**stage, stride, shortcut, norm_layer=norm_layer))
                channels = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.feature_dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.kernel_size == (3, 3):
                    module.__class__ = Conv3x3
                elif module.stride == (2, 2) and module.kernel_size == (1, 1) and module.in_channels < 8:
                    module.__class__ = NarrowShortcut

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))                  # (N, width, H, W); "imagenet": H / 4
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))             # (N, feature_dim, H / 8, W / 8); or / 32
        return x.mean(dim=(2, 3))                                             # (N, feature_dim)

    def stages(self):
        """Lists of the modules of the stem and of the four stages, from first to last."""
        return [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]


resnet18 = functools.partial(ResNet, BasicBlock, (2, 2, 2, 2))                # (stem, width, in_channels, norm_layer)
resnet34 = functools.partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = functools.partial(ResNet, Bottleneck, (3, 4, 6, 3))
