"""Two processes through torchrun, gloo on the CPU: DistributedDataParallel and FSDP2 train as one
process does, DTensors are split."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("distributed")
    root = Path(distributed_worker.__file__).parent.parent
    built = (
        root / "ppcr_ext" / "__init__.py"
    )  # where the tests run from the checkout, its package is the one under test
    path = [str(root)] if Path(sys.modules["ppcr_ext"].__file__) == built else []
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         distributed_worker.__file__, str(out)],
        env=os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
        },
        check=True,
        timeout=120,
    )  # fmt: skip
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_and_parameters_are_those_of_one_process(found, kind):
    """Gradients of two steps with momentum, and the parameters after them, where each process has
    seen half of the samples."""
    expected = distributed_worker.train(distributed_worker.network(), 0, 1, lambda t: t)
    assert [len(part) for part in expected] == [14, 14, 14]
    assert all(
        values.abs().max() > 0
        for name, values in expected[0].items()
        if "ppcr" in name or name.startswith("1.")
    )
    for rank in found:
        for got, part in zip(rank[kind], expected, strict=True):
            assert got.keys() == part.keys()
            for name in part:
                torch.testing.assert_close(got[name], part[name], rtol=1e-11, atol=1e-13)


def test_the_parameters_were_sharded(found):
    assert found[0]["layers_sharded"] == ["DTensor"] * 4


@pytest.mark.parametrize("where", distributed_worker.PLACES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["ppcr", "ppcr_gate", "ppcr_add_relu"])
def test_dtensors_stay_split_along_batch_and_space(found, name, bias, where):
    """Each process computes its part and sends nothing; parameters' gradients are sums.

    Split channels are gathered.
    """
    tensors = [t.requires_grad_() for t in distributed_worker.inputs()]
    expected = distributed_worker.evaluate(name, *tensors[:3], tensors[3] if bias else None)
    place = {"batch": "split 0", "height": "split 2", "width": "split 3"}.get(where, "whole")
    maps = 3 if name == "ppcr_add_relu" else 2
    for rank in found:
        got = rank["dtensor"][name, bias, where]
        for value, e in zip(got["values"], expected, strict=True):
            torch.testing.assert_close(value, e.detach(), rtol=1e-11, atol=1e-12)
        total = "whole" if place == "whole" else "sum"
        assert got["places"] == [place] * maps + [total] * (1 + bias)
        assert got["communication"] == (maps - 1 if where == "channels" else 0)


def test_dtensors_in_a_compiled_layer(found):
    assert torch.equal(*found[0]["dtensor"]["compiled"])
