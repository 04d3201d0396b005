"""ResNet-18, -34 and -50 (He et al. 2015, 1512.03385) without their classifier.

Parameter names are torchvision's, so `torchvision.models.resnet18().load_state_dict(ours, strict=False)` misses only
`fc.*` when the stem is "imagenet" and the width 64.
"""
import torch.nn.functional as F
from torch import nn


class Conv3x3(nn.Conv2d):
    """3x3, padded by 1. A map of one pixel meets only the kernel's centre, which alone is then used: the values are the
    same at a ninth of the work, and torch's bf16 gradient on the CPU is wrong for stride 2 there (2.11 to 2.15)."""

    def forward(self, x):
        if x.shape[2:] == (1, 1):
            return F.conv2d(x, self.weight[:, :, 1:2, 1:2])
        return super().forward(x)


def conv3x3(in_channels, out_channels, stride=1):
    return Conv3x3(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels, out_channels, stride=1):
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ResNet-18 and -34."""
    expansion = 1

    def __init__(self, in_channels, channels, stride, norm_layer):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = norm_layer(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, channels * self.expansion, stride, norm_layer)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: ResNet-50. The stride sits on the 3x3, as in torchvision."""
    expansion = 4

    def __init__(self, in_channels, channels, stride, norm_layer):
        super().__init__()
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = norm_layer(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = norm_layer(channels)
        self.conv3 = conv1x1(channels, channels * self.expansion)
        self.bn3 = norm_layer(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, channels * self.expansion, stride, norm_layer)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.downsample(x))


def shortcut(in_channels, out_channels, stride, norm_layer):
    """The identity where shapes agree (it has no parameters, hence no key), else a strided 1x1 projection."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), norm_layer(out_channels))


class ResNet(nn.Module):
    """(N, in_channels, H, W) floats to (N, feature_dim), the mean over the last map.

    stem: "imagenet" is the 7x7 stride-2 convolution and max-pool; "cifar" a 3x3 convolution at full resolution, as the
        methods use for images of about 32 px, where the other would throw 15/16 of the positions away at once.
    width: channels of the first stage (64 in the paper); the later stages double it.
    norm_layer: makes a normalisation from a number of channels.
    """

    def __init__(self, block, layers, stem="cifar", width=64, in_channels=3, norm_layer=nn.BatchNorm2d):
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem is 'cifar' or 'imagenet', not {stem!r}")
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = conv3x3(in_channels, width)
            self.maxpool = nn.Identity()
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        channels = width
        for stage, depth in enumerate(layers):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(channels, width * 2**stage, stride, norm_layer))
                channels = width * 2**stage * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.feature_dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))                  # (N, width, H, W) | / 4 by "imagenet"
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))             # (N, feature_dim, H / 8, W / 8) | / 32
        return x.mean(dim=(2, 3))                                             # (N, feature_dim)

    def stages(self):
        """The modules of the stem and of the four stages, first to last, as lists."""
        return [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]


def resnet18(stem="cifar", width=64, in_channels=3, norm_layer=nn.BatchNorm2d):
    return ResNet(BasicBlock, (2, 2, 2, 2), stem, width, in_channels, norm_layer)


def resnet34(stem="cifar", width=64, in_channels=3, norm_layer=nn.BatchNorm2d):
    return ResNet(BasicBlock, (3, 4, 6, 3), stem, width, in_channels, norm_layer)


def resnet50(stem="cifar", width=64, in_channels=3, norm_layer=nn.BatchNorm2d):
    return ResNet(Bottleneck, (3, 4, 6, 3), stem, width, in_channels, norm_layer)
