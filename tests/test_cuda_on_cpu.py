"""Every CUDA kernel, executed on the CPU, a fiber per CUDA thread.

Numbers are compared with float64, and bits between two schedules.
"""

import dataclasses
import itertools
import mmap

import pytest
import torch

pytest.importorskip("pybind11")

from cuda_on_cpu.cases import (
    ADD_RELU,
    AMPERE,
    DTYPES,
    GATE,
    HOPPER,
    KERNEL_COUNT,
    OPERATORS,
    PPCR,
    SMALL,
    STANDARD,
    Case,
    Tensors,
    as_numpy,
    check,
    forced_plan,
    kernels,
    same_bits,
)

from ppcr_ext import testing
from ppcr_ext.testing import LAYOUTS

pytestmark = pytest.mark.full

RESNET = ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7), (16, 32), (32, 16), (64, 8))

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_operator = pytest.mark.parametrize("operator", OPERATORS)
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=LAYOUTS)


def sparse(count: int) -> torch.Tensor:
    """float16 zeros of which only the pages that are written take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=torch.float16)


@both_layouts
@pytest.mark.parametrize("levels", [STANDARD, (1, 3)], ids=["standard", "any"])
@pytest.mark.parametrize(
    ("images", "pixels"), [(5, 2**23 + 64), (1, 2**25 + 64)], ids=["many_images", "one_image"]
)
def test_more_than_2_to_the_31_elements(images, pixels, levels, channels_last):
    """The first and the last blocks of tensors whose offsets leave 32 bits.

    They do so from image to image, or within one image.
    """
    channels, last = 64, 64
    # A cluster for every tile, of which the first and the last run.
    forced = "" if channels_last else f"clusters={2**30}"
    case = Case(
        "float16",
        images,
        channels,
        pixels,
        channels_last,
        levels=levels,
        only_blocks=16,
        forced=forced,
    )
    inputs = Tensors(Case("float16", 1, channels, last, channels_last, levels=levels)).inputs
    count = images * channels * pixels
    assert count > 2**31

    def window(storage: torch.Tensor) -> torch.Tensor:
        """The last pixels of the last image, [C, last]."""
        if channels_last:
            return storage.view(images * pixels, channels)[-last:].T
        return storage.view(images, channels, pixels)[-1, :, -last:]

    x, grad, y, dx = (sparse(count) for _ in range(4))
    window(x).copy_(inputs.x[0])
    window(grad).copy_(inputs.grad[0])
    assert inputs.bias is not None
    arrays = {"x": as_numpy(x), "weight": as_numpy(inputs.weight), "bias": as_numpy(inputs.bias)}
    parameters = {"dweight": as_numpy(torch.empty(sum(levels))), "dbias": as_numpy(torch.empty(1))}
    only_ends = {"forced": forced, "only_blocks": 16}
    kernels().run(case.fields(False), case.dtype, arrays | {"y": as_numpy(y)}, **only_ends)
    arrays |= parameters | {"grad": as_numpy(grad), "dx": as_numpy(dx)}
    kernels().run(case.fields(True), case.dtype, arrays, **only_ends)
    truth = testing.truth(inputs)
    for found, name in ((y, "y"), (dx, "dx")):
        assert truth.error(name, window(found)[None]) <= 7e-4


@both_layouts
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", RESNET, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_resnet_plans(shape, dtype, channels_last):
    """One whole image under the plan that a batch of 256 gets on an H200."""
    channels, side = shape
    batch = Case(dtype, 256, channels, side * side, channels_last)
    forward, backward = (forced_plan(batch.fields(way)) for way in (False, True))
    one = dataclasses.replace(batch, images=1, forced=backward, forced_forward=forward)
    check(one, seeds=(0,))


@pytest.mark.parametrize("device", [HOPPER, AMPERE, SMALL], ids=["sm_90", "sm_80", "sm_86"])
@pytest.mark.parametrize(
    "shape", [(1024, 14), (2048, 7)], ids=lambda shape: f"{shape[0]}x{shape[1]}"
)
def test_add_relu_at_full_depth(shape, device):
    """The deep stages, also where no cluster holds a tile and channels are read twice."""
    for dtype in ("float16", "bfloat16"):
        check(
            Case(
                dtype, 1, shape[0], shape[1] ** 2, operator=ADD_RELU, device=tuple(device.items())
            ),
            seeds=(0,),
        )


@every_operator
@both_layouts
@every_dtype
@pytest.mark.parametrize(
    ("channels", "pixels"),
    [(64, 49), (40, 64), (32, 196), (8, 1), (4, 3), (20, 25), (64, 2), (128, 56)],
    ids=lambda value: str(value),
)
def test_standard_levels(channels, pixels, dtype, channels_last, operator):
    check(Case(dtype, 2, channels, pixels, channels_last, operator))


@every_operator
@both_layouts
@every_dtype
@pytest.mark.parametrize(
    ("levels", "channels", "pixels"),
    [
        ((1, 2), 6, 16),
        ((1, 3, 5), 40, 49),
        ((2, 3), 7, 9),
        ((1, 2, 4), 30, 16),
        ((1, 2, 4, 8, 16, 32), 67, 12),
        ((64,), 64, 8),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_any_levels(levels, channels, pixels, dtype, channels_last, operator):
    """Unequal segments, overlapping bins, 64 contexts; more segments than a block has groups."""
    check(Case(dtype, 2, channels, pixels, channels_last, operator, levels))


# q, groups, cluster, vector, steps for 64 channels of 16x16 pixels, in elements of 16 bytes
FORCED = {
    "cluster 1": "groups=4,cluster=1",
    "cluster 2": "groups=2,cluster=2",
    "cluster 4": "groups=1,cluster=4",
    "cluster 8": "groups=1,cluster=8",
    "8 groups": "groups=8,cluster=1",
    "8 groups, cluster 2": "groups=8,cluster=2",
    "tail tile": "q=96,groups=4,cluster=1",
    "tail tile, cluster 2": "q=96,groups=2,cluster=2",
    "whole image": "q=256,groups=4",
    "single elements": "vector=1,q=37,groups=4",
    "single elements, whole image": "vector=1,q=32,groups=2,cluster=4",
    "one vector wide": "q=8,groups=4",
}


@every_operator
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("forced", FORCED.values(), ids=[name.replace(" ", "_") for name in FORCED])
def test_forced_plans(forced, dtype, operator):
    check(Case(dtype, 1, 64, 256, False, operator, forced=forced))


# Several tiles per cluster, more for some clusters than for others: for what is copied ahead, and
# for both barriers.
SEVERAL_TILES = {
    "whole images": (7, 49, "q=49,groups=4,cluster=1,clusters=3"),
    "whole images, cluster 4": (7, 49, "q=49,groups=1,cluster=4,clusters=2"),
    "whole images, cluster 8": (5, 49, "q=49,groups=2,cluster=8,clusters=1"),
    "tail tiles": (3, 112, "q=64,groups=4,cluster=1,clusters=2"),
    "tail tiles, cluster 2": (3, 112, "q=64,groups=2,cluster=2,clusters=2"),
    "single elements": (3, 30, "vector=1,q=13,groups=4,clusters=2"),
}


@every_operator
@every_dtype
@pytest.mark.parametrize("levels", [STANDARD, (1, 3, 7)], ids=["standard", "any"])
@pytest.mark.parametrize(
    "case", SEVERAL_TILES.values(), ids=[name.replace(" ", "_") for name in SEVERAL_TILES]
)
def test_several_tiles(case, levels, dtype, operator):
    images, pixels, forced = case
    vector = 16 // DTYPES[dtype].itemsize
    channels = 64 * vector  # every unit is whole vectors of straddling rows
    forced += "" if "vector" in forced or levels != STANDARD else f",vector={vector}"
    plan = check(Case(dtype, images, channels, pixels, False, operator, levels, forced=forced))
    assert plan["tiles"] > 2 * plan["partial_count"]


@pytest.mark.parametrize("operator", [PPCR, ADD_RELU])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_several_tiles_of_thirteen_steps(dtype, operator):
    vector = 16 // DTYPES[dtype].itemsize
    forced = f"q=49,groups=1,cluster=4,clusters=2,steps=13,vector={vector}"
    plan = check(Case(dtype, 5, 256 * vector, 49, False, operator, forced=forced))
    assert (
        plan["read_bytes"] + plan["written_bytes"]
        == (3 if operator == PPCR else 5) * plan["tensor_bytes"]
    )


@every_operator
@every_dtype
@pytest.mark.parametrize("levels", [STANDARD, (1, 3, 7)], ids=["standard", "any"])
def test_channels_beyond_the_registers(levels, dtype, operator):
    """Steps that are not cached, and (any levels) units beyond the first round, are read again."""
    check(Case(dtype, 3, 1200, 16, False, operator, levels, forced="groups=4,cluster=1,clusters=2"))


@every_operator
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_vectors_of_eight_bytes(dtype, operator):
    """14x14 images of 16-bit elements: rows of a multiple of 8 bytes, not of 16."""
    for levels in (STANDARD, (1, 2)):
        check(Case(dtype, 1, 128, 196, False, operator, levels, forced="vector=4,q=28"))


@pytest.mark.parametrize("operator", [PPCR, ADD_RELU])
@every_dtype
def test_lane_variants(dtype, operator):
    """Every compiled way to share a pixel among lanes, with a tail of lanes and of pixels."""
    vector = 16 // DTYPES[dtype].itemsize
    for index, (lanes, steps, pixels) in enumerate(kernels().lane_variants):
        if steps == 16 and dtype == "float64":
            continue
        full = lanes * steps * vector
        for channels in {full, max(4 * vector, full - 4 * vector)}:
            plan = check(
                Case(
                    dtype,
                    1,
                    channels,
                    4 * pixels + 3,
                    True,
                    operator,
                    forced=f"variant={index},warps=2",
                )
            )
            assert plan["method"] == "channels_last_registers"


@every_dtype
def test_lanes_of_the_gate_alone(dtype):
    """Both numbers of lanes, with tails of lanes, of channels and of pixels."""
    vector = 16 // DTYPES[dtype].itemsize
    for lanes, channels in ((8, 4), (8, 28), (32, 32), (32, 100), (32, 300)):
        plan = check(Case(dtype, 1, channels * vector, 103, True, GATE))
        assert (plan["method"], plan["variant"]) == ("channels_last_gate", lanes)
        forced = check(Case(dtype, 1, channels * vector, 9, True, GATE, forced="variant=8"))
        assert forced["variant"] == 8


@every_operator
@every_dtype
@pytest.mark.parametrize("levels", [STANDARD, (1, 3)], ids=["standard", "any"])
@pytest.mark.parametrize(
    ("channels", "pixels", "forced"),
    [(12, 700, ""), (100, 60, "q=16"), (2047, 9, "q=4"), (36, 40, "q=16,vector=1")],
)
def test_channels_last_in_shared_memory(channels, pixels, forced, levels, dtype, operator):
    """Several tiles in shared memory with a tail, of channels that are not whole vectors."""
    plan = check(Case(dtype, 1, channels, pixels, True, operator, levels, forced))
    if plan["method"] != "channels_last_registers":
        assert plan["staged"]
        assert plan["blocks"] > 1


@every_operator
@every_dtype
@pytest.mark.parametrize("levels", [STANDARD, (1, 3, 7)], ids=["standard", "any"])
def test_pixels_beyond_shared_memory(levels, dtype, operator):
    """On a device with 4 KB of it."""
    device = tuple((HOPPER | {"shared_bytes": 4096}).items())
    plan = check(Case(dtype, 2, 2100, 3, True, operator, levels, device=device))
    assert not plan["staged"]


@both_layouts
@pytest.mark.parametrize("operator", [PPCR, GATE])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_odd_addresses(dtype, operator, channels_last):
    """A tensor that starts one element into its storage is read element by element."""
    plan = check(Case(dtype, 2, 32, 64, channels_last, operator, offset=1))
    assert plan["vector"] == 1


@both_layouts
@pytest.mark.parametrize(("own", "bias"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_parameters(dtype, own, bias, channels_last):
    """weight and bias of x's type or wider, and no bias."""
    check(Case(dtype, 2, 32, 36, channels_last, own_parameters=own, bias=bias))


@both_layouts
@pytest.mark.parametrize("levels", [STANDARD, (1, 3)], ids=["standard", "any"])
def test_nan_and_infinity_stay_in_their_pixel(levels, channels_last):
    case = Case("float32", 1, 32, 64, channels_last, levels=levels)
    clean, dirty = Tensors(case), Tensors(case)
    dirty.inputs.x[0, 5, 7] = float("nan")
    dirty.inputs.x[0, 30, 50] = float("inf")
    others = [pixel for pixel in range(64) if pixel not in (7, 50)]
    for backward, name in ((False, "y"), (True, "dx")):
        (expected, _), (found, _) = clean.run(backward), dirty.run(backward)
        assert same_bits(expected[name][:, :, others], found[name][:, :, others])
        assert found[name][0, :, 7].isnan().all()
        assert found[name][0, :, 50].isnan().any()


def test_constant_pixels_have_finite_results():
    """Variance 0, as behind a zero-initialized normalization layer."""
    for dtype, channels_last in itertools.product(DTYPES, (False, True)):
        tensors = Tensors(Case(dtype, 1, 32, 16, channels_last))
        tensors.inputs.x.zero_()
        outputs, _ = tensors.run_both()
        assert all(bool(output.isfinite().all()) for output in outputs.values())


def test_finishing_sums_in_a_fixed_order():
    """Many tiles: the same bits whatever the order of blocks and threads."""
    check(Case("float32", 3, 8, 5000, True), seeds=(0, 3, 11))
    check(Case("float32", 3, 8, 5000, False, forced=f"q=32,clusters={2**30}"), seeds=(0, 3, 11))
    plan = check(Case("float32", 1, 8, 8300, False, forced=f"q=4,clusters={2**30}"))
    assert plan["partial_count"] > 4 * 512  # each thread adds several to each of its sums


def test_every_compiled_kernel_was_executed(request):
    """Comes last: as many variants as nvcc compiles (test_cuda_build.py counts those)."""
    if request.config.getoption("keyword") or any(
        "::" in argument for argument in request.config.args
    ):
        pytest.skip("only where the whole file ran")
    assert len(kernels().statistics()["launches"]) == KERNEL_COUNT
