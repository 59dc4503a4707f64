"""Builds the compiled parts of ppcr_ext, as far as this machine can, and says what was built and
why the rest was not.

Environment: PPCR_BUILD_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1, CXX.
Everything else about the package stands in pyproject.toml.
"""

import importlib
import json
import os
import re
import sys
import types
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if int(setuptools.__version__.split(".")[0]) < 77:  # it would say on a page what it cannot read
    needed = "77 or newer is needed: pip install 'setuptools>=77'"
    sys.exit(f"ppcr_ext: setuptools is {setuptools.__version__}, and {needed}")

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    NO_TORCH = None
except ImportError as error:
    remedy = "install it first and use --no-build-isolation"
    NO_TORCH = f"PyTorch cannot be imported at build time ({error}); {remedy}"

ROOT = Path(__file__).resolve().parent


# The recipes are modules of the package. They are imported under another name, without its
# __init__.py, which would import torch and load a library.
recipes = types.ModuleType("ppcr_ext_recipes")
recipes.__path__ = [str(ROOT / "ppcr_ext" / "_build")]
sys.modules[recipes.__name__] = recipes
recipe = importlib.import_module("ppcr_ext_recipes.cpu")
cuda_recipe = importlib.import_module("ppcr_ext_recipes.cuda")
readme = importlib.import_module("ppcr_ext_recipes.readme")

# Then the package is pure Python, and so is the tag of its wheel, which setuptools takes from the
# list of extensions.
PURE = NO_TORCH or recipe.why_no_compiler()


def cpu_extension():
    sources = [str(Path("csrc") / source) for source in recipe.CPU_SOURCES]
    return CppExtension(
        "ppcr_ext._cpu", sources, extra_compile_args=recipe.compiler_flags(), py_limited_api=True
    )


def record(folder, cpu, cuda):
    """Keeps what was built, and for each part that was not why, beside the library, and says it."""
    if cuda:  # then one from an earlier build does not go with this CPU library
        if recipe.cuda_wanted() == "1":
            sys.exit(f"ppcr_ext: PPCR_BUILD_CUDA=1, but the CUDA library cannot be built: {cuda}")
        (folder / cuda_recipe.LIBRARY).unlink(missing_ok=True)
    parts = {"cpu": cpu, "cuda": cuda}
    (folder / "_build.json").write_text(json.dumps(parts, indent=1) + "\n")
    for part, why_not in parts.items():
        state = f"not built: {why_not}" if why_not else "built"
        recipe.announce(f"ppcr_ext: {part.upper()} kernels: {state}")


class BuildPython(build_py):
    """Without a compiler the Python files are all there is."""

    def run(self):
        super().run()
        if PURE:
            record((ROOT if self.editable_mode else Path(self.build_lib)) / "ppcr_ext", PURE, PURE)


class Build(build_ext if NO_TORCH else BuildExtension):
    """Builds the CPU library, and the CUDA library where it is wanted and can be built."""

    def run(self):
        folder = Path(self.get_ext_fullpath("ppcr_ext._cpu")).parent
        if PURE:
            record(folder, PURE, PURE)
            return
        wanted = recipe.cuda_wanted()
        cuda = "PPCR_BUILD_CUDA=0" if wanted == "0" else cuda_recipe.why_not(torch.version.cuda)
        if cuda and wanted == "1":
            record(folder, None, cuda)
        if self.editable_mode:  # not a fresh folder every time: only what changed is compiled
            self.build_temp = str(ROOT / "build" / f"editable-{torch.__version__}")
        os.environ.setdefault("CXX", "c++")  # else what Python itself was built with would link
        files = len(recipe.CPU_SOURCES)
        recipe.announce(f"ppcr_ext: compiling the CPU kernels, {files} files: a minute or two")
        super().run()
        folder.mkdir(parents=True, exist_ok=True)
        if cuda is None:
            try:
                library, work = folder / cuda_recipe.LIBRARY, Path(self.build_temp) / "cuda"
                of_torch, version = Path(torch.__file__).parent, torch.version.cuda
                cuda_recipe.build(library, ROOT / "csrc", work, of_torch, version)
            except cuda_recipe.CannotBuild as error:
                cuda = str(error)
        record(folder, None, cuda)

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".abi3.so"


def description():
    """README.md without relative addresses. setuptools reads pyproject.toml after this file, and
    Python 3.10 has no parser for it."""
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"$', project, re.M)[1]
    repository = re.search(r'^Source = "(.+)"$', project, re.M)
    return readme.description(
        (ROOT / "README.md").read_text(), repository and repository[1], version
    )


SOURCES = ["*.h", "*.cpp", "*.cu", "*.cuh"]
folders = {
    f"ppcr_ext.{path.relative_to(ROOT).as_posix().replace('/', '.')}": str(path.relative_to(ROOT))
    for path in [ROOT / "csrc", *(ROOT / "csrc").glob("*/")]
    if path.is_dir()
}

setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    packages=["ppcr_ext", "ppcr_ext._build", "ppcr_ext._triton", *folders],
    package_dir={"ppcr_ext": "ppcr_ext", **folders},
    package_data={"ppcr_ext": ["py.typed"], **dict.fromkeys(folders, SOURCES)},
    ext_modules=[] if PURE else [cpu_extension()],
    cmdclass={"build_ext": Build, "build_py": BuildPython},
    options={} if PURE else {"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
