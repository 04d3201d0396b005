# SPDX-License-Identifier: MIT
"""CPC's loss against its equation, and by gradient that no prediction sees what it predicts."""
import json
import math

import pytest
import torch

import cpc
from common import augment
from common.cli import Refusal


def new_model(norm="layer", directions=4, patch=8, stride=4, last=3):
    torch.manual_seed(0)
    encoder = cpc.Encoder("resnet18", "cifar", 2, norm, patch, stride)
    return cpc.CPC(encoder, directions, cpc.steps_ahead(patch, stride, last), hidden=8, dim=4)


# ---- loss


def oracle(predictions, targets):
    """Equation 4 of 1807.03748 in loops, its score the scaled inner product."""
    total, scale = 0.0, math.sqrt(len(targets[0]))
    for i, prediction in enumerate(predictions):
        score = [torch.exp(prediction @ target / scale) for target in targets]
        total = total - torch.log(score[i] / sum(score))
    return total / len(predictions)


@pytest.mark.parametrize("m, d", [(1, 3), (5, 4), (12, 2)])
def test_info_nce_is_the_equation_with_its_gradient(m, d):
    torch.manual_seed(m)
    given = [2 * torch.randn(m, d), torch.randn(m, d)]
    ours, true = ([x.clone().to(dtype).requires_grad_() for x in given] for dtype in (torch.float32, torch.float64))
    loss, truth = cpc.info_nce(*ours), oracle(*true)
    loss.backward()
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-7)
    for x, y in zip(ours, true):
        assert (x.grad - y.grad).norm() <= 1e-4 * y.grad.norm() + 1e-7


def test_the_smallest_patches_keep_their_colour():
    """A shift by a whole patch has nothing to mirror at the border."""
    x = torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
    for patch in (1, 2, 4):
        patches = cpc.view(x, augment.Random(0), 8, 0.5, "v1", 0.0, patch, patch)
        assert patches.allclose(torch.tensor(128 / 255), atol=1e-5)


def test_info_nce_chance_and_bound():
    """Equal targets: log(M). However good the predictions, log(M) - loss does not exceed log(M). float32 under bf16."""
    assert cpc.info_nce(torch.randn(9, 4), torch.ones(9, 4)).item() == pytest.approx(math.log(9), rel=1e-5)
    for strength in (1, 10, 100):
        loss = cpc.info_nce(strength * torch.eye(9), torch.eye(9))
        assert 0 <= loss.item() < math.log(9)
    assert loss.item() < 1e-6
    p, t = torch.randn(9, 4), torch.randn(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cpc.info_nce(p, t), cpc.info_nce(p, t).float())
        loss = cpc.info_nce(p, t)
    assert torch.equal(loss, cpc.info_nce(p, t))


# ---- what a prediction sees


def image_gradients(model, size, patch, stride):
    """For each direction and k: (the gradient of each prediction's sum with respect to the image (S, S), absolute; the
    number of the patch it predicts)."""
    x = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    grid = (size - patch) // stride + 1
    number = torch.arange(grid * grid, dtype=torch.float64).view(1, 1, grid, grid)
    pairs = iter(cpc.pairs(*model.double()(cpc.cut(x, patch, stride))[1:], model.ahead))
    for turn in range(len(model.contexts)):
        for k in model.ahead:
            predictions, targets = next(pairs)
            goals = cpc.flatten_positions(number.rot90(turn, (2, 3))[:, :, k:])[:, 0]
            assert len(predictions) == len(targets) == len(goals) == (grid - k) * grid
            for prediction, target, goal in zip(predictions, targets, goals):
                gradients = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0][0].abs().sum(0)
                             for v in (prediction, target)]
                yield turn, k, int(goal), *gradients


@pytest.mark.parametrize("size, patch, stride, last", [(20, 8, 4, 3), (12, 6, 3, 2), (16, 8, 2, 4), (15, 5, 5, 2)])
def test_no_prediction_sees_its_target(size, patch, stride, last):
    """Place by place, in all directions: the target depends on its patch, and the prediction on no pixel of it, nor on
    what lies beyond it."""
    model = new_model(patch=patch, stride=stride, last=last)
    grid, seen = (size - patch) // stride + 1, []
    for turn, k, goal, of_prediction, of_target in image_gradients(model, size, patch, stride):
        top, left = (stride * p for p in divmod(goal, grid))
        inside = torch.zeros(size, size, dtype=torch.bool)
        inside[top : top + patch, left : left + patch] = True
        assert of_target[inside].any() and not of_target[~inside].any()
        assert not of_prediction[inside].any()
        mask, row = torch.zeros(grid, grid), torch.arange(grid)
        mask[goal // grid, goal % grid] = 1
        first = mask.rot90(turn).nonzero()[0, 0] - k                          # the context's row, turned downwards
        beyond = (row > first).float()[:, None].expand(grid, grid).rot90(-turn).bool()
        known = torch.zeros(size, size, dtype=torch.bool)
        for i, j in (~beyond).nonzero().tolist():
            known[stride * i : stride * i + patch, stride * j : stride * j + patch] = True
        assert not of_prediction[~known].any()
        seen.append(of_prediction[known].gt(0).float().mean().item())
    assert min(seen) > 0.2 and max(seen) > 0.9                                # and it does see its own and upper rows


def test_batch_norm_lets_a_prediction_see_its_target():
    """The reason for layer norm: the batch's statistics carry the target to the context."""
    leaks = [of_prediction[4 * (goal // 4) : 4 * (goal // 4) + 8, 4 * (goal % 4) : 4 * (goal % 4) + 8].any().item()
             for _, _, goal, of_prediction, _ in image_gradients(new_model("batch", 1), 20, 8, 4)]
    assert all(leaks)


@pytest.mark.parametrize("patch, stride, ahead", [(64, 32, [2, 3, 4, 5]), (80, 32, [3, 4, 5]), (8, 8, [1, 2, 3, 4, 5]),
                                                  (8, 5, [2, 3, 4, 5])])
def test_steps_ahead_share_no_pixel(patch, stride, ahead):
    assert list(cpc.steps_ahead(patch, stride, 5)) == ahead
    assert all(k * stride >= patch for k in ahead) and (ahead[0] - 1) * stride < patch
    assert list(cpc.steps_ahead(patch, stride, 5, first=1)) == [1, 2, 3, 4, 5]


def test_first_reaches_the_model(tiny, here):
    cpc.main(tiny("cpc", "--first", 1, "--out", "run"))
    assert json.loads((here / "run" / "args.json").read_text())["ahead"].startswith("1 to")


# ---- patches and model


def test_cut_is_slicing():
    x = torch.rand(2, 3, 20, 20)
    patches = cpc.cut(x, 8, 4)
    assert patches.shape == (2, 4, 4, 3, 8, 8)
    for i in range(4):
        for j in range(4):
            assert torch.equal(patches[:, i, j], x[:, :, 4 * i : 4 * i + 8, 4 * j : 4 * j + 8])


@pytest.mark.parametrize("augmentation", ["v1", "v2"])
def test_each_patch_is_augmented_alone(augmentation):
    """Equal patches of one image come out different; the crop and the flip are the image's."""
    tile = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).repeat(1, 1, 2, 2)
    patches = cpc.view(tile, augment.Random(0), 16, 1.0, augmentation, 0.2, 8, 8)[0].flatten(0, 1)
    assert patches.shape == (4, 3, 8, 8) and 0 <= patches.min() and patches.max() <= 1
    assert sum(torch.equal(a, b) for a in patches for b in patches) == 4


def test_share_of_patches_with_one_channel():
    """The others are grey in all of two channels. Without, none is."""
    x = torch.randint(1, 256, (64, 3, 16, 16), dtype=torch.uint8)
    for share in (0.0, 0.3, 1.0):
        patches = cpc.view(x, augment.Random(0), 16, 1.0, "v2", share, 8, 8).flatten(0, 2)    # (256, 3, 8, 8)
        dropped = (patches == 0.5).all(dim=(2, 3)).sum(dim=1)
        assert (dropped == 2).float().mean().item() == pytest.approx(share, abs=0.1)


def test_warp_by_loops():
    """Every pixel is that at the sheared and shifted place, interpolated; outside lies the nearest pixel."""
    s, points = 8, 4
    x, shear, bend = torch.rand(3, 2, s, s), 0.6 * torch.rand(3, 2) - 0.3, 0.6 * torch.rand(3, 2, points, points) - 0.3
    shear[1], bend[2] = 0, 0
    y = cpc.warp(x, shear, bend)

    def interpolated(plane, row, column):
        """Of a plane (H, W), at a place in pixels, which may lie outside."""
        height, width = plane.shape
        row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        r, c = min(int(row), height - 2), min(int(column), width - 2)
        a, b = row - r, column - c
        return (1 - a) * ((1 - b) * plane[r, c] + b * plane[r, c + 1]) + a * (
            (1 - b) * plane[r + 1, c] + b * plane[r + 1, c + 1])
    for i in range(3):
        for row in range(s):
            for column in range(s):
                u, v = (2 * column + 1) / s - 1, (2 * row + 1) / s - 1        # of the pixel, in half sides
                point = row / (s - 1) * (points - 1), column / (s - 1) * (points - 1)
                across = u + shear[i, 0] * v + interpolated(bend[i, 0], *point)
                down = v + shear[i, 1] * u + interpolated(bend[i, 1], *point)
                for channel in range(2):
                    value = interpolated(x[i, channel], ((down + 1) * s - 1) / 2, ((across + 1) * s - 1) / 2)
                    assert y[i, channel, row, column].item() == pytest.approx(value.item(), abs=1e-5)
    torch.testing.assert_close(cpc.warp(x, 0 * shear, 0 * bend), x, rtol=0, atol=1e-6)


def test_share_of_patches_that_are_warped():
    """A fifth is sheared, a fifth bent, by up to 0.3."""
    (_, index, shear, bend), = cpc.random_warp(augment.Random(0), 5000)
    sheared, bent = shear.any(dim=1), bend.flatten(1).any(dim=1)
    assert [sheared.sum() / 5000, bent.sum() / 5000] == pytest.approx([0.2, 0.2], abs=0.02)
    assert len(index) / 5000 == pytest.approx(0.36, abs=0.03)
    for values in (shear[sheared], bend[bent]):
        assert -0.3 <= values.min() < -0.29 and 0.29 < values.max() < 0.3 and values.mean().abs() < 0.01


def test_tones():
    """A tenth of the patches inverted, a tenth of 8 levels, a tenth with light tones inverted, and only by v2."""
    ramp = torch.linspace(0, 1, 12).view(1, 1, 3, 4).expand(1, 3, 3, 4)
    inverted, posterized, solarized = (change(ramp) for change in cpc.TONES)
    torch.testing.assert_close(inverted, 1 - ramp)
    assert len(posterized.unique()) == 8 and (posterized - ramp).abs().max() <= 1 / 8
    torch.testing.assert_close(solarized, torch.minimum(ramp, 1 - ramp))


@pytest.mark.parametrize("augmentation", ["v1", "v2"])
def test_what_is_done_to_a_share_of_the_patches(augmentation, monkeypatch):
    """v2 changes the tones of a tenth of the patches in each way, and jitters and warps patches; v1 does neither."""
    shares, calls = [0, 0, 0], []
    for i, change in enumerate(tones := list(cpc.TONES)):
        def counted(x, i=i, change=change):
            shares[i] += len(x) / 1024
            return change(x)
        tones[i] = counted
    monkeypatch.setattr(cpc, "TONES", tones)
    for module, name in ((augment, "random_color_jitter"), (cpc, "random_warp"), (augment, "random_grayscale")):
        def called(rng, n, *args, name=name, function=getattr(module, name), **kwargs):
            calls.append((name, n, *args, *kwargs.values()))
            return function(rng, n, *args, **kwargs)
        monkeypatch.setattr(module, name, called)
    x = torch.randint(1, 256, (16, 3, 16, 16), dtype=torch.uint8)
    cpc.view(x, augment.Random(0), 16, 1.0, augmentation, 0.0, 2, 2)
    if augmentation == "v1":
        assert shares == [0, 0, 0] and not calls
    else:
        assert shares == pytest.approx([0.1] * 3, abs=0.03)
        assert calls == [("random_warp", 1024), ("random_color_jitter", 1024, 0.4, 0.4, 0.4, 0.1, 0.8),
                         ("random_grayscale", 1024, 0.2)]


def test_the_image_is_cropped_and_flipped_before_its_patches():
    """By v1, whose patches are only shifted: half of the images are mirrored, and crops are as large as asked for."""
    ramp = torch.arange(64, dtype=torch.uint8).expand(200, 3, 64, -1)
    patches = cpc.view(ramp, augment.Random(0), 64, 1.0, "v1", 0.0, 16, 16)
    rises = patches[:, 0, 3].mean(dim=(1, 2, 3)) > patches[:, 0, 0].mean(dim=(1, 2, 3))
    assert 0.4 < rises.float().mean() < 0.6
    spans = [(p[:, 0, 3].mean(dim=(1, 2, 3)) - p[:, 0, 0].mean(dim=(1, 2, 3))).abs().mean() for p in (
        patches, cpc.view(ramp, augment.Random(0), 64, 0.1, "v1", 0.0, 16, 16))]
    assert spans[1] < 0.85 * spans[0]                                         # a crop shows less of the ramp


def test_every_channel_may_be_the_one_that_is_kept():
    x = torch.randint(1, 256, (32, 3, 16, 16), dtype=torch.uint8)
    patches = cpc.view(x, augment.Random(0), 16, 1.0, "v2", 1.0, 8, 8).flatten(0, 2)
    kept = (patches != 0.5).any(dim=(2, 3)).float().mean(dim=0)               # (3,)
    assert kept == pytest.approx([1 / 3] * 3, abs=0.15)


def test_drop_colours_by_value():
    x = torch.rand(3, 3, 2, 2)
    y = cpc.drop_colours(x, torch.tensor([0, 2, 1]))
    for i, kept in enumerate((0, 2, 1)):
        for channel in range(3):
            assert torch.equal(y[i, channel], x[i, channel] if channel == kept else torch.full((2, 2), 0.5))


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_encoder_is_the_mean_over_the_grid(norm):
    model = new_model(norm).eval()
    x = torch.rand(2, 3, 20, 20)
    z = model.encoder.grid(cpc.cut(x, 8, 4))
    alone = model.encoder.net(2 * x[:, :, 4:12, 8:16] - 1)                    # the patch of row 1, column 2
    assert z.shape == (2, 16, 4, 4) and torch.allclose(z[:, :, 1, 2], alone, atol=1e-5)
    assert torch.allclose(model.encoder(x), z.mean(dim=(2, 3)), atol=1e-5)


def test_dark_images_train():
    """Layer norm of a patch near zero would amplify its noise; as patches enter the network, black ones are at -1."""
    model = new_model()
    x = 1e-3 * torch.rand(2, 4, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sum(cpc.info_nce(*pair) for pair in cpc.pairs(*model(x)[1:], model.ahead)).backward()
    assert max(p.grad.abs().max() for p in model.parameters()) < 0.1


def test_contexts_are_averaged_over_the_grid():
    model, x = new_model().eval(), torch.rand(3, 3, 20, 20)
    expected = torch.cat(model.context(model.encoder.grid(cpc.cut(x, 8, 4))), dim=1).mean(dim=(2, 3))
    assert expected.shape == (3, 4 * model.encoder.feature_dim)
    torch.testing.assert_close(cpc.ContextEncoder(model)(x), expected)


def test_mosaic_shows_every_patch():
    patches = torch.rand(2, 3, 3, 3, 4, 4)
    picture = cpc.mosaic(patches)
    assert picture.shape == (2, 3, 15, 15) and (picture[:, :, 4::5] == 1).all() and (picture[:, :, :, 4::5] == 1).all()
    assert torch.equal(picture[:, :, 5:9, 10:14], patches[:, 1, 2])


@pytest.mark.parametrize("flags, named", [
    ("--patch 64", "--patch"), ("--stride 13", "--steps"), ("--steps 1", "--steps"),
    ("--steps 7 --dataset cifar10", "--steps")])
def test_grids_that_cannot_be(flags, named):
    with pytest.raises(Refusal, match=named):
        cpc.arguments(flags.split())
