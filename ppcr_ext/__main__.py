"""``python -m ppcr_ext``: versions, backends with reasons, CPU capability, compiled CUDA architectures."""

import platform

import torch

import ppcr_ext
from ppcr_ext import _native


def main() -> None:
    print(f"ppcr_ext         {ppcr_ext.__version__}")
    print(f"PyTorch          {torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    print(f"Python           {platform.python_version()}, {platform.platform()}")
    print(f"CPU library      {_native.library() or 'none'}")
    print(
        f"CPU capability   {_native.cpu_capability() or 'none'} (PyTorch's: {torch.backends.cpu.get_cpu_capability()})"
    )
    print(f"CUDA archs       {_native.cuda_architectures() or 'none compiled'}")
    print(
        f"CUDA device      {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}"
    )
    print("backends, best first")
    for name, state in ppcr_ext.backends().items():
        print(f"  {name:<14} {state}")
    print(f"available        {', '.join(ppcr_ext.available_backends())}")


if __name__ == "__main__":
    main()
