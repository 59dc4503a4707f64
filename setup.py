"""Builds the compiled parts of ppcr_ext, as far as this machine can, and says in a line what was built and why the rest was not.

Environment: PPCR_BUILD_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1, CXX.
Everything else about the package stands in pyproject.toml.
"""

import importlib
import json
import os
import sys
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    NO_TORCH = None
except ImportError as error:
    NO_TORCH = f"PyTorch cannot be imported at build time ({error}); install it first and use --no-build-isolation"

ROOT = Path(__file__).resolve().parent


# The recipes are modules of the package; under another name, without its __init__.py, which would import torch and load a library.
recipes = types.ModuleType("ppcr_ext_recipes")
recipes.__path__ = [str(ROOT / "ppcr_ext")]
sys.modules[recipes.__name__] = recipes
recipe = importlib.import_module("ppcr_ext_recipes._build")
cuda_recipe = importlib.import_module("ppcr_ext_recipes._cuda_build")


def cpu_extension():
    sources = [str(Path("csrc") / source) for source in recipe.CPU_SOURCES]
    if NO_TORCH:
        return Extension("ppcr_ext._cpu", sources)
    return CppExtension("ppcr_ext._cpu", sources, extra_compile_args=recipe.compiler_flags(), py_limited_api=True)


class Build(build_ext if NO_TORCH else BuildExtension):
    """Builds what can be built; a machine without a compiler gets the pure-Python package."""

    def run(self):
        wanted = recipe.cuda_wanted()
        cpu = NO_TORCH or recipe.why_no_compiler()
        cuda = cpu or ("PPCR_BUILD_CUDA=0" if wanted == "0" else cuda_recipe.why_not(torch.version.cuda))
        if cuda and wanted == "1":
            sys.exit(f"ppcr_ext: PPCR_BUILD_CUDA=1, but the CUDA library cannot be built: {cuda}")
        if cpu:
            self.extensions = []
        folder = Path(self.get_ext_fullpath("ppcr_ext._cpu")).parent
        folder.mkdir(parents=True, exist_ok=True)
        if self.extensions:
            super().run()
        if cuda is None:
            try:
                work = Path(self.build_temp) / "cuda"
                torch_folder = Path(torch.__file__).parent
                cuda_recipe.build(folder / "_cuda.abi3.so", ROOT / "csrc", work, torch_folder, torch.version.cuda)
            except cuda_recipe.CannotBuild as error:
                cuda = str(error)
                if wanted == "1":
                    sys.exit(f"ppcr_ext: PPCR_BUILD_CUDA=1, but the CUDA library cannot be built: {cuda}")
        if cuda:  # one from an earlier build does not go with the CPU library of this one
            (folder / "_cuda.abi3.so").unlink(missing_ok=True)
        record = {"cpu": cpu, "cuda": cuda}
        (folder / "_build.json").write_text(json.dumps(record, indent=1) + "\n")
        for part, why_not in record.items():
            print(f"ppcr_ext: {part.upper()} kernels: " + (f"not built: {why_not}" if why_not else "built"), file=sys.stderr)

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".abi3.so"


SOURCES = ["*.h", "*.cpp", "*.cu", "*.cuh"]
folders = {
    f"ppcr_ext.{path.relative_to(ROOT).as_posix().replace('/', '.')}": str(path.relative_to(ROOT))
    for path in [ROOT / "csrc", *(ROOT / "csrc").glob("*/")]
    if path.is_dir()
}

setup(
    packages=["ppcr_ext", *folders],
    package_dir={"ppcr_ext": "ppcr_ext", **folders},
    package_data={"ppcr_ext": ["py.typed"], **dict.fromkeys(folders, SOURCES)},
    ext_modules=[cpu_extension()],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
