"""BatchNorm for batches of several views, and networks that fuse it with the addition and the ReLU
that follow.

The modules are torch's and torchvision's, with their parameters, buffers and names. They compute
what those compute until a `SimSiam` with `fused` set passes views through them in training mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet

from vi_simsiam.ops import small_map_convolution, stem_convolution
from vi_simsiam.ops.batch_norm import batch_norm_act
from vi_simsiam.ops.stem_pool import batch_norm_relu_max_pool


class PerView(_BatchNorm):
    """BatchNorm of a batch that holds several views one after the other, each normalised by its own
    statistics.

    Running statistics are updated by each view in turn, as if the views had come one by one.
    """

    views = 1
    fused = False
    """Normalise all views at once in training mode; `count_batches` then counts the batches."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised batch."""
        if self.fused and self.training:
            return self.act(x, relu=False)
        if self.views == 1 or not self.training:
            return super().forward(x)
        normalise = super().forward
        return torch.cat([normalise(part) for part in x.chunk(self.views)])

    def act(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """relu(norm(x) + residual)."""
        return batch_norm_act(
            x, **self._numbers(), residual=residual, relu=relu, training=self.training
        )

    def act_pool(self, x: Tensor) -> Tensor:
        """max_pool(relu(norm(x))) of a batch in training mode: 3x3, stride 2, padding 1."""
        return batch_norm_relu_max_pool(x, **self._numbers())

    def _numbers(self) -> dict[str, Any]:
        assert self.momentum is not None
        return {
            "weight": self.weight,
            "bias": self.bias,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "groups": self.views,
            "momentum": self.momentum,
            "eps": self.eps,
        }


class PerViewBatchNorm1d(PerView, nn.BatchNorm1d):
    """BatchNorm of features (N, C)."""


class PerViewBatchNorm2d(PerView, nn.BatchNorm2d):
    """BatchNorm of images (N, C, height, width)."""


@torch.no_grad()
def count_batches(norms: Iterable[PerView], views: int) -> None:
    """Count a batch of `views` views in all norms that are in training mode, by one operation."""
    counters = [
        norm.num_batches_tracked
        for norm in norms
        if norm.training and norm.num_batches_tracked is not None
    ]
    if counters:
        torch._foreach_add_(counters, views)


def is_fused(norm: nn.Module) -> TypeGuard[PerView]:
    """True if `norm.act` computes the norm and what follows it."""
    return isinstance(norm, PerView) and norm.fused and norm.training


class Head(nn.Sequential):
    """Layers in sequence; a fused norm and the ReLU that follows are one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers in turn."""
        layers = list(self)
        for i, layer in enumerate(layers):
            if is_fused(layer) and i + 1 < len(layers) and isinstance(layers[i + 1], nn.ReLU):
                x = layer.act(x)
            elif not (i > 0 and isinstance(layer, nn.ReLU) and is_fused(layers[i - 1])):
                x = layer(x)
        return x


def _convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's result; a convolution on a small map, also in a sequence, may be our own."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    if type(layer) is nn.Sequential and not hooked:
        for each in layer:
            x = _convolve(each, x)
        return x
    if type(layer) is not nn.Conv2d or hooked or not small_map_convolution.takes(x, layer):
        return cast(Tensor, layer(x))
    numbers: Any = layer.stride, layer.padding
    return small_map_convolution.small_map_convolution(x, layer.weight, *numbers)


def _fused_block(block: Any, x: Tensor) -> Tensor:
    identity = x if block.downsample is None else _convolve(block.downsample, x)
    x = block.bn1.act(_convolve(block.conv1, x))
    if isinstance(block, resnet.BasicBlock):
        return cast(Tensor, block.bn2.act(_convolve(block.conv2, x), identity))
    x = block.bn2.act(_convolve(block.conv2, x))
    return cast(Tensor, block.bn3.act(_convolve(block.conv3, x), identity))


class _BasicBlock(resnet.BasicBlock):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return _fused_block(self, x) if is_fused(self.bn1) else cast(Tensor, super().forward(x))


class _Bottleneck(resnet.Bottleneck):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return _fused_block(self, x) if is_fused(self.bn1) else cast(Tensor, super().forward(x))


class _ResNet(resnet.ResNet):  # type: ignore[misc]
    def _forward_impl(self, x: Tensor) -> Tensor:
        if not is_fused(self.bn1):
            return cast(Tensor, super()._forward_impl(x))
        if stem_convolution.takes(x, self.conv1):
            x = stem_convolution.stem_convolution(x, self.conv1.weight)
        else:
            x = self.conv1(x)
        x = self.bn1.act_pool(x) if _is_stem_pool(self.maxpool) else self.maxpool(self.bn1.act(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast(Tensor, self.fc(torch.flatten(self.avgpool(x), 1)))


def _is_stem_pool(pool: nn.Module) -> bool:
    if not isinstance(pool, nn.MaxPool2d):
        return False
    numbers = pool.kernel_size, pool.stride, pool.padding, pool.dilation
    return (*numbers, pool.ceil_mode, pool.return_indices) == (3, 2, 1, 1, False, False)


def make_fusible(network: resnet.ResNet) -> None:
    """Let a torchvision ResNet made of `PerViewBatchNorm2d` layers fuse them.

    Its class and those of its blocks are exchanged, since torchvision's functions take no classes
    of blocks. Hooks of modules that are fused do not run; a convolution with hooks stays torch's.
    """
    exchanged: dict[type, type] = {resnet.ResNet: _ResNet}
    exchanged |= {resnet.BasicBlock: _BasicBlock, resnet.Bottleneck: _Bottleneck}
    for module in network.modules():
        if type(module) in exchanged:
            module.__class__ = exchanged[type(module)]
