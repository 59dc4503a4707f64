"""docs/baseline_traffic.md: what torch.compile would launch on a GPU for the plain formulations."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "tools" / "baseline_traffic.py").exists():
    pytest.skip("tools/ is part of a checkout", allow_module_level=True)


def test_the_table_is_what_the_script_finds():
    """For one shape: the same lines with the table's PyTorch, and what they mean with any."""
    command = [sys.executable, str(ROOT / "tools" / "baseline_traffic.py"), "--only", "64x56"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    passes = {}
    for line in found:
        _, dtype, formulation, _, _, forward, _, _, backward, *_ = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        passes[formulation, dtype] = int(forward), int(backward)
    # x once for the pooling, or once a level; once more for the product; y written.
    # gy and x, gy again, dx.
    assert passes["pooled once", "float32"] == passes["pooled once", "float16"] == (3, 4)
    assert passes["level by level", "float32"] == passes["level by level", "float16"] == (5, 4)
    table = (ROOT / "docs" / "baseline_traffic.md").read_text()
    if f"PyTorch {torch.__version__}:" not in table:
        pytest.skip(f"the committed table is not of PyTorch {torch.__version__}")
    assert [line for line in table.splitlines() if line.startswith("| 64x56x56 ")] == found
