"""What PPCR must compute, and how exactly: for the tests, the benchmarks, and a build of your own.

Inputs are drawn, a backend computes them, and the errors are compared with what they may be:

>>> inputs = testing.make_inputs("ppcr", (8, 64, 28, 28), dtype=torch.float16)
>>> results = testing.evaluate(ppcr_ext.ppcr, inputs, backend="reference")
>>> errors = testing.truth(inputs).errors(results)
>>> errors.within(testing.tolerance(inputs.x.dtype, inputs.levels))
True

Results are dicts of tensors: ``y``, ``dx``, ``dweight``, and where they exist ``dbias`` and
``dresidual``. All errors are relative and have no unit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ._checks import DTYPES
from ._inputs import (
    EPS,
    LAYOUTS,
    LEVELS,
    OPERATORS,
    SHAPES,
    STAGES,
    Inputs,
    make_inputs,
    to_layout,
)
from .reference import bins

__all__ = [
    "DTYPES",
    "EPS",
    "LAYOUTS",
    "LEVELS",
    "OPERATORS",
    "SHAPES",
    "STAGES",
    "Errors",
    "Inputs",
    "Truth",
    "evaluate",
    "make_inputs",
    "relative",
    "to_layout",
    "tolerance",
    "truth",
]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative L2 errors, or limits of them.

    Args:
        y: of the output.
        dx: of the gradient of x, or of the residual where that one is larger.
        parameters: of the gradient of weight or of bias, the larger one.

    Example:
        >>> errors, limits = testing.Errors(1e-6, 2e-6, 0.0), testing.Errors(4e-6, 4e-6, 4e-6)
        >>> errors.share_of(limits), errors.within(limits)
        (0.5, True)
    """

    y: float
    dx: float
    parameters: float

    def __str__(self) -> str:
        return f"y {self.y:.1e}, dx {self.dx:.1e}, dweight and dbias {self.parameters:.1e}"

    def share_of(self, limits: Errors) -> float:
        """The largest ratio of an error to its limit.

        Args:
            limits: what the errors may be, such as :func:`tolerance` gives.

        Returns:
            The ratio, at most 1 where all errors are within their limits; NaN where an error is
            NaN.
        """
        return _largest(self.y / limits.y, self.dx / limits.dx, self.parameters / limits.parameters)

    def within(self, limits: Errors) -> bool:
        """Whether no error exceeds its limit.

        Args:
            limits: what the errors may be, such as :func:`tolerance` gives.

        Returns:
            True or False. An error that is NaN exceeds any limit.
        """
        return self.share_of(limits) <= 1


_TOLERANCES = {
    torch.float64: Errors(1e-11, 1e-11, 1e-11),
    torch.float16: Errors(7e-4, 7e-4, 7e-4),
    torch.bfloat16: Errors(5e-3, 5e-3, 5e-3),
}


def tolerance(dtype: torch.dtype, levels: Sequence[int] = LEVELS) -> Errors:
    """What the errors may be, where the values of x are drawn as by :func:`make_inputs`.

    With u the unit roundoff (half a unit in the last place):

    * float16 and bfloat16 are computed in float32 and rounded once, to u = 4.9e-4 or 3.9e-3 at
      most. 7e-4 and 5e-3 leave 1.4 u and 1.3 u.
    * float32 has u = 6e-8, and normalization amplifies it. A context t_l carries an error of a few
      u of its size, which ``n_l = (t_l - mean(t)) / sqrt(var(t) + eps)`` divides by the spread of
      the contexts. The factor is A = max|t| / sqrt(var + eps), which is 10 to 100 where the
      channels are drawn from 1.5 + 2 N(0, 1), and larger at single pixels. Of y and the parameters
      that is 1e-5; dx meets it again in the normalization's own gradient, hence 5e-5.
    * Other levels than (1, 2, 4) may have contexts that lie closer together (with two of them a
      normalized context is almost a sign), so that A is larger: five times as much, for dx six.
    * float64 has u = 1.1e-16, amplified in the same way.

    Larger offsets than 1.5 amplify more, in any implementation, and these limits are not for them.

    Args:
        dtype: of x: float32, float16, bfloat16 or float64.
        levels: of the operator.

    Returns:
        The limits.

    Raises:
        KeyError: dtype is none of these.

    Example:
        >>> testing.tolerance(torch.float16)
        Errors(y=0.0007, dx=0.0007, parameters=0.0007)
    """
    if dtype != torch.float32:
        return _TOLERANCES[dtype]
    return Errors(1e-5, 5e-5, 1e-5) if tuple(levels) == LEVELS else Errors(5e-5, 3e-4, 5e-5)


def evaluate(
    function: Callable[..., Tensor], inputs: Inputs, **options: object
) -> dict[str, Tensor]:
    """The output of a function, which is called as the operator is, and its gradients.

    Args:
        function: ``ppcr_ext.ppcr``, or another that takes its arguments.
        inputs: what it is called with.
        options: more keywords for it, such as ``backend="native"``.

    Returns:
        A dict of the results, with the keys ``y``, ``dx``, ``dweight``, and where they exist
        ``dbias`` and ``dresidual``.

    Example:
        >>> inputs = testing.make_inputs("ppcr", (2, 8, 5, 5))
        >>> sorted(testing.evaluate(ppcr_ext.ppcr, inputs, backend="reference"))
        ['dbias', 'dweight', 'dx', 'y']
    """
    leaves = {"x": inputs.x, "weight": inputs.weight}
    if inputs.bias is not None:
        leaves["bias"] = inputs.bias
    if inputs.has_residual:
        leaves["residual"] = inputs.residual
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    maps = [leaves[name] for name in ("x", "residual") if name in leaves]
    y = function(
        *maps, leaves["weight"], leaves.get("bias"), levels=inputs.levels, eps=inputs.eps, **options
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.grad)
    named = zip(leaves, gradients, strict=True)
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in named}}


@dataclasses.dataclass
class Truth:
    """The results in float64, and for each the tensor whose norm its error is relative to.

    Args:
        values: the results by name, as of :func:`evaluate`.
        scales: the results themselves but for sums whose terms cancel. There the sum of the
            absolute terms stands: over all pixels for the parameters' gradients, and over the
            contexts for dx of ppcr_gate, which vanishes for two contexts.

    Example:
        >>> exact = testing.truth(testing.make_inputs("ppcr", (2, 8, 5, 5)))
        >>> exact.error("y", exact.values["y"]), exact.errors(exact.values).dx
        (0.0, 0.0)
    """

    values: dict[str, Tensor]
    scales: dict[str, Tensor]

    def error(self, name: str, got: Tensor) -> float:
        """The relative L2 error of one result.

        Args:
            name: of the result, such as ``"dx"``.
            got: the result.

        Returns:
            The error; NaN where the result holds a NaN.
        """
        return relative(got, self.values[name], self.scales[name])

    def errors(self, results: Mapping[str, Tensor]) -> Errors:
        """The errors of all results.

        Args:
            results: what :func:`evaluate` gave. Some of the parameters' gradients may be missing.

        Returns:
            The errors, of the gradients the largest ones.
        """
        found = {name: self.error(name, got) for name, got in results.items()}

        def largest(*names: str) -> float:
            return _largest(*(found[name] for name in names if name in found))

        return Errors(found["y"], largest("dx", "dresidual"), largest("dweight", "dbias"))


def _largest(*values: float) -> float:
    """The largest of the values, or NaN if one of them is NaN."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def relative(got: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """L2 norm of a difference over that of a scale.

    Args:
        got: the result.
        exact: what it should be.
        scale: what the difference is relative to; the exact values where it is None.

    Returns:
        The ratio, computed in float64.

    Example:
        >>> testing.relative(torch.tensor([1.5]), torch.tensor([1.0]))
        0.5
    """
    exact = exact.double()
    scale = exact if scale is None else scale.double()
    return float((got.to(exact) - exact).norm() / scale.norm().clamp_min(1e-300))


@torch.no_grad()
def truth(
    inputs: Inputs, y: Tensor | None = None, device: torch.device | str | None = None
) -> Truth:
    """The formulas of an operator and its gradients by hand, in float64, of the stored inputs.

    Args:
        inputs: the inputs; their dtypes and layout do not matter.
        y: of ppcr_add_relu, the output whose zeros mask the gradients. The operator takes its own,
            where rounding may have decided which side of 0 a value is on. Pass it if the errors of
            the gradients should not hold that. None stands for the exact output.
        device: where to compute; that of x where it is None.

    Returns:
        The exact results, and what errors are relative to.

    Example:
        >>> testing.truth(testing.make_inputs("ppcr_gate", (2, 8, 5, 5))).values["y"].shape
        torch.Size([2, 1, 5, 5])
    """
    x, grad, weight, residual = (
        t.detach().to(device, torch.float64).contiguous()
        for t in (inputs.x, inputs.grad, inputs.weight, inputs.residual)
    )
    is_gate = inputs.operator == "ppcr_gate"
    edges = [edge for level in inputs.levels for edge in bins(x.shape[1], level)]
    contexts = torch.stack([x[:, begin:end].mean(1) for begin, end in edges], 1)
    centred = contexts - contexts.mean(1, keepdim=True)
    deviation = (centred.square().mean(1, keepdim=True) + inputs.eps).sqrt()
    n = centred / deviation
    w = weight.view(-1, *[1] * (x.dim() - 2))
    z = (n * w).sum(1, keepdim=True)
    if inputs.bias is not None:
        z = z + inputs.bias.detach().to(z)
    gate = z.sigmoid()

    values = {"y": gate if is_gate else x * gate}
    if inputs.has_residual:
        values["y"] = (values["y"] + residual).relu()
        shown = values["y"] if y is None else y.detach().to(x.device)
        grad = values["dresidual"] = torch.where(shown <= 0, 0, grad)
    dgate = grad if is_gate else (grad * x).sum(1, keepdim=True)
    dz = dgate * gate * (1 - gate)

    def spread(dt: Tensor, dx: Tensor) -> Tensor:
        """dx plus the gradients of the contexts, shared among the channels of their bins."""
        for context, (begin, end) in enumerate(edges):
            dx[:, begin:end] += dt[:, context : context + 1] / (end - begin)
        return dx

    dn = dz * w
    dt = (dn - dn.mean(1, keepdim=True) - n * (dn * n).mean(1, keepdim=True)) / deviation
    values["dx"] = spread(dt, torch.zeros_like(x) if is_gate else grad * gate)
    values["dweight"], values["dbias"] = _over_pixels(dz * n), _over_pixels(dz)
    scales = {**values, "dweight": _over_pixels((dz * n).abs()), "dbias": _over_pixels(dz.abs())}
    if is_gate:
        terms = w.abs() + w.abs().mean() + n.abs() * (w * n).abs().mean(1, keepdim=True)
        scales["dx"] = spread(dz.abs() * terms / deviation, torch.zeros_like(x))
    return Truth(values, scales)


def _over_pixels(t: Tensor) -> Tensor:
    return t.transpose(0, 1).flatten(1).sum(1)
