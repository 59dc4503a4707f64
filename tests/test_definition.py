"""The definition against numbers worked out by hand, for every backend."""

import math

import pytest
import torch
from cases import BACKENDS

import ppcr_ext
from ppcr_ext import reference


def gate(pixel, weight, bias=None, *, levels, backend, eps=1e-5):
    """The gate of one float64 pixel."""
    tensors = [
        torch.tensor(v, dtype=torch.float64) if v is not None else None
        for v in (pixel, weight, bias)
    ]
    x, w, b = tensors
    return ppcr_ext.ppcr_gate(x[None], w, b, levels=levels, eps=eps, backend=backend).item()


@pytest.mark.parametrize("backend", BACKENDS)
class TestOnPaper:
    def test_four_channels(self, backend):
        # Channels 1 2 3 6. Level 1: mean 3. Level 2: (1+2)/2 = 1.5 and (3+6)/2 = 4.5. Level 4: the
        # channels themselves.
        # Contexts 3 1.5 4.5 1 2 3 6: mean 21/7 = 3, deviations 0 -1.5 1.5 -2 -1 0 3, variance
        # 18.5/7.
        deviations = [0, -1.5, 1.5, -2, -1, 0, 3]
        weight = [0.3, -0.2, 0.5, 0.1, -0.4, 0.7, 0.2]
        # sum of weight * deviation: 0 + 0.3 + 0.75 - 0.2 + 0.4 + 0 + 0.6 = 1.85
        assert sum(w * d for w, d in zip(weight, deviations, strict=True)) == pytest.approx(1.85)
        z = 1.85 / math.sqrt(18.5 / 7 + 1e-5) - 0.25
        g = 1 / (1 + math.exp(-z))
        assert gate(
            [1.0, 2, 3, 6], weight, [-0.25], levels=(1, 2, 4), backend=backend
        ) == pytest.approx(g, rel=1e-14)
        x = torch.tensor([[1.0, 2, 3, 6]], dtype=torch.float64)
        y = ppcr_ext.ppcr(x, x.new_tensor(weight), x.new_tensor([-0.25]), backend=backend)
        torch.testing.assert_close(y, x * g, rtol=1e-14, atol=0)

    def test_overlapping_bins(self, backend):
        # Five channels in two bins: channels 0 1 2 and 2 3 4 (channel 2 in both). Values 1 2 6 0 3:
        # means 3 and 3. In three bins 0 1, 1 2 3, 3 4: means 1.5, 8/3, 1.5.
        assert reference.bins(5, 2) == [(0, 3), (2, 5)]
        assert reference.bins(5, 3) == [(0, 2), (1, 4), (3, 5)]
        contexts = [3, 3, 1.5, 8 / 3, 1.5]
        mean = sum(contexts) / 5
        variance = sum((t - mean) ** 2 for t in contexts) / 5
        weight = [1.0, -0.5, 0.25, 2.0, 0.125]
        z = sum(w * (t - mean) for w, t in zip(weight, contexts, strict=True)) / math.sqrt(
            variance + 1e-5
        )
        got = gate([1.0, 2, 6, 0, 3], weight, levels=(2, 3), backend=backend)
        assert got == pytest.approx(1 / (1 + math.exp(-z)), rel=1e-13)

    def test_two_contexts(self, backend):
        # Two bins with means 1 and 3: normalized -a and +a with a = 1 / sqrt(1 + eps).
        a = 1 / math.sqrt(1 + 0.21)
        got = gate([0.0, 2, 2, 4], [0.5, 2.0], [0.1], levels=(2,), eps=0.21, backend=backend)
        assert got == pytest.approx(1 / (1 + math.exp(-(1.5 * a + 0.1))), rel=1e-14)

    def test_zero_variance(self, backend):
        # All contexts agree: every normalized context is 0, and the gate is sigmoid(bias).
        got = gate([7.0] * 4, [1.0, 2, 3, 4, 5, 6, 7], [0.3], levels=(1, 2, 4), backend=backend)
        assert got == pytest.approx(1 / (1 + math.exp(-0.3)), rel=1e-15)

    def test_gradient_by_hand(self, backend):
        # Two channels, one bin each, weight (w, -w): n = (-a, a) and z = -2 w a, with
        # u = (x1 - x0)/2 and a = u / sqrt(u^2 + eps).
        # dz/dx1 = -2 w da/du / 2 = -w eps / (u^2 + eps)^1.5, and dz/dx0 its negative.
        x0, x1, w, eps = 1.0, 1.5, 0.75, 0.5
        u = (x1 - x0) / 2
        z = -2 * w * u / math.sqrt(u * u + eps)
        g = 1 / (1 + math.exp(-z))
        dz = g * (1 - g)
        slope = -w * eps / (u * u + eps) ** 1.5
        x = torch.tensor([[x0, x1]], dtype=torch.float64, requires_grad=True)
        weight = torch.tensor([w, -w], dtype=torch.float64, requires_grad=True)
        ppcr_ext.ppcr_gate(x, weight, levels=(2,), eps=eps, backend=backend).sum().backward()
        n = u / math.sqrt(u * u + eps)
        torch.testing.assert_close(
            x.grad, x.new_tensor([[-dz * slope, dz * slope]]), rtol=1e-13, atol=0
        )
        torch.testing.assert_close(weight.grad, x.new_tensor([-dz * n, dz * n]), rtol=1e-13, atol=0)

    def test_add_relu(self, backend):
        # The gate is 1/2 at zero weights: y = relu(x/2 + r).
        x = torch.tensor([[2.0, -4.0]], requires_grad=True)
        r = torch.tensor([[1.0, 1.0]], requires_grad=True)
        y = ppcr_ext.ppcr_add_relu(x, r, torch.zeros(2), levels=(2,), backend=backend)
        assert y.tolist() == [[2.0, 0.0]]
        y.backward(torch.tensor([[3.0, 5.0]]))
        assert r.grad.tolist() == [[3.0, 0.0]]
        assert x.grad.tolist() == [[1.5, 0.0]]

    def test_what_is_rounded_to_zero_gets_no_gradient(self, backend):
        # 6e-8 is float16's smallest number, and x times a gate below 1/2 rounds to zero.
        x = torch.full((1, 4), 6e-8, dtype=torch.half, requires_grad=True)
        r = torch.zeros(1, 4, dtype=torch.half, requires_grad=True)
        weight, bias = torch.zeros(7), torch.tensor([-3.0])
        y = ppcr_ext.ppcr_add_relu(x, r, weight, bias, backend=backend)
        dx, dr = torch.autograd.grad(y, (x, r), torch.ones_like(y), create_graph=True)
        assert y.tolist() == dx.tolist() == dr.tolist() == [[0.0] * 4]

    @pytest.mark.parametrize("dtype", [torch.half, torch.float32, torch.float64])
    def test_eps_below_the_range(self, backend, dtype):
        # It counts as the smallest normal number: zero would divide by zero.
        x = torch.full((1, 4), 7.0, dtype=dtype, requires_grad=True)
        weight = torch.ones(7, dtype=torch.promote_types(dtype, torch.float32))
        gate = ppcr_ext.ppcr_gate(x, weight, eps=1e-310, backend=backend)
        assert gate.item() == 0.5
        (dx,) = torch.autograd.grad(gate.sum(), x)
        assert not dx.isnan().any()


def test_bins_follow_adaptive_average_pooling():
    for channels in range(1, 40):
        x = torch.randn(1, 1, channels, dtype=torch.float64)
        for level in range(1, channels + 1):
            means = [x[0, 0, b:e].mean() for b, e in reference.bins(channels, level)]
            torch.testing.assert_close(
                torch.stack(means), torch.nn.functional.adaptive_avg_pool1d(x, level)[0, 0]
            )


def test_affine_normalization_folds_into_weight_and_bias():
    """gamma and beta after the normalization are weight * gamma and bias + sum weight * beta: they
    need no parameters of their own."""
    torch.manual_seed(0)
    x = torch.randn(3, 8, 5, dtype=torch.float64)
    weight, gamma, beta = torch.randn(3, 7, dtype=torch.float64)
    bias = torch.randn(1, dtype=torch.float64)
    contexts = torch.stack(
        [x[:, b:e].mean(1) for k in (1, 2, 4) for b, e in reference.bins(8, k)], 2
    )
    normalized = torch.nn.functional.layer_norm(contexts, (7,), gamma, beta, 1e-5)
    expected = ((normalized * weight).sum(2) + bias).sigmoid()
    got = ppcr_ext.ppcr_gate(x, weight * gamma, bias + (weight * beta).sum())
    torch.testing.assert_close(got[:, 0], expected, rtol=1e-12, atol=0)
