# SPDX-License-Identifier: MIT
"""MoCo's loss against its equation, its dictionaries by value, and the leak that shuffling batch norm closes."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import cmc
import cpc
import dim
import moco
import simclr
from common import augment
from common.cli import Refusal


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def new_model(dictionary="queue", entries=6, groups=1, **kwargs):
    torch.manual_seed(0)
    encoder = moco.EncoderWithHead("resnet18", "cifar", 4, "linear", groups, dim=5)
    return moco.MoCo(encoder, dictionary, entries, dim=5, **kwargs)


# ---- loss


def oracle(q, k, negatives, tau, own):
    """Equation 1 of 1911.05722 in loops, in float64."""
    total = 0.0
    for i in range(len(q)):
        unit = [v / v.norm() for v in (q[i], k[i], *negatives)]
        positive = torch.exp(unit[0] @ unit[1] / tau)
        others = [torch.exp(unit[0] @ n / tau) for j, n in enumerate(unit[2:]) if not own[i, j]]
        total = total - torch.log(positive / (positive + sum(others)))
    return total / len(q)


@pytest.mark.parametrize("n, size, tau", [(1, 1, 0.5), (5, 7, 0.1), (6, 3, 2.0)])
@pytest.mark.parametrize("masked", [False, True])
def test_info_nce_is_the_equation_with_its_gradient(n, size, tau, masked):
    torch.manual_seed(n)
    given = [3 * torch.randn(n, 4), torch.randn(n, 4), torch.randn(size, 4)]
    own = torch.rand(n, size) < 0.3 if masked else torch.zeros(n, size, dtype=torch.bool)
    ours, true = ([x.clone().to(dtype).requires_grad_() for x in given] for dtype in (torch.float32, torch.float64))
    loss, truth = moco.info_nce(*ours, tau, own if masked else None), oracle(*true, tau, own)
    loss.backward()
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for x, y in zip(ours, true):
        assert (x.grad - y.grad).norm() <= 1e-4 * y.grad.norm() + 1e-9


def test_info_nce_closed_forms():
    """Equal keys are at chance, log(1 + K); a perfect query among orthogonal keys; float32 under autocast."""
    same = torch.ones(4, 8)
    assert moco.info_nce(same, same, torch.ones(9, 8), 0.07).item() == pytest.approx(math.log(10), rel=1e-5)
    q, negatives = torch.eye(8)[:1], torch.eye(8)[1:]
    assert moco.info_nce(q, q, negatives, 0.5).item() == pytest.approx(math.log(math.exp(2) + 7) - 2, rel=1e-5)
    q, k, negatives = torch.randn(4, 8), torch.randn(4, 8), torch.randn(9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = moco.info_nce(q, k, negatives, 0.1)
    assert torch.equal(loss, moco.info_nce(q, k, negatives, 0.1))


# ---- dictionaries


@pytest.mark.parametrize("size, batches", [(6, [2, 2, 2, 2]), (5, [3, 3, 3]), (4, [6, 6]), (4, [3, 9, 1]), (7, [7, 2])])
def test_queue_holds_the_last_keys_and_replaces_the_oldest(size, batches):
    """K a multiple of the batch or not, a batch larger than K, a partial one: against a list."""
    model, told = new_model(entries=size), None
    told = list(model.queue.clone())                                          # oldest first
    for n in batches:
        keys = unit(n, 5)
        model.enqueue(keys)
        told = (told + list(keys))[-size:]
        assert torch.equal(model.queue.roll(-int(model.pointer), 0), torch.stack(told))


def test_queue_and_pointer_are_in_the_checkpoint():
    model, other = new_model(), new_model()
    model.enqueue(unit(4, 5))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.queue, model.queue) and other.pointer == 4
    assert {"queue", "pointer"} <= model.state_dict().keys()


def test_momentum_update_by_value():
    """theta_k = m theta_k + (1 - m) theta_q; f_k begins as f_q, and batch norm's statistics are its own."""
    model = new_model(m=0.9)
    assert all(torch.equal(a, b) for a, b in zip(model.key.parameters(), model.query.parameters()))
    for p in model.query.parameters():
        p.data.add_(torch.randn_like(p))
    before = [p.clone() for p in model.key.parameters()]
    statistics = [b.clone() for b in model.key.buffers()]
    model.remember(unit(2, 5), unit(2, 5))
    for k, old, q in zip(model.key.parameters(), before, model.query.parameters()):
        assert torch.allclose(k, 0.9 * old + 0.1 * q, atol=1e-6) and not k.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.key.buffers()))


def test_the_bank_begins_with_all_images(tiny, here, monkeypatch):
    """Also those that no whole batch of an epoch has: 40 images, batches of 12."""
    banks, restore, enter = [], moco.Run.restore, moco.Run.__enter__

    def seen(method):
        return lambda run: (banks.append(run.tracked["model"].bank.clone()), method(run))[1]
    monkeypatch.setattr(moco.Run, "restore", seen(restore))
    monkeypatch.setattr(moco.Run, "__enter__", seen(enter))
    moco.main(tiny("moco", "--dictionary", "memory-bank", "--epochs", 1, "--batch-size", 12))
    assert banks[0].shape == (40, 128) and (banks[0] != banks[1]).any(dim=1).all()


@pytest.mark.parametrize("script", [moco, cmc])
def test_the_first_epoch_has_other_views_than_the_bank(script, tiny, here, monkeypatch):
    """With all images as negatives nothing else draws: from the same random numbers each would meet itself."""
    seen, view = [], script.view
    monkeypatch.setattr(script, "view", lambda *args, **kwargs: seen.append(view(*args, **kwargs)) or seen[-1])
    flags = ["--negatives", 0, *(["--graph", "full"] if script is cmc else [])]
    script.main(tiny(script, "--dictionary", "memory-bank", "--epochs", 1, *flags))
    seen = [x for x in seen if x.shape == seen[0].shape]
    assert len(seen) >= 10 and not any(a.equal(b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("loss", [moco.nce, cmc.nce])
def test_nce_of_no_negatives(loss):
    """Where all that was drawn is the anchor's own, its term has the positive alone, and a gradient."""
    q = unit(3, 4).requires_grad_()
    own = torch.tensor([[True, True], [False, True], [False, False]])
    value = loss(q, unit(3, 4), unit(2, 4), 0.2, own)
    value.backward()
    assert value.isfinite() and q.grad.isfinite().all()


def test_bank_update_by_value():
    """bank = normalised 0.5 bank + 0.5 q for the batch's images, nothing for the others."""
    model, index, q = new_model("memory-bank", 6, bank_m=0.5), torch.tensor([4, 1]), unit(2, 5)
    before = model.bank.clone()
    model.remember(q, None, index)
    for row in range(6):
        mean = before[row] if row not in (4, 1) else (before[row] + q[[4, 1].index(row)]) / 2
        assert torch.allclose(model.bank[row], mean / mean.norm(), atol=1e-6)


@pytest.mark.parametrize("dictionary", ["queue", "memory-bank", "end-to-end"])
def test_forward_is_the_mechanism(dictionary):
    """The loss from the parts, and where its gradients go."""
    model = new_model(dictionary)
    x1, x2, index = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.tensor([3, 0, 5, 2])
    drawn, order = torch.tensor([0, 1, 3, 4]), torch.tensor([2, 0, 3, 1])
    x2.requires_grad_()
    draws = dict(index=index, drawn=drawn) if dictionary == "memory-bank" else dict(order=order)
    loss, h, q, k = model(x1, x2, 0.2, **draws)
    if dictionary == "queue":
        expected = moco.info_nce(q, model.key(x2)[1], model.queue, 0.2)
    elif dictionary == "memory-bank":
        own = torch.tensor([[n == i for n in drawn] for i in index])
        expected = moco.info_nce(q, model.bank[index], model.bank[drawn], 0.2, own)
        assert own.sum() == 2 and k is None
    else:
        keys = model.query(x2)[1]
        expected = sum(moco.info_nce(q[i : i + 1], keys[i : i + 1], keys[[j for j in range(4) if j != i]], 0.2)
                       for i in range(4)) / 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.query.parameters())
    assert (x2.grad is not None) == (dictionary == "end-to-end")
    assert dictionary != "queue" or all(p.grad is None for p in model.key.parameters())
    assert h.shape == (4, 32) and q.shape == (4, 5)


def test_the_bank_by_nce():
    model = new_model("memory-bank", contrast="nce")
    index, drawn = torch.tensor([3, 0, 5, 2]), torch.tensor([0, 1, 3, 4])
    loss, _, q, _ = model(torch.rand(4, 3, 8, 8), None, 0.2, index=index, drawn=drawn)
    expected = moco.nce(q, model.bank[index], model.bank[drawn], 0.2, index[:, None] == drawn)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dictionary", ["queue", "end-to-end"])
def test_symmetric_is_the_mean_of_both_ways(dictionary):
    """And the queue takes in both views' keys afterwards: no query meets its own key among the negatives."""
    model = new_model(dictionary, entries=8)
    x1, x2, order = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.arange(4)
    one, other = (model(*x, 0.2, order=order)[0] for x in ((x1, x2), (x2, x1)))
    loss, _, q, k = model(x1, x2, 0.2, symmetric=True, order=order)
    assert loss.item() == pytest.approx((one.item() + other.item()) / 2, rel=1e-4) and k.shape == (8, 5)
    if dictionary == "queue":
        model.remember(q, k)
        assert torch.equal(model.queue, k)


# ---- shuffling batch norm


def test_split_batch_norm_is_a_batch_norm_for_each_group():
    torch.manual_seed(0)
    x, split, plain = torch.randn(6, 3, 4, 4), moco.SplitBatchNorm(3, 2), torch.nn.BatchNorm2d(3)
    y = split(x)
    for part, out in zip(x.chunk(2), y.chunk(2)):
        assert torch.allclose(out, torch.nn.BatchNorm2d(3)(part), atol=1e-6)
    alike = torch.cat([x[:3], x[:3]])                                         # equal groups: one update of momentum 0.1
    split = moco.SplitBatchNorm(3, 2)
    split(alike)
    plain(x[:3])
    assert torch.allclose(split.running_mean, plain.running_mean, atol=1e-6)
    assert torch.allclose(split.running_var, plain.running_var, atol=1e-6)
    split.eval(), plain.eval()
    assert torch.allclose(split(x), plain(x), atol=1e-5)


def companions(function, x):
    """(N, N) bool: whether output i depends on image j, by the gradient."""
    x = x.clone().requires_grad_()
    out = function(x)
    return torch.stack([torch.autograd.grad(row.square().sum() + row.sum(), x, retain_graph=True)[0]
                        .abs().sum(dim=(1, 2, 3)) > 0 for row in out])


def test_shuffling_closes_the_leak():
    """Without it, query i and key i are normalised with the same images, and the shared statistics tell them from the
    negatives. With it, a key's companions are those of its place in `order`, whatever the query's are."""
    model, x = new_model(groups=2), torch.rand(8, 3, 8, 8)
    for p in model.key.parameters():
        p.requires_grad_()
    halves = torch.arange(8) // 4
    queries = companions(lambda x: model.query(x)[1], x)
    assert torch.equal(queries, halves[:, None] == halves)                    # a query sees its own half
    unshuffled = companions(lambda x: moco.shuffled(model.key, x, torch.arange(8)), x)
    assert torch.equal(unshuffled, queries)                                   # the leak
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    place = order.argsort() // 4                                              # the half that each key is encoded in
    shuffled = companions(lambda x: moco.shuffled(model.key, x, order), x)
    assert torch.equal(shuffled, place[:, None] == place)
    assert all((shuffled[i] & queries[i]).sum() == 2 for i in range(8))       # itself and one more: as chance has it


def test_keys_come_back_in_the_order_of_the_images():
    model, x = new_model().eval(), torch.rand(6, 3, 8, 8)
    keys = moco.shuffled(model.key, x, torch.tensor([5, 2, 0, 1, 4, 3]))
    assert torch.allclose(keys, model.key(x)[1], atol=1e-5)


# ---- recipes


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_views(version):
    """In range, different each time; v1 turns the hue of every image far, v2 of most a little."""
    x = torch.zeros(256, 3, 8, 8, dtype=torch.uint8)
    x[:, 0] = 200                                                             # red
    a, b = (moco.view(x, augment.Random(seed), 8, 0.2, version, 0.5) for seed in (0, 1))
    assert a.shape == (256, 3, 8, 8) and 0 <= a.min() and a.max() <= 1 and not torch.equal(a, b)
    red = (a[:, 0].mean(dim=(1, 2)) > a[:, 1:].amax(dim=1).mean(dim=(1, 2)) + 0.1).float().mean()
    assert (red < 0.6) if version == "v1" else (0.7 < red < 0.95)             # the rest is greyscale


def test_steps_of_the_rate():
    """v1: a tenth at epoch 120 and again at 160 of 200."""
    factors = [moco.step_decay(epoch, 200) for epoch in (0, 119, 120, 159, 160, 199)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("count, length", [(50_000, 4096), (1_281_167, 65536), (5000, 256), (300, 25), (2000, 166)])
def test_the_queues_length_follows_the_images(count, length, monkeypatch):
    """About a twelfth, so that a query seldom meets its own image's keys; 65,536 for ImageNet, as in the paper."""
    class Seen(Exception):
        pass

    def stop(*_, **__):
        raise Seen
    run = SimpleNamespace(data=lambda **_: (SimpleNamespace(train=range(count)), None))
    settings = moco.arguments(["--dataset", "cifar10"])
    monkeypatch.setattr(moco, "arguments", lambda argv: settings)
    monkeypatch.setattr(moco, "Run", lambda *_, **__: run)
    monkeypatch.setattr(moco, "EncoderWithHead", stop)
    with pytest.raises(Seen):
        moco.main([])
    assert settings.negatives == length


@pytest.mark.parametrize("length", [0, 11])
def test_an_empty_queue_or_one_longer_than_a_quarter_of_the_images_is_refused(length, tiny, here):
    with pytest.raises(Refusal, match=f"--negatives {length} is not between 1 and a quarter of the 40 images, 10: "):
        moco.main(tiny("moco", "--negatives", length))


@pytest.mark.parametrize("script, flags, settings", [  # the recipe, and where it is from
    (simclr, "--dataset cifar10", dict(lr=0.06, weight_decay=5e-4, crop_min=0.2)),            # dkobak/simclr-cifar10
    (simclr, "--dataset cifar10 --optimizer lars", dict(lr=1.0, weight_decay=1e-4, tau=0.5)),  # google-research/simclr
    (simclr, "--dataset cifar10 --optimizer lars --small", dict(lr=1.0, weight_decay=1e-4, batch_size=256)),
    (simclr, "--dataset folder --optimizer sgd", dict(lr=0.03, weight_decay=5e-4, image_size=224)),
    (simclr, "--dataset folder --small", dict(optimizer="sgd", lr=0.2)),
    (simclr, "--dataset folder", dict(optimizer="lars", lr=0.3, weight_decay=1e-6, tau=0.1, crop_min=0.08, blur=0.5)),
    (moco, "--dataset folder", dict(crop_min=0.2, tau=0.2, m=0.999, batch_size=256, lr=0.03, head="mlp", blur=0.5)),
    (moco, "--dataset cifar10 --dictionary memory-bank", dict(                                # zhirongw/lemniscate
        negatives=0, batch_size=128, lr=0.06, augmentation="v1", crop_min=0.2, tau=0.1, bank_m=0.5, weight_decay=5e-4)),
    (moco, "--dataset cifar10 --dictionary memory-bank --contrast nce", dict(negatives=4096)),
    (cpc, "--dataset folder", dict(image_size=260, patch=80, stride=36)),                     # 1905.09272
    (cmc, "--dataset folder", dict(tau=0.07, crop_min=0.08, negatives=16384)),                # HobbitLong/CMC
    (cmc, "--dataset cifar10", dict(batch_size=128, lr=0.06)),                                # 0.03 at 128
    (dim, "--dataset cifar10 --critic concat", dict(units=512)),                              # 1808.06670, appendix
    (dim, "--dataset cifar10 --objective multiscale", dict(                                   # amdim-public
        width=128, units=1024, depth=3, batch_size=200, lr=2e-4, weight_decay=1e-5, epochs=300))],
    ids=lambda value: getattr(value, "__name__", value) if not isinstance(value, dict) else "")
def test_defaults_are_their_sources(script, flags, settings):
    args = vars(script.arguments(flags.split()))
    assert {name: args[name] for name in settings} == settings
