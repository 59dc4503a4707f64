"""Runs a script or a module on emulated devices, in a process that build.environment() is for:
``python -m cuda_host -m pytest tests/test_gpu.py``, ``python -m cuda_host script.py``."""

import runpy
import sys

from cuda_host import plugin

if __name__ == "__main__":
    plugin.install()
    del sys.argv[0]
    sys.path[0] = ""
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
