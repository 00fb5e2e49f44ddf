"""GroupNorm with SiLU in channels-last memory, its reductions written in Triton: a variant.

The compiler makes two slow kernels of a GroupNorm over the (B, HW, G, C / G) view, because a group
of ten channels is a bad shape to reduce over. Here each channel is reduced by itself, along
positions; groups are put together from those numbers, which are few. What is left is pointwise, and
the compiler's. On a GPU: not run. TRITON_INTERPRET=1 runs it on a CPU, for the tests.

Shapes: B images, N positions, C channels, G groups; K chunks of the positions.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("Triton needs a GPU, or TRITON_INTERPRET=1")

COLUMNS = 32  # channels that one program reduces


def chunk_size(positions: int) -> int:
    """Positions that one program reduces: the largest power of 2 that divides them, at most 64."""
    return min(64, positions & -positions)


@triton.jit
def moments_kernel(x, mean, var, positions, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean and variance of each channel in a chunk: x (B, N, C) -> mean, var (B, K, C)."""
    image = tl.program_id(0)
    chunk = tl.program_id(1)
    row = chunk * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    at = (image * positions + row[:, None]) * channels + column[None, :]
    value = tl.load(x + at, mask=inside[None, :], other=0).to(tl.float32)
    average = tl.sum(value, 0) / ROWS
    away = value - average[None, :]
    out = (image * tl.num_programs(1) + chunk) * channels + column
    tl.store(mean + out, average, mask=inside)
    tl.store(var + out, tl.sum(away * away, 0) / ROWS, mask=inside)


@triton.jit
def gradients_kernel(
    x,
    gradient,
    mean,
    rstd,
    weight,
    bias,
    sum_z,
    sum_zn,
    positions,
    channels,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over a chunk of dz and of dz n, with n = (x - mean) rstd and z = n weight + bias.

    x, gradient (B, N, C); mean, rstd (B, C); weight, bias (C,) -> sum_z, sum_zn (B, K, C).
    """
    image = tl.program_id(0)
    chunk = tl.program_id(1)
    row = chunk * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    at = (image * positions + row[:, None]) * channels + column[None, :]
    of_image = image * channels + column
    centre = tl.load(mean + of_image, mask=inside, other=0)
    scale = tl.load(rstd + of_image, mask=inside, other=0)
    n = tl.load(x + at, mask=inside[None, :], other=0).to(tl.float32)
    n = (n - centre[None, :]) * scale[None, :]
    dz = tl.load(gradient + at, mask=inside[None, :], other=0).to(tl.float32)
    if SILU:
        w = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
        b = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
        z = n * w[None, :] + b[None, :]
        sigmoid = 1 / (1 + tl.exp(-z))
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    out = (image * tl.num_programs(1) + chunk) * channels + column
    tl.store(sum_z + out, tl.sum(dz, 0), mask=inside)
    tl.store(sum_zn + out, tl.sum(dz * n, 0), mask=inside)


def grid_and_outputs(x: Tensor) -> tuple[tuple, int, Tensor, Tensor]:
    """(grid, chunk size, two empty (B, K, C) float32) for a kernel over x (B, N, C)."""
    B, N, C = x.shape
    rows = chunk_size(N)
    first = torch.empty(B, N // rows, C, device=x.device)
    return (B, N // rows, triton.cdiv(C, COLUMNS)), rows, first, torch.empty_like(first)


@triton_op("efficient3dim::channel_moments", mutates_args={})
def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, K, C) of the channels of x (B, N, C), chunk by chunk."""
    grid, rows, mean, var = grid_and_outputs(x)
    kernel = wrap_triton(moments_kernel)
    kernel[grid](x, mean, var, x.shape[1], x.shape[2], ROWS=rows, COLUMNS=COLUMNS)
    return mean, var


@triton_op("efficient3dim::channel_gradients", mutates_args={})
def channel_gradients(
    x: Tensor,
    gradient: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The sums of `gradients_kernel`, (B, K, C) each."""
    grid, rows, sum_z, sum_zn = grid_and_outputs(x)
    kernel = wrap_triton(gradients_kernel)
    kernel[grid](
        x,
        gradient,
        mean,
        rstd,
        weight,
        bias,
        sum_z,
        sum_zn,
        x.shape[1],
        x.shape[2],
        SILU=silu,
        ROWS=rows,
        COLUMNS=COLUMNS,
    )
    return sum_z, sum_zn


class GroupNormSiLU(torch.autograd.Function):
    """x (B, N, C), contiguous -> the same, normalised over G groups and, with silu, activated."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool):
        B, N, C = x.shape
        means, variances = channel_moments(x)
        means = means.unflatten(2, (groups, C // groups))  # (B, K, G, C / G)
        between, mean = torch.var_mean(means, dim=(1, 3), correction=0)  # (B, G)
        var = variances.unflatten(2, (groups, C // groups)).mean(dim=(1, 3)) + between
        mean = mean.repeat_interleave(C // groups, dim=1)  # (B, C)
        rstd = torch.rsqrt(var + eps).repeat_interleave(C // groups, dim=1)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.groups = groups
        ctx.silu = silu
        z = (x.float() - mean[:, None]) * rstd[:, None] * weight + bias
        return (z * torch.sigmoid(z) if silu else z).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        B, N, C = x.shape
        gradient = gradient.contiguous()
        sum_z, sum_zn = channel_gradients(x, gradient, mean, rstd, weight, bias, ctx.silu)
        sum_z = sum_z.sum(dim=1)  # (B, C)
        sum_zn = sum_zn.sum(dim=1)

        n = (x.float() - mean[:, None]) * rstd[:, None]
        dz = gradient.float()
        if ctx.silu:
            z = n * weight + bias
            sigmoid = torch.sigmoid(z)
            dz = dz * sigmoid * (1 + z * (1 - sigmoid))
        dx = rstd[:, None] * (
            dz * weight
            - group_mean(weight * sum_z, ctx.groups, N)
            - n * group_mean(weight * sum_zn, ctx.groups, N)
        )
        return dx.to(x.dtype), sum_zn.sum(0), sum_z.sum(0), None, None, None


def group_mean(sums: Tensor, groups: int, positions: int) -> Tensor:
    """Sums over positions (B, C) -> their mean over positions and a group's channels (B, 1, C)."""
    per_group = sums.shape[1] // groups
    mean = sums.unflatten(1, (groups, per_group)).mean(dim=2) / positions
    return mean.repeat_interleave(per_group, dim=1)[:, None]


def group_norm(norm: torch.nn.GroupNorm, x: Tensor, silu: bool = False) -> Tensor:
    """`norm`, and SiLU if asked for, of x (B, C, H, W) in channels-last memory, which it keeps."""
    B, C, H, W = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(B, H * W, C)
    tokens = GroupNormSiLU.apply(tokens, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    return tokens.reshape(B, H, W, C).permute(0, 3, 1, 2)
