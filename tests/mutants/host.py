"""Faults between Python and the CUDA kernels, seen by the tests on the emulated CUDA runtime.

``tests`` names the file that should see a fault; without it all of them run. Of the CUDA library
only what the fault changes is compiled: the entry, or for launches the file of one dtype, as PTX,
which the emulated driver takes for code.
"""

import shutil
import subprocess
from pathlib import Path

from cuda_host import build

from . import Mutant, first_failure

ENTRY, LAUNCH = "cuda/ppcr_cuda.cpp", "cuda/launch_dtype.cuh"
OPERATORS, PLAN = "operators.h", "cuda/plan.h"
CALLS, DEVICES, MEMORY, _ = build.TESTS
START = "check_launch(cudaLaunchKernelEx(&with.configuration, kernel, arguments), launch);"

MUTANTS = (
    # devices
    Mutant(
        "no device guard",
        ENTRY,
        "DeviceGuard(device_of(input))",
        "DeviceGuard(torch::stable::accelerator::getCurrentDeviceIndex())",
        tests=DEVICES,
        sample=True,
    ),
    Mutant(
        "device missing from the plan's key",
        ENTRY,
        "device,\n              levels",
        "0,\n              levels",
        tests=DEVICES,
    ),
    Mutant(
        "plans of one dtype for all of its size",
        ENTRY,
        "&kernels, w.alignment",
        "w.element_size == 2 ? &kHalf : &kernels, w.alignment",
        tests=DEVICES,
    ),
    Mutant(
        "limits of the first device for all",
        ENTRY,
        "limits_of(device);",
        "limits_of(0);",
        tests=DEVICES,
    ),
    Mutant(
        "early launches where the device knows none",
        PLAN,
        "plan.early = device.max_cluster > 1;",
        "plan.early = true;",
        tests=DEVICES,
    ),
    Mutant(
        "devices of weight and x unchecked",
        "checks.h",
        "  check_same_device(name, t, x);\n",
        "",
        after="inline void check_parameter",
        tests=DEVICES,
    ),
    # streams
    Mutant(
        "null stream",
        ENTRY,
        "static_cast<cudaStream_t>(stream));",
        "nullptr);",
        tests=CALLS,
        sample=True,
    ),
    Mutant(
        "stream of another device",
        ENTRY,
        "get_current_cuda_stream(device, &stream)",
        "get_current_cuda_stream(0, &stream)",
        tests=DEVICES,
    ),
    Mutant(
        "hidden synchronize",
        ENTRY,
        "static_cast<cudaStream_t>(stream));",
        "static_cast<cudaStream_t>(stream));\n"
        "    cudaStreamSynchronize(static_cast<cudaStream_t>(stream));",
        tests=CALLS,
    ),
    # memory
    Mutant(
        "partials too small",
        ENTRY,
        "{pooling.contexts + 1, plan.partial_count}",
        "{pooling.contexts, plan.partial_count}",
        tests=MEMORY,
    ),
    Mutant(
        "dweight too small",
        ENTRY,
        "new_vector(weight, weight.size(0))",
        "new_vector(weight, weight.size(0) - 1)",
        tests=MEMORY,
    ),
    Mutant(
        "more partials than blocks write",
        ENTRY,
        "{pooling.contexts + 1, plan.partial_count}",
        "{(pooling.contexts + 1) * 400, plan.partial_count}",
        tests=CALLS,
    ),
    # launches
    Mutant(
        "swallowed launch error",
        LAUNCH,
        START,
        "(void)cudaLaunchKernelEx(&with.configuration, kernel, arguments);",
        tests=CALLS,
    ),
    Mutant(
        "error of another library blamed on a launch",
        LAUNCH,
        START,
        "(void)cudaLaunchKernelEx(&with.configuration, kernel, arguments);\n"
        "    check_launch(cudaGetLastError(), launch);",
        tests=CALLS,
    ),
    Mutant(
        "error of a refused launch left behind",
        LAUNCH,
        "  cudaGetLastError();  //",
        "  //",
        tests=CALLS,
    ),
    Mutant(
        "missing attribute of shared memory",
        LAUNCH,
        "launch.shared_bytes <= 48 << 10",
        "launch.shared_bytes <= 1 << 30",
        tests=CALLS,
    ),
    Mutant(
        "shared memory of one plan allowed",
        LAUNCH,
        "cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_limit)",
        "cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes)",
        tests=DEVICES,
    ),
    Mutant(
        "missing attribute of clusters",
        LAUNCH,
        "if (launch.cluster > 1) {\n      cudaLaunchAttribute",
        "if (launch.cluster > 99) {\n      cudaLaunchAttribute",
        tests=DEVICES,
    ),
    Mutant(
        "early launches not asked for",
        LAUNCH,
        "if (launch.early)",
        "if (launch.early && launch.cluster > 99)",
        tests=DEVICES,
    ),
    Mutant(
        "finishing kernel asked about, too",
        LAUNCH,
        "if (asked) return;",
        "",
        tests=DEVICES,
    ),
    Mutant(
        "swallowed error of a question",
        LAUNCH,
        "check_launch(cudaOccupancyMaxActiveClusters(&found, kernel, &with.configuration), "
        "launch);",
        "(void)cudaOccupancyMaxActiveClusters(&found, kernel, &with.configuration);",
        tests=CALLS,
    ),
    # layouts
    Mutant(
        "gradient not brought to x's layout",
        OPERATORS,
        "to_layout_of(grad, call.x)",
        "grad",
        after="Pass::kBackward, x, weight, bias, levels, eps);\n"
        '    check_like_x("grad", grad, x);\n    return',
        tests=CALLS,
    ),
    Mutant(
        "residual not brought to x's layout",
        OPERATORS,
        "to_layout_of(residual, call.x)",
        "residual",
        tests=CALLS,
    ),
    Mutant("y not brought to x's layout", OPERATORS, "to_layout_of(y, call.x)", "y", tests=CALLS),
)


def compile_changed(folder: Path, mutant: Mutant | None) -> None:
    """The CUDA library of a copy: what the mutant changes, with the sound objects of the rest."""
    sound, recipe = build.library().parent / "nvcc", build.recipe
    objects = {name: sound / f"{name}.o" for name in (*recipe.KERNEL_SOURCES, recipe.ENTRY_SOURCE)}
    if mutant is not None:
        if mutant.file == LAUNCH:
            source = "launch_float.cu"
            flags = [*recipe._kernel_command(recipe.find_nvcc(), "compute_90"), "-Xcicc", "-O0"]
        else:
            source = recipe.ENTRY_SOURCE
            flags = [*recipe._entry_command(recipe.find_nvcc(), "sm_90", build.TORCH), "-O0"]
        # First, since of an inline function that several files hold the linker takes the first one.
        del objects[source]
        objects = {source: folder / f"{source}.o", **objects}
        command = [*flags, "-c", folder / "csrc" / "cuda" / source, "-o", objects[source]]
        subprocess.run(command, check=True, capture_output=True)
    libraries = [
        build.TORCH / "lib" / f"lib{name}.so" for name in ("torch_cuda", "torch_cpu", "c10")
    ]
    build.link(folder / "ppcr_ext" / "_cuda.abi3.so", *objects.values(), *libraries, build.RUNTIME)


def caught_by(mutant: Mutant | None, folder: Path) -> str | None:
    """The first test that fails in a copy with the fault, or how the tests died; else None."""
    shutil.copy(build.ROOT / "ppcr_ext" / "_cpu.abi3.so", folder / "ppcr_ext")
    build.build()
    compile_changed(folder, mutant)
    for file in [mutant.tests] if mutant else (CALLS, DEVICES, MEMORY):
        status, output, errors = build.run_tests(folder, file, "-x", "--tb=no")
        if failure := first_failure(status, output + errors):
            return failure if "::" in failure else f"{file}: {failure}"
    return None
