"""Training in several processes (torchrun): the results are those of one process with the whole batch."""
import os

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import nn


def start(device):
    """Joins the processes that torchrun started, if it did. Returns (rank, world): (0, 1) in a plain run."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank_and_world()


def rank_and_world():
    """Which process this is, of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(module, device, sync_batch_norm=True, all_used=True):
    """The module with its gradients averaged over the processes; unchanged in a plain run.

    sync_batch_norm: batch norm, in place, by the whole batch of all processes. all_used: whether each step's loss
    depends on all of the module's parameters.
    """
    if not dist.is_initialized():
        return module
    if sync_batch_norm and device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    elif sync_batch_norm:
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.__class__ = SyncBatchNorm
    # Buffers are the same in every process, or the first's are kept: a queue or a memory bank is too large to send.
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=not all_used, broadcast_buffers=False)


def gather(x):
    """(n, ...) of each process to (n * world, ...) in rank order, differentiably.

    The gradient of x sums what every process's loss asks of it. If each process computes the same loss of the whole
    batch, that is world times the gradient; DistributedDataParallel's mean over the processes divides it away.
    """
    if not dist.is_initialized():
        return x
    parts = dist_nn.all_gather(x.contiguous())
    for part in parts:
        if part.requires_grad:                                                # gloo sends a transposed one as it lies
            part.register_hook(lambda gradient: gradient.contiguous())
    return torch.cat(parts)


def first_process_first(function, *args):
    """function(*args) in every process, in the first before the others: what it downloads is downloaded once."""
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()
    result = function(*args)
    if rank == 0 and world > 1:
        dist.barrier()
    return result


def any_process(flag):
    """Whether the flag is set in any process. It stays on the CPU, so the device goes on meanwhile."""
    if dist.is_initialized():
        dist.all_reduce(flag := torch.tensor(float(flag)), dist.ReduceOp.MAX)
    return bool(flag)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the statistics of all processes' batches, for the CPU, which torch.nn.SyncBatchNorm refuses: so a
    run of several processes can be tried, and tested, without a GPU."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        world, wide, dims = dist.get_world_size(), x.float(), [d for d in range(x.dim()) if d != 1]
        mean = dist_nn.all_reduce(wide.mean(dims, keepdim=True)) / world
        var = dist_nn.all_reduce((wide - mean).square().mean(dims, keepdim=True)) / world
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * count / (count - 1), self.momentum)
        weight, bias = self.weight.view(mean.shape), self.bias.view(mean.shape)
        return ((wide - mean) * torch.rsqrt(var + self.eps) * weight + bias).to(x.dtype)
