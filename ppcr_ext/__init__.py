"""Pyramid Pixel Context Recalibration (PPCR) as one fused PyTorch layer."""

import re
import warnings
from importlib import metadata
from pathlib import Path

from torch.jit._trace import TracerWarning

from . import _sharding, native, testing, triton_ops
from .backends import available_backends, backends, warn_once
from .functional import ppcr, ppcr_add_relu, ppcr_gate
from .interpret import record_gates
from .module import PPCR
from .native import build
from .networks import insert_ppcr

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


def _version() -> str:
    """The version stands in pyproject.toml alone; a checkout that was never installed reads it there."""
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if pyproject.is_file():
        found = re.search(r'^name = "ppcr_ext"\nversion = "(.+)"$', pyproject.read_text(), re.M)
        if found:
            return found[1]
    return metadata.version("ppcr_ext")


__version__ = _version()
# torch.jit.trace need not follow the checks of shapes; PyTorch silences its own modules as well.
warnings.filterwarnings("ignore", category=TracerWarning, module=r"ppcr_ext\.")
native.load()
triton_ops.register()
_sharding.register()
if native.is_pure_build():  # pip shows nothing of what an installation says
    warn_once("cpu", "reference", stacklevel=3)
