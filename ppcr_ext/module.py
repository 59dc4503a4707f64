"""PPCR as a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.fx
from torch import Tensor, nn

from . import _checks, functional

# What the layers call with themselves and their input while record_gates listens in any thread.
recorder: Callable[[PPCR, Tensor], None] | None = None


class PPCR(nn.Module):
    """Pyramid pixel context recalibration (arXiv 2303.01917) as a drop-in layer: ``y = x * g``,
    with one gate per pixel.

    Args:
        channels: C of the input ``[N, C, *spatial]``.
        levels: bins of each level of cross-channel pyramid pooling; ``L = sum(levels)`` contexts
            per pixel.
        eps: added to the variance in pixel normalization.
        bias: learn the bias of pixel context integration.
        init_gate: the gate of every pixel at the start, in (0, 1); anything but 0.5 needs
            ``bias=True``. Pass a value near 1 when the layer goes into a pretrained network, so
            that it starts almost as the identity.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the best that can run.
        device, dtype: of the parameters. float32 parameters serve float32, float16 and bfloat16
            inputs.

    Attributes:
        weight: ``[L]``, zero at the start: every gate is ``init_gate``, and the first gradient is
            not zero. An affine pixel normalization would fold into these weights and the bias
            exactly, so the layer has none.
        bias: ``[1]``, or None.

    Raises:
        TypeError, ValueError: an argument is not as above.
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
        if not (_checks.is_number(init_gate) and 0 < init_gate < 1):
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
        """weight to zero, bias to logit(init_gate)."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.constant_(self.bias, math.log(self.init_gate / (1 - self.init_gate)))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Recalibrates x; with a residual also adds it and applies ReLU, in the same single pass.

        Call the layer itself, ``layer(x)`` or ``layer(x, residual)``: whatever PyTorch hangs onto
        a call then runs.

        Args:
            x: ``[N, C, *spatial]``, float32, float16, bfloat16 or float64.
            residual: None, or of x's shape, dtype (under autocast it is cast to it) and device.

        Returns:
            ``x * g`` or ``relu(x * g + residual)``: shape, dtype and memory format of x. See
            :func:`ppcr_ext.ppcr` and :func:`ppcr_ext.ppcr_add_relu`.

        Raises:
            TypeError, ValueError: an argument is not as above; the message names it.
        """
        if recorder is not None:
            recorder(self, x)
        if isinstance(x, Tensor):
            self._check_channels(x)
        elif isinstance(residual, torch.fx.Proxy) and residual.node.args == (None,):
            # The layer is traced by itself: only a run of the graph tells whether there is one.
            return functional.ppcr_or_add_relu(
                x,
                residual,
                self.weight,
                self.bias,
                levels=self.levels,
                eps=self.eps,
                backend=self.backend,
            )
        if residual is None:
            return functional.ppcr(
                x, self.weight, self.bias, levels=self.levels, eps=self.eps, backend=self.backend
            )
        return functional.ppcr_add_relu(
            x,
            residual,
            self.weight,
            self.bias,
            levels=self.levels,
            eps=self.eps,
            backend=self.backend,
        )

    def add_relu(self, x: Tensor, residual: Tensor) -> Tensor:
        """A name for ``layer(x, residual)``."""
        if residual is None:
            raise TypeError("residual must be a Tensor, got NoneType")
        y: Tensor = self(x, residual)
        return y

    def gate(self, x: Tensor) -> Tensor:
        """The gate map ``[N, 1, *spatial]``; see :func:`ppcr_ext.ppcr_gate`.

        No call of the layer: its hooks do not run, so that parameters that a hook prepares
        (pruned, offloaded, sharded) are read as they are. The map of a call is what
        :func:`ppcr_ext.record_gates` gives.
        """
        if isinstance(x, Tensor):
            self._check_channels(x)
        return functional.ppcr_gate(
            x, self.weight, self.bias, levels=self.levels, eps=self.eps, backend=self.backend
        )

    def __prepare_scriptable__(self) -> None:
        """What ``torch.jit.script`` asks first, of the layer and of all networks that hold it."""
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
        options = f"levels={self.levels}, eps={self.eps}, bias={self.bias is not None}"
        return f"{self.channels}, {options}, backend={self.backend!r}"


def can_fuse(layer: nn.Module | None) -> bool:
    """Whether a residual block may leave its addition and ReLU to the layer.

    To a PPCR it may, unless hooks look at what the layer itself puts out, or at its gradient.
    """
    if not isinstance(layer, PPCR):
        return False
    return not (layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks)
