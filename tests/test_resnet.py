# SPDX-License-Identifier: MIT
"""common/resnet.py against torchvision's ResNets, whose parameter names it shares."""
import pytest
import torch
import torchvision
from torch import nn

from common import resnet

ARCHITECTURES = ["resnet18", "resnet34", "resnet50"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors as small as these are slower on several threads, ten times where other work is on the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchvisions(arch, stem):
    """A randomly initialised model of torchvision's without classifier, its stem changed the usual way for CIFAR."""
    model = getattr(torchvision.models, arch)(weights=None)
    model.fc = nn.Identity()
    if stem == "cifar":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):                                # they start as the identity: no test
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


@pytest.mark.parametrize("arch, stem, height, width", [
    ("resnet18", "imagenet", 64, 57), ("resnet34", "imagenet", 64, 57), ("resnet50", "imagenet", 64, 57),
    ("resnet18", "cifar", 16, 13), ("resnet50", "cifar", 16, 13),
])
def test_torchvisions_weights_give_torchvisions_features(arch, stem, height, width):
    """Its weights load strictly but for fc.*, and give its penultimate features in train and in eval mode."""
    torch.manual_seed(0)
    theirs = torchvisions(arch, stem)
    with torch.device("meta"):                                                # drawing weights that go takes seconds
        ours = getattr(resnet, arch)(stem=stem)
    ours.to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict(), strict=True)                    # fc is the identity: it has no keys
    x = torch.rand(4, 3, 1, 1) + torch.rand(4, 3, height, width)
    with torch.no_grad():
        for training in (True, True, False):                                  # running statistics move before eval
            expected, features = theirs.train(training)(x), ours.train(training)(x)
            assert expected.std(dim=0).mean() > 0.02                          # else features of anything would agree
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    state = ours.state_dict()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_torchvision_loads_ours(arch):
    """torchvision's model takes our weights, shapes included, and misses nothing but its classifier."""
    with torch.device("meta"):
        ours, theirs = getattr(resnet, arch)(stem="imagenet"), getattr(torchvision.models, arch)(weights=None)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False, assign=True)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []


def test_initial_weights_are_spread_as_torchvisions():
    """Convolutions start with the standard deviation, batch norms with the values of torchvision's."""
    torch.manual_seed(0)
    theirs, ours = torchvision.models.resnet18(weights=None), resnet.resnet18(stem="imagenet")
    for key, start in ours.state_dict().items():
        value = theirs.state_dict()[key]
        if value.ndim == 4:
            assert abs(float(start.std() / value.std()) - 1) < 0.06, key
        else:
            assert torch.equal(start, value), key


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("arch, width, feature_dim", [
    ("resnet18", 64, 512), ("resnet18", 16, 128), ("resnet34", 64, 512), ("resnet34", 8, 64),
    ("resnet50", 64, 2048), ("resnet50", 8, 256),
])
def test_feature_dim(arch, width, feature_dim, stem):
    """One row of feature_dim features an image, whatever the stem, the width and the image's shape."""
    with torch.device("meta"):                                                # shapes only: nothing is computed
        model = getattr(resnet, arch)(stem=stem, width=width).eval()
        assert model.feature_dim == feature_dim
        for shape in ((2, 3, 32, 32), (1, 3, 19, 45)):
            assert model(torch.rand(shape)).shape == (shape[0], feature_dim)


@pytest.mark.parametrize("stem, divisor", [("cifar", 1), ("imagenet", 4)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resolution(arch, stem, divisor):
    """The cifar stem keeps the image's resolution, imagenet's quarters it; each later stage halves it."""
    sizes = []
    with torch.device("meta"):
        model = getattr(resnet, arch)(stem=stem).eval()
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
        model(torch.rand(1, 3, 64, 32))
    assert sizes == [(64 // divisor // 2**i, 32 // divisor // 2**i) for i in range(4)]


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_input_channels(stem):
    """in_channels is the images', for either stem."""
    with torch.device("meta"):
        model = resnet.resnet18(stem=stem, in_channels=5).eval()
        assert model(torch.rand(2, 5, 32, 32)).shape == (2, 512)
        with pytest.raises(RuntimeError):
            model(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_unknown_stem(arch):
    """A stem that does not exist is an error that names it."""
    with pytest.raises(ValueError, match="patches"):
        getattr(resnet, arch)(stem="patches")


def test_narrow_networks():
    """Their shortcuts stride over pixels, at any size, to what a convolution with stride 2 gives; wide ones do not."""
    wide, narrow = resnet.resnet18("cifar", 8), resnet.resnet18("cifar", 4)
    assert sum(isinstance(module, resnet.NarrowShortcut) for module in wide.modules()) == 0
    shortcut, = (module for module in narrow.modules() if isinstance(module, resnet.NarrowShortcut))
    assert shortcut is narrow.layer2[0].downsample[0]
    for size in (7, 8):
        x = torch.rand(2, 4, size, size)
        assert torch.allclose(shortcut(x), nn.functional.conv2d(x, shortcut.weight, stride=2), atol=1e-6)
