"""One of the processes that torchrun starts for test_distributed.py: trains two steps and saves
gradients and parameters, and runs the operators on DTensors."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import ppcr_ext
from ppcr_ext import PPCR


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.ppcr = PPCR(channels)

    def forward(self, x):
        return self.ppcr(self.convolution(x), x)


def network():
    """Plain and fused layers; no batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), PPCR(8), Block(8), Block(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).double()  # fmt: skip
    for module in model.modules():
        if isinstance(module, PPCR):
            nn.init.normal_(module.weight)
    return model


def train(model, rank, world, full):
    """Two steps on a rank's share of eight samples.

    full() makes a whole tensor of the shards of a parameter or gradient.
    """
    generator = torch.Generator().manual_seed(1)
    x, target = (
        torch.randn(8, 3, 7, 7, generator=generator, dtype=torch.float64),
        torch.arange(8) % 5,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x[rank::world]), target[rank::world])
        optimizer.zero_grad()
        loss.backward()
        found.append(
            {
                name.removeprefix("module."): full(p.grad).clone()
                for name, p in model.named_parameters()
            }
        )
        optimizer.step()
    found.append(
        {
            name.removeprefix("module."): full(p.detach()).clone()
            for name, p in model.named_parameters()
        }
    )
    return found


def inputs():
    """x and residual, weight and bias: the batch and the width do not divide by two."""
    generator = torch.Generator().manual_seed(2)
    sizes = (5, 8, 6, 3), (5, 8, 6, 3), (7,), (1,)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def evaluate(name, x, residual, weight, bias):
    """Output and gradients of an operator."""
    arguments = [x, residual, weight, bias] if name == "ppcr_add_relu" else [x, weight, bias]
    y = getattr(ppcr_ext, name)(*arguments)
    return [y, *torch.autograd.grad((y * y).sum(), [t for t in arguments if t is not None])]


def placed(t):
    """``split 0``, ``sum`` or ``whole``."""
    (place,) = t.placements
    return f"split {place.dim}" if place.is_shard() else "sum" if place.is_partial() else "whole"


PLACES = {
    "batch": Shard(0),
    "height": Shard(2),
    "width": Shard(3),
    "channels": Shard(1),
    "whole": Replicate(),
}


def on_dtensors(mesh):
    """For every operator and way to split x: results put together, their placements, and the
    communication that forward took."""
    found = {}
    for name in ("ppcr", "ppcr_gate", "ppcr_add_relu"):
        for bias in (True, False):
            for where, place in PLACES.items():
                x, residual, weight, b = inputs()
                tensors = [distribute_tensor(t, mesh, [place]) for t in (x, residual)]
                tensors += [distribute_tensor(t, mesh, [Replicate()]) for t in (weight, b)]
                arguments = [t.requires_grad_() for t in tensors[: 3 + bias]] + [None] * (not bias)
                results = evaluate(name, *arguments)
                with CommDebugMode() as communication, torch.no_grad():
                    maps = arguments[: 1 + (name == "ppcr_add_relu")]
                    getattr(ppcr_ext, name)(*maps, *arguments[2:])
                found[name, bias, where] = {
                    "values": [t.full_tensor() for t in results],
                    "places": [placed(t) for t in results],
                    "communication": communication.get_total_counts(),
                }
    layer = PPCR(8, dtype=torch.float64)
    nn.init.ones_(layer.weight)
    layer, x = distribute_module(layer, mesh), distribute_tensor(inputs()[0], mesh, [Shard(0)])
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, x)
    assert isinstance(compiled, DTensor)
    found["compiled"] = [compiled.full_tensor().detach(), layer(x, x).full_tensor().detach()]
    return found


def main(out):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    sharded = network()
    mesh = init_device_mesh("cpu", (world,))
    for module in reversed(list(sharded.modules())):  # the layer within a block by itself, too
        if isinstance(module, (PPCR, Block)):
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    found = {
        "ddp": train(DistributedDataParallel(network()), rank, world, lambda t: t),
        "fsdp": train(sharded, rank, world, lambda t: t.full_tensor()),
    }
    parameters = [*sharded[1].parameters(), *sharded[2].ppcr.parameters()]
    found["layers_sharded"] = [type(p).__name__ for p in parameters]
    found["dtensor"] = on_dtensors(mesh)
    torch.save(found, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
