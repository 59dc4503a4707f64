"""Pyramid Pixel Context Recalibration (PPCR) as one fused PyTorch layer."""

import warnings
from importlib import metadata

import torch
from torch.jit._trace import TracerWarning

from . import _dispatch, _native, _registration, testing
from ._dispatch import available_backends, backends
from ._registration import build
from .functional import ppcr, ppcr_add_relu, ppcr_gate
from .module import PPCR
from .networks import insert_ppcr
from .recording import record_gates

__all__ = [
    "PPCR",
    "available_backends",
    "backends",
    "build",
    "insert_ppcr",
    "ppcr",
    "ppcr_add_relu",
    "ppcr_gate",
    "record_gates",
    "testing",
]


# A checkout that was never installed has none.
__version__ = next((d.version for d in metadata.distributions(name="ppcr_ext")), "0+unknown")
# torch.jit.trace need not follow the checks of shapes; PyTorch silences its own modules as well.
warnings.filterwarnings("ignore", category=TracerWarning, module=r"ppcr_ext\.")
_registration.load()
if _native.is_pure_build():  # pip shows nothing of what an installation says
    _dispatch.warn_once(torch.device("cpu"), "reference", stacklevel=3)
