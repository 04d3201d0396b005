# SPDX-License-Identifier: MIT
"""Training in several processes (torchrun): the results are those of one process with the whole batch. (Batch norm in
MoCo's groups keeps the first process's running statistics, which are the noisier for it.)"""
import datetime
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from . import Refusal


def start(device):
    """Joins the processes that torchrun started, if it did. Returns (rank, world): (0, 1) in a plain run. Raises
    Refusal where they would share a GPU, or have devices that torch cannot join."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type != "cpu" and device != torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))):
            raise Refusal(f"--device {device}: each process of torchrun has a GPU of its own, or all share the CPU: "
                          f"say --device cuda or --device cpu, or leave torchrun out")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank_and_world()


def end():
    """Leaves the processes, as NCCL wants all to do at one time; nothing in a plain run."""
    if dist.is_initialized():
        time.sleep(0.2)  # in torch 2.4 it would wait for ever for a thread of gloo that is just ending an operation
        dist.destroy_process_group()


def rank_and_world():
    """Which process this is, of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(module, device, sync_batch_norm=True):
    """The module with its gradients averaged over the processes; unchanged in a plain run. Each loss has to depend on
    all parameters that require a gradient. sync_batch_norm: in place, by the whole batch of all processes."""
    if not dist.is_initialized():
        return module
    if sync_batch_norm and device.type == "cuda":                             # ours would take more memory there
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    elif sync_batch_norm:
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.__class__ = SyncBatchNorm
    net = nn.parallel.DistributedDataParallel(module)
    # Buffers are the same in every process, or the first's are kept: a queue or a memory bank is too large to send.
    net.broadcast_buffers = False
    return net


def gather(x):
    """(n, ...) of each process to (n * world, ...) in rank order, differentiably: the gradient of x sums what every
    process's loss asks of it. If each computes the same loss of the whole batch, that is world times the gradient;
    DistributedDataParallel's mean over the processes divides it away."""
    return Gather.apply(x.contiguous()) if dist.is_initialized() else x


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        dist.all_gather(parts := [torch.empty_like(x) for _ in range(dist.get_world_size())], x)
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient):
        dist.all_reduce(gradient := gradient.clone(memory_format=torch.contiguous_format))   # gloo sends it as it lies
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def first_process_first(function, *args):
    """function(*args) in every process, in the first before the others: what it downloads is downloaded once. A group
    of its own has its own time-out: the others wait a day for a download, not the usual half an hour."""
    if not dist.is_initialized():
        return function(*args)
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    result = function(*args) if dist.get_rank() == 0 else None
    dist.barrier(group)
    return result if dist.get_rank() == 0 else function(*args)


def any_process(flag):
    """Whether the flag is set in any process. It stays on the CPU, so the device goes on meanwhile."""
    if dist.is_initialized():
        dist.all_reduce(flag := torch.tensor(float(flag)), dist.ReduceOp.MAX)
    return bool(flag)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm by all processes' batches on the CPU, which torch's own refuses: for trying it without a GPU."""

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        wide, dims = x.float(), [d for d in range(x.dim()) if d != 1]
        mean = gather(wide.mean(dims, keepdim=True)).mean(0, keepdim=True)
        var = gather((wide - mean).square().mean(dims, keepdim=True)).mean(0, keepdim=True)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * count / (count - 1), self.momentum)
        weight, bias = self.weight.view(mean.shape), self.bias.view(mean.shape)
        return ((wide - mean) * torch.rsqrt(var + self.eps) * weight + bias).to(x.dtype)
