"""Every tensor an allocation of its own, which ends at a page that faults: nobody writes beyond it.

The values start as NaN: nobody reads what was not written.
"""

import ctypes

import pytest
import torch
from cuda_host import hooks
from emulated import both_layouts, case, check, every_operator, forward

from ppcr_ext import testing


@every_operator
@both_layouts
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        ((5, 64, 7, 7), (1, 2, 4)),
        ((3, 512, 6, 6), (1, 2, 4)),
        ((2, 40, 5, 5), (1, 3, 5)),
        ((3, 20, 33), (2, 3)),
        ((7, 64), (64,)),
    ],
    ids=str,
)
def test_bounds(shape, levels, operator, dtype, layout):
    check(case(operator, shape, levels=levels, dtype=dtype, layout=layout))


@every_operator
@pytest.mark.parametrize("own", [False, True], ids=["float32_parameters", "half_parameters"])
def test_parameters(operator, own):
    kind = torch.float16 if own else torch.float32
    check(case(operator, (4, 64, 9, 9), dtype=torch.float16, parameter_dtype=kind))
    check(case(operator, (4, 64, 9, 9), dtype=torch.float16, parameter_dtype=kind, bias=False))


def test_the_guard_sees_an_overrun():
    """The runtime itself: a byte beyond a tensor's end is found at the next kernel."""
    c = case()
    small = torch.zeros(3, device="cuda:0")
    beyond = ctypes.c_char.from_address(small.data_ptr() + 12)
    before, beyond.value = beyond.value, b"\0"
    y = forward(c)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        torch.cuda.synchronize()
    beyond.value = before
    hooks.forget()
    del y  # not before: to free it waits for the kernel, and fails with it
