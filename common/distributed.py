# SPDX-License-Identifier: MIT
"""Training in several processes (torchrun), with the results of one process with the whole batch. (Batch norm in MoCo's
groups keeps the running statistics of the first process, which are noisier.)"""
import datetime
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from . import Refusal


def start(device):
    """Joins the processes started by torchrun, if there are any. Returns (rank, world): (0, 1) in a plain run. Raises
    Refusal if they would share a GPU, or have devices that torch cannot connect."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and not dist.is_initialized():
        if device.type != "cpu" and device != torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))):
            raise Refusal(f"--device {device}: each process of torchrun has a GPU of its own, or all share the CPU: "
                          f"use --device cuda or --device cpu, or leave torchrun out")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank_and_world()


def end():
    """Leaves the group of processes, which NCCL wants all to do together; does nothing in a plain run."""
    if dist.is_initialized():
        time.sleep(0.2)  # torch 2.4 would otherwise wait for ever for a gloo thread that is finishing an operation
        dist.destroy_process_group()


def rank_and_world():
    """(rank, world): the number of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(module, device, sync_batch_norm=True):
    """The module, with gradients averaged over the processes; unchanged in a plain run. Each loss has to depend on all
    parameters that require a gradient. sync_batch_norm: use the statistics of the whole batch, of all processes."""
    if not dist.is_initialized():
        return module
    if sync_batch_norm and device.type == "cuda":                             # ours takes more memory there
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    elif sync_batch_norm:
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.__class__ = SyncBatchNorm
    net = nn.parallel.DistributedDataParallel(module)
    # Buffers are equal in all processes, or only the first's are kept; queues and memory banks are too large to send.
    net.broadcast_buffers = False
    return net


def gather(x):
    """Concatenates x (n, ...) of all processes, in rank order, to (n * world, ...). Differentiable: the gradient of x
    is the sum over the losses of all processes. If each computes the same loss of the whole batch, that is world times
    the gradient; the mean over processes in DistributedDataParallel cancels it."""
    return Gather.apply(x.contiguous()) if dist.is_initialized() else x


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        dist.all_gather(parts := [torch.empty_like(x) for _ in range(dist.get_world_size())], x)
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient):
        dist.all_reduce(gradient := gradient.clone(memory_format=torch.contiguous_format))   # gloo sends memory order
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def first_process_first(function, *args):
    """function(*args) in every process: in the first, then in the first of each machine, then in the others, so that
    a download happens once for each disk. A separate group has a time-out of its own: the others wait up to a day for
    a download, not the usual half an hour."""
    if not dist.is_initialized():
        return function(*args)
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    done = False
    for turn in dist.get_rank() == 0, os.environ.get("LOCAL_RANK") == "0", True:
        if turn and not done:
            done, result = True, function(*args)
        dist.barrier(group)
    return result


def any_process(flag):
    """Whether the flag is set in any process. The exchange is on the CPU, so that the device can go on."""
    if dist.is_initialized():
        dist.all_reduce(flag := torch.tensor(float(flag)), dist.ReduceOp.MAX)
    return bool(flag)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes on the CPU, which torch's own does not support."""

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
