"""Runs a command on emulated devices: ``python -m cuda_host "9.0 9.0" python script.py``, in tests/."""

import os
import sys

from .build import environment

if __name__ == "__main__":
    os.execvpe(sys.argv[2], sys.argv[2:], environment(sys.argv[1]))
