"""One of the processes that torchrun starts for test_distributed.py: trains two steps and saves gradients and parameters."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ppcr_ext import PPCR


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.ppcr = PPCR(channels)

    def forward(self, x):
        return self.ppcr.add_relu(self.convolution(x), x)


def network():
    """Plain and fused layers; no batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), PPCR(8), Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).double()  # fmt: skip
    for module in model.modules():
        if isinstance(module, PPCR):
            nn.init.normal_(module.weight)
    return model


def train(model, rank, world, full):
    """Two steps on a rank's share of eight samples; full() makes a whole tensor of a parameter's or gradient's shards."""
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(8, 3, 7, 7, generator=generator, dtype=torch.float64), torch.arange(8) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x[rank::world]), target[rank::world])
        optimizer.zero_grad()
        loss.backward()
        found.append({name.removeprefix("module."): full(p.grad).clone() for name, p in model.named_parameters()})
        optimizer.step()
    found.append({name.removeprefix("module."): full(p.detach()).clone() for name, p in model.named_parameters()})
    return found


def main(out):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    sharded = network()
    mesh = init_device_mesh("cpu", (world,))
    for module in sharded:
        if isinstance(module, (PPCR, Block)):
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    found = {
        "ddp": train(DistributedDataParallel(network()), rank, world, lambda t: t),
        "fsdp": train(sharded, rank, world, lambda t: t.full_tensor()),
    }
    found["layers_sharded"] = [type(p).__name__ for p in sharded[1].parameters()]
    torch.save(found, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
