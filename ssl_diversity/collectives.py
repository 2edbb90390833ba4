"""What ranks compute together in a training step: outputs of the global batch, batch norm over it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> int:
    """How many ranks train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gathered(torch.autograd.Function):
    """All ranks' (n, ...) as (world, n, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alike: bool) -> Tensor:
        ctx.alike = alike
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.alike:
            return gradient[dist.get_rank()] * world(), None
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()], None


def global_batch(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each (B / world, d) of one dtype as the global batch's (B, d), rows in the order of one process.

    For a loss that every rank then computes alike: the mean over ranks of its gradients is the one process's.
    """
    if world() == 1:
        return outputs
    widths = [output.shape[1] for output in outputs]
    gathered: Tensor = _Gathered.apply(torch.cat(outputs, 1), True)
    return gathered.flatten(0, 1).split(widths, 1)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks, equally large, on any device; torch's SyncBatchNorm refuses the CPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        x = input.to(self.running_mean.dtype)
        dims = [dim for dim in range(x.ndim) if dim != 1]
        own = torch.stack(torch.var_mean(x, dims, correction=0))
        variances, means = _Gathered.apply(own, False).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + means.var(0, correction=0)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world()
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        shape = [-1, *[1] * (x.ndim - 2)]
        return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(input.dtype)


def normalize_globally(module: nn.Module, device: str) -> None:
    """Make every batch norm inside `module` take its statistics over all ranks; names and values stay."""
    if device.startswith("cuda"):
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                new = GlobalBatchNorm(
                    child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
                )
                new._parameters, new._buffers = child._parameters, child._buffers
                setattr(parent, name, new.train(child.training))
