"""insert_ppcr into networks that share modules, that resist, or that something holds already."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_insert import Network
from torch import nn

from ppcr_ext import PPCR, insert_ppcr

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def state(model):
    """What an insertion may change: class, attributes and children of every module, by name."""
    return [
        (name, type(module), module.training, sorted(vars(module)), list(module._modules.items()))
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def resnet():
    models = pytest.importorskip("torchvision.models.resnet")
    return models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=5)


def by_two_names(order):
    r = resnet()
    parts = {"r": r, "f": nn.Sequential(*list(r.children())[:-1])}
    return nn.ModuleDict({name: parts[name] for name in order})


@pytest.mark.full
class TestShared:
    @pytest.mark.parametrize("order", ["rf", "fr"])
    @pytest.mark.parametrize("stages", [None, (2, 4)])
    def test_a_block_that_two_names_reach_gets_one_layer(self, order, stages):
        torch.manual_seed(0)
        model = by_two_names(order)
        plain = copy.deepcopy(model)
        names = insert_ppcr(model, stages=stages, init_gate=0.9)
        first = {"r": "layer{}.0.ppcr", "f": "{}.0.ppcr"}[order[0]]
        stages, offset = stages or (1, 2, 3, 4), 0 if order[0] == "r" else 3
        assert names == [f"{order[0]}." + first.format(stage + offset) for stage in stages]
        assert names.renamed_keys == {}
        assert set(plain.state_dict()) < set(model.state_dict())
        for i in range(1, 5):
            assert model["r"].get_submodule(f"layer{i}.0") is model["f"][i + 3][0]
        model.eval()
        assert torch.equal(model["r"](X), model["r"].fc(model["f"](X).flatten(1)))

    def test_tied_blocks(self):
        model = resnet()
        model.layer2 = nn.Sequential(model.layer2[0], model.layer3[0], model.layer3[0])
        with torch.no_grad():
            model.layer3[0].conv1 = nn.Conv2d(128, 128, 3, padding=1)
            model.layer3[0].conv2 = nn.Conv2d(128, 128, 3, padding=1)
            model.layer3[0].bn1, model.layer3[0].bn2 = nn.BatchNorm2d(128), nn.BatchNorm2d(128)
            model.layer3[0].downsample = None
        assert len(insert_ppcr(model)) == 4
        assert sum("ppcr.weight" in key for key in model.state_dict()) == 6


class TestSharedNamed:
    def network(self):
        torch.manual_seed(0)
        shared = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        other = nn.Sequential(shared[0], nn.ReLU())
        return nn.ModuleDict({"one": shared, "two": shared, "three": other})

    @pytest.mark.parametrize("modules", [["one.1"], ["two.1"], ["one.1", "two.1"]])
    def test_a_named_module_in_a_shared_parent(self, modules):
        model = self.network()
        before = list(model.state_dict())
        names = insert_ppcr(model, modules=modules)
        assert names == ["one.1.1"]
        assert model["one"] is model["two"]
        assert [type(m) for m in model["one"][1]] == [nn.BatchNorm2d, PPCR]
        after = [key for key in model.state_dict() if not key.startswith(("one.1.1", "two.1.1"))]
        assert [names.renamed_keys.get(key, key) for key in before] == after
        assert names.renamed_keys["two.1.running_mean"] == "two.1.0.running_mean"

    @pytest.mark.parametrize("name", ["one.0", "three.0"])
    def test_a_module_with_two_parents(self, name):
        model = self.network()
        before = list(model.state_dict())
        names = insert_ppcr(model, modules=[name])
        assert names == ["one.0.1"]
        assert model["one"][0] is model["three"][0]
        after = [key for key in model.state_dict() if ".0.1." not in key]
        assert [names.renamed_keys.get(key, key) for key in before] == after
        assert names.renamed_keys["three.0.weight"] == "three.0.0.weight"
        x = X[:, :, :5, :5]
        assert torch.equal(model["three"](x), model["three"][0][1](model["three"][0][0](x)).relu())

    def test_different_channels_for_one_module(self):
        model = self.network()
        before = state(model)
        with pytest.raises(ValueError, match=r"gives one.1 and two.1, .* different channels"):
            insert_ppcr(model, modules={"one.1": 8, "two.1": 4})
        assert state(model) == before


class Resists(nn.Sequential):
    """Refuses to be changed, at its second change."""

    def __setattr__(self, name, value):
        if isinstance(value, nn.Module) and name == "1":
            raise KeyboardInterrupt("in the middle")
        super().__setattr__(name, value)


class TestAtomic:
    def test_a_parent_that_refuses(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), Resists(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)))
        before = state(model)
        with pytest.raises(KeyboardInterrupt, match="in the middle"):
            insert_ppcr(model, modules=["0", "1.0", "1.1"])
        assert state(model) == before

    def test_a_state_dict_that_fails(self):
        model = Network()

        def fail(*arguments):
            raise OSError("no state")

        model.body.register_state_dict_post_hook(fail)
        before = state(model)
        with pytest.raises(OSError, match="no state"):
            insert_ppcr(model, modules=["stem"])
        assert state(model) == before

    @pytest.mark.full
    @pytest.mark.parametrize("library", ["torchvision", "timm", "monai"])
    @pytest.mark.parametrize("fuse", [True, False])
    def test_a_failure_after_some_blocks(self, library, fuse, monkeypatch):
        """Whatever the reason: here the third layer cannot be registered."""
        pytest.importorskip("timm")
        pytest.importorskip("monai")
        from hosts import HOSTS

        kind = "basic 3d" if library == "monai" else "resnext"
        model = HOSTS[f"{library} {kind}"].build()
        before, seen = state(model), []

        def refuse(module, name, submodule):
            if isinstance(submodule, PPCR):
                seen.append(name)
                if len(seen) == 3:
                    raise MemoryError

        handle = nn.modules.module.register_module_module_registration_hook(refuse)
        try:
            with pytest.raises(MemoryError):
                insert_ppcr(model, fuse=fuse)
        finally:
            handle.remove()
        assert len(seen) == 3
        assert state(model) == before
        assert len(insert_ppcr(model, fuse=fuse)) == 4

    def test_a_state_dict_hook_that_drops_keys(self):
        """Keys that no module answers for stay as they are."""
        model = Network()

        def drop(module, state, prefix, metadata):
            del state["groups.weight"]

        model.register_state_dict_post_hook(drop)
        renamed = insert_ppcr(model, modules=["stem"]).renamed_keys
        assert renamed == {f"stem.{p}": f"stem.0.{p}" for p in ("weight", "bias")}


def test_what_is_frozen_stays_frozen():
    model = Network()
    model.body[0][1].eval()
    insert_ppcr(model, modules={"body": 16})
    assert model.body.training
    assert not model.body[0][0][1].training


@pytest.mark.full
def test_a_block_with_another_activation_is_not_fused():
    model = resnet()
    model.layer2[0].relu = nn.SiLU()
    before = state(model)
    with pytest.raises(ValueError, match=r"layer2.0 cannot be fused: its activation is SiLU"):
        insert_ppcr(model)
    assert state(model) == before
    insert_ppcr(model, fuse=False)
    assert sum(isinstance(module, nn.SiLU) for module in model.modules()) == 1


def test_numpy_channels_and_stages():
    model = nn.Sequential(nn.BatchNorm2d(np.int64(8)), nn.Conv2d(8, 8, 3))
    insert_ppcr(model, modules=["0"])
    insert_ppcr(model, modules={"1": np.int32(8)})
    assert [type(m.channels) for m in model.modules() if isinstance(m, PPCR)] == [int, int]
    with pytest.raises(ValueError, match=r"no residual block"):
        insert_ppcr(model, stages=(np.int64(3),))


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fully_sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def fsdp1(model, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def tensor_parallel(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    return distribute_module(model, init_device_mesh("cpu", (1,)))


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


HOLDERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "fully_shard": fully_sharded,
    "FullyShardedDataParallel": fsdp1,
    "FullyShardedDataParallel ": lambda model: fsdp1(model).module,
    "FullyShardedDataParallel  ": lambda model: fsdp1(model, use_orig_params=True).module,
    "DTensor": tensor_parallel,
    "DTensor ": lambda model: next(fully_sharded(model).children()),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "torch.compile ": compiled_in_place,
    "ScriptModule": lambda model: torch.jit.trace(model, torch.randn(2, 3, 9, 9)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_networks_that_are_held_already(holder, inside, process_group):
    """Refused with the remedy, also as a part of what is plain; then the remedy is taken."""
    held = HOLDERS[holder](Network())
    model = nn.ModuleDict({"part": held}) if inside else held
    before = state(model)
    name = holder.rstrip()
    with pytest.raises(ValueError, match=rf"is held by {name} already, .* call insert_ppcr on"):
        insert_ppcr(model, modules=["part.stem" if inside else "stem"])
    assert state(model) == before
    plain = Network()
    insert_ppcr(plain, modules=["stem"])
    if holder == name and name != "DTensor":
        HOLDERS[holder](plain)(torch.randn(2, 3, 9, 9))


def test_offloaded_networks(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(Network(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"stem is held by accelerate's offloading already"):
        insert_ppcr(model, modules=["stem"])
    model = Network()
    insert_ppcr(model, modules=["stem"])
    expected = model(X)
    torch.testing.assert_close(accelerate.cpu_offload(model, torch.device("cpu"))(X), expected)
