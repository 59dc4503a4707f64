"""PPCR as a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from . import _checks, functional

# What the layers call with themselves and their input while record_gates listens in any thread.
recorder: Callable[[PPCR, Tensor], None] | None = None


class PPCR(nn.Module):
    """Multiplies every pixel by its own gate, ``y = x * g``; all gates of a new layer equal
    ``init_gate``.

    This is pyramid pixel context recalibration (arXiv 2303.01917). The first gradient of the
    weights of a new layer is not zero. With the default levels and C divisible by 4 the weight of
    level 1 has no effect. An affine pixel normalization would fold into the weights and the bias
    exactly, so the layer has none.

    Args:
        channels: C of the input ``[N, C, *spatial]``.
        levels: the number of bins of each level of cross-channel pyramid pooling, each from 1 to C;
            ``L = sum(levels)`` contexts for every pixel, at least 2.
        eps: added to the variance in pixel normalization, in units of the input squared; positive.
        bias: whether to learn the bias of pixel context integration.
        init_gate: the gate of every pixel at the start, in (0, 1); anything but 0.5 needs
            ``bias=True``. Pass a value near 1 when the layer goes into a pretrained network, which
            then starts close to what it was.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the best that can run.
        device: where the parameters are made.
        dtype: of the parameters. float32 parameters serve float32, float16 and bfloat16 inputs.

    Attributes:
        weight: ``[L]``, the weights of pixel context integration; zero at the start.
        bias: ``[1]``, or None; ``logit(init_gate)`` at the start.

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: an argument has a value that is not as above; the message names it.

    Example:
        >>> layer = ppcr_ext.PPCR(256, init_gate=0.9)
        >>> layer(torch.randn(2, 256, 7, 7)).shape
        torch.Size([2, 256, 7, 7])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        levels: Sequence[int] = (1, 2, 4),
        *,
        eps: float = 1e-5,
        bias: bool = True,
        init_gate: float = 0.5,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not _checks.is_integer(channels):
            raise TypeError(f"channels must be an int, got {channels!r}")
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        contexts, self.levels = _checks.check_levels(levels, channels)
        self.eps = _checks.check_eps(eps)
        _checks.check_backend(backend)
        _checks.check_bool("bias", bias)
        if not _checks.is_number(init_gate):
            raise TypeError(f"init_gate must be a float, got {init_gate!r}")
        if not 0 < init_gate < 1:
            raise ValueError(f"init_gate must lie between 0 and 1, got {init_gate!r}")
        if init_gate != 0.5 and not bias:
            why = "without a bias every gate starts at 0.5"
            raise ValueError(f"init_gate={init_gate} needs bias=True: {why}")
        self.channels = int(channels)
        self.init_gate = float(init_gate)
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(contexts, device=device, dtype=dtype))
        own_bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weights to zero and the bias to ``logit(init_gate)``, as in a new layer.

        Example:
            >>> layer = ppcr_ext.PPCR(8)
            >>> layer.reset_parameters()
        """
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.constant_(self.bias, math.log(self.init_gate / (1 - self.init_gate)))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Recalibrates x. With a residual it also adds it and applies ReLU, in the same single
        pass.

        Call the layer itself, ``layer(x)`` or ``layer(x, residual)``: then its hooks run, and
        everything else that PyTorch attaches to the call of a module. A subclass with a forward of
        its own must take the residual, too: fused blocks pass it.

        Args:
            x: ``[N, C, *spatial]``, float32, float16, bfloat16 or float64.
            residual: None, or a tensor of x's shape, device and dtype (under autocast it is cast to
                x's dtype).

        Returns:
            ``x * g`` or ``relu(x * g + residual)``, with the shape, dtype and memory format of x.
            See :func:`ppcr_ext.ppcr` and :func:`ppcr_ext.ppcr_add_relu`.

        Raises:
            TypeError, ValueError, RuntimeError: as for :func:`ppcr_ext.ppcr`.

        Example:
            >>> layer, x = ppcr_ext.PPCR(8), torch.ones(1, 8, 2)
            >>> layer(x).sum().item(), layer(x, residual=-x).sum().item()
            (8.0, 0.0)
        """
        record = recorder  # another thread may take it away
        if record is not None:
            record(self, x)
        own = self.weight, self.bias
        options: dict[str, Any] = {"levels": self.levels, "eps": self.eps, "backend": self.backend}
        if isinstance(x, Tensor):
            self._check_channels(x)
        elif isinstance(residual, torch.fx.Proxy) and residual.node.args == (None,):
            # The layer is traced by itself: only a run of the graph tells whether there is one.
            return functional.ppcr_or_add_relu(x, residual, *own, **options)
        if residual is None:
            return functional.ppcr(x, *own, **options)
        return functional.ppcr_add_relu(x, residual, *own, **options)

    def add_relu(self, x: Tensor, residual: Tensor) -> Tensor:
        """Another name for ``layer(x, residual)``.

        Args:
            x: ``[N, C, *spatial]``, as for :meth:`forward`.
            residual: a tensor of x's shape, device and dtype.

        Returns:
            ``relu(x * g + residual)``, with the shape, dtype and memory format of x.

        Raises:
            TypeError, ValueError, RuntimeError: as for :func:`ppcr_ext.ppcr`.

        Example:
            >>> layer, x = ppcr_ext.PPCR(8), torch.randn(1, 8, 2)
            >>> torch.equal(layer.add_relu(x, x), layer(x, x))
            True
        """
        if residual is None:
            raise TypeError("residual must be a Tensor, got NoneType")
        y: Tensor = self(x, residual)
        return y

    def gate(self, x: Tensor) -> Tensor:
        """The gate map of an input.

        This is no call of the layer. Its hooks do not run, and parameters that a hook prepares
        (pruned, offloaded or sharded ones) are read as they are. :func:`ppcr_ext.record_gates`
        gives the maps of calls.

        Args:
            x: ``[N, C, *spatial]``, as for :meth:`forward`.

        Returns:
            The gates ``[N, 1, *spatial]``, with values in [0, 1] and the dtype of x. See
            :func:`ppcr_ext.ppcr_gate`.

        Raises:
            TypeError, ValueError, RuntimeError: as for :func:`ppcr_ext.ppcr`.

        Example:
            >>> layer = ppcr_ext.PPCR(8)
            >>> layer.gate(torch.randn(1, 8, 2)).tolist()
            [[[0.5, 0.5]]]
        """
        if isinstance(x, Tensor):
            self._check_channels(x)
        return functional.ppcr_gate(
            x, self.weight, self.bias, levels=self.levels, eps=self.eps, backend=self.backend
        )

    def __prepare_scriptable__(self) -> None:
        """Raises the error of ``torch.jit.script``, which asks for this first, of the layer and of
        all networks that hold it.
        """
        remedy = "record the network with torch.jit.trace(model, example) or torch.export.export"
        raise TypeError(f"PPCR cannot be compiled by torch.jit.script: {remedy}")

    def _check_channels(self, x: Tensor) -> None:
        try:
            if x.dim() < 2 or x.shape[1] == self.channels:
                return
        except RuntimeError:  # a nested tensor has no shape
            return
        if not x.is_nested:
            raise ValueError(f"x must have {self.channels} channels, got {list(x.shape)}")

    def extra_repr(self) -> str:
        """The options of the layer, for its repr.

        Returns:
            A line such as ``256, levels=(1, 2, 4), eps=1e-05, bias=True, backend=None``.

        Example:
            >>> ppcr_ext.PPCR(8)
            PPCR(8, levels=(1, 2, 4), eps=1e-05, bias=True, backend=None)
        """
        options = f"levels={self.levels}, eps={self.eps}, bias={self.bias is not None}"
        return f"{self.channels}, {options}, backend={self.backend!r}"


def can_fuse(layer: nn.Module | None) -> bool:
    """Whether a residual block may leave its addition and ReLU to the layer.

    It may if the layer is a PPCR and no hooks look at the layer's own output or its gradient, be
    they its own or those of all modules.
    """
    if not isinstance(layer, PPCR) or nn.modules.module._has_any_global_hook():
        return False
    return not (layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks)


class ResidualBlock:
    """The forward pass that the residual blocks of torchvision, timm and MONAI with PPCR share.

    A block brings the convolutions with their normalizations, in ``_branch``, and the names of its
    layer and its last activation.
    """

    fuse = True
    _layer, _activation = "ppcr", "relu"

    def forward(self: Any, x: Tensor) -> Tensor:
        """Runs the block.

        Args:
            x: ``[N, C, *spatial]``, of the rank that the block's convolutions take.

        Returns:
            The output of the block, with the shape that the block without PPCR gives.

        Raises:
            TypeError: x has a dtype that the layer does not take.
            ValueError: the layer has been replaced by one for another number of channels.

        Example:
            >>> from ppcr_ext.networks import PPCRBasicBlock
            >>> PPCRBasicBlock(8, 8)(torch.randn(1, 8, 6, 6)).shape
            torch.Size([1, 8, 6, 6])
        """
        residual = x if self.downsample is None else self.downsample(x)
        y: Tensor = self._branch(x)
        layer = getattr(self, self._layer)
        if self.fuse and can_fuse(layer):
            y = layer(y, residual=residual)
            return y
        for step in (layer, getattr(self, "drop_path", None)):  # in timm both may be None
            y = y if step is None else step(y)
        # Not in place, where backward hooks of the layer would fail.
        y = getattr(self, self._activation)(y + residual)
        return y


class ResidualConvolutions(ResidualBlock):
    """A block of two convolutions, or three where there is a ``conv3``, in the names of torchvision
    and MONAI."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ppcr = PPCR(getattr(self, "conv3", self.conv2).out_channels)

    def _branch(self: Any, x: Tensor) -> Any:
        activation = getattr(self, self._activation)
        x = self.bn2(self.conv2(activation(self.bn1(self.conv1(x)))))
        return self.bn3(self.conv3(activation(x))) if hasattr(self, "conv3") else x
