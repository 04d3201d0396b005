# SPDX-License-Identifier: MIT
"""Axial transformer blocks (Ho et al. 2019, 1912.12180): attention within the rows, or the columns, of a grid.

A grid x is (N, H, W, C). Blocks are pre-norm. A causal block can also run one position at a time (`step`), with a
cache of the keys and values of all previous positions.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention of sequences (B, L, C)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def project(self, x):
        """(B, L, C) to queries, keys, values, each (B, heads, L, C / heads)."""
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, causal):
        q, k, v = self.project(x)
        attend = explicit_attention if x.device.type == "cpu" else F.scaled_dot_product_attention
        return self.out(attend(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))         # (B, L, C)

    def step(self, x, cache, t):
        """Position t of each sequence, x (B, C); cache (2, B, heads, L, C / heads) is filled at t."""
        q, k, v = self.project(x[:, None])                                    # (B, heads, 1, C / heads)
        cache[0, :, :, t], cache[1, :, :, t] = k[:, :, 0], v[:, :, 0]
        q = q.to(cache.dtype).contiguous()                                    # MPS: others give garbage before 2.12
        return self.out(F.scaled_dot_product_attention(q, *cache[:, :, :, : t + 1]).flatten(1))


def explicit_attention(q, k, v, is_causal):
    """scaled_dot_product_attention written as matrix products, for the CPU, where its backward pass over short
    sequences is slow, most of all in bf16: tests/bench.py prints by how much. Softmax is slow, too, over rows whose
    length is no multiple of 16, so they are padded."""
    length = k.shape[2]
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)                      # (B, heads, L, L)
    scores = F.pad(scores, (0, -length % 16), value=float("-inf"))            # (B, heads, L, P), P a multiple of 16
    if is_causal:
        scores = scores + torch.full_like(scores[0, 0], float("-inf")).triu(1)
    return scores.softmax(dim=3, dtype=torch.float32)[..., :length].to(v.dtype) @ v


class Block(nn.Module):
    """Attention along one axis of a grid, then an MLP, each with a layer norm in front of it and a shortcut around it.

    axis: "row" attends within rows (over W), "column" within columns (over H). causal: a position only sees itself and
    those before it on this axis.
    """

    def __init__(self, width, heads, axis, causal):
        super().__init__()
        self.axis, self.causal = axis, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        y = y if self.axis == "row" else y.transpose(1, 2)                    # columns: (N, W, H, C)
        y = self.attention(y.flatten(0, 1), self.causal).unflatten(0, y.shape[:2])
        x = x + (y if self.axis == "row" else y.transpose(1, 2))
        return x + self.mlp(self.norm2(x))                                    # (N, H, W, C)

    def new_cache(self, sequences, length):
        """Empty keys and values for `step`."""
        weight, heads = self.attention.out.weight, self.attention.heads
        return weight.new_zeros(2, sequences, heads, length, weight.shape[0] // heads)

    def step(self, x, cache, t):
        """Applies the block at position t of each sequence: x (B, C), with `cache` from `new_cache`, to (B, C)."""
        x = x + self.attention.step(self.norm1(x), cache, t)
        return x + self.mlp(self.norm2(x))


def init_weights(module, depth, std=0.02):
    """As in GPT-2: normal with deviation std, residual branches' last layers scaled by 1 / sqrt(2 depth); biases 0."""
    for name, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.Embedding)):
            ends_branch = name.endswith(("attention.out", "mlp.2"))
            nn.init.normal_(child.weight, std=std / (2 * depth) ** 0.5 if ends_branch else std)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)


def split_batch(part, images, image_bytes, largest, side, device):
    """(part, recompute): how many of the images go through a network of `Block`s at once, and whether their activations
    are computed again in the backward pass (`Recompute`).

    part: that number, or None: as many as fit into half of a GPU's free memory, elsewhere into 2 GiB, in even parts.
    image_bytes: activations of an image. largest: numbers in its largest tensor. side: rows of an image.
    """
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2**31
    recompute = part is not None or images * image_bytes > room
    if part is None:
        # On CPUs, glibc is slow at tensors of 32 MB and more. CUDA attends to fewer than 2^16 rows at once: two views
        # of 2^14 / side images have 2^15.
        most = min((2**23 - 1) / largest if device.type == "cpu" else 2**14 / side, room / image_bytes)
        part = math.ceil(images / math.ceil(images / max(1, int(most))))
    return part, recompute and part < images


class Recompute(torch.autograd.Function):
    """`Recompute.apply(function, inputs, *parameters)` is function(*inputs), a tuple of tensors and of None, computed
    once more in the backward pass, in which only the parameters get gradients.

    torch.utils.checkpoint keeps the graph of the first pass. On the CPU its many small objects stay between the freed
    activations, into whose places the next ones do not fit: memory grows at each call.
    """

    @staticmethod
    def forward(context, function, inputs, *parameters):
        device = parameters[0].device.type
        context.autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device),
                                         cache_enabled=False)                 # most weights are used once
        context.function, context.inputs, context.parameters = function, inputs, parameters
        context.set_materialize_grads(False)
        with context.autocast:
            return function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, *gradients):
        with torch.enable_grad(), context.autocast:
            outputs = context.function(*context.inputs)
        outputs, gradients = zip(*((y, dy) for y, dy in zip(outputs, gradients) if dy is not None))
        return None, None, *torch.autograd.grad(outputs, context.parameters, gradients, allow_unused=True)
