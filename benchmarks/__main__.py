"""Errors and times of every usable backend of ppcr_ext, beside plain PyTorch. SUITE is one of

  retina      what the layers of a ResNet-50 see of a fundus photograph, at its four stages
  shapes      random inputs of eight shapes
  operators   ppcr, gate and add_relu, forward and backward; also beside SE, ECA and CBAM
  scaling     time against pixels, channels, levels and batch
  end-to-end  training and inference of whole networks, with attention layers and without

docs/benchmarks.md says how. Exit status: 0; 1 if an error exceeds its tolerance, or --compare found
something slower; 130 if interrupted, with the files of what was measured.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import cases, runner

# Rounds, and seconds after which a case ends, with --quick the second of them.
ROUNDS = {"end-to-end": (15, 7)}
SECONDS = {"operators": (2.0, 0.5), "scaling": (0.8, 0.2)}


# fmt: off
def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("suite", nargs="?", default="retina", choices=cases.SUITES, metavar="SUITE",
        help="what to measure (retina)")
    add("--rounds", type=int, metavar="N",
        help="timing rounds per input, at most (30; 15 in end-to-end; with --quick 10 and 7)")
    add("--threads", type=int, metavar="N",
        help="threads (torch's default; in scaling also one)")
    add("--out", type=Path, default=Path("results"), metavar="DIR",
        help="where files go (%(default)s)")
    add("--no-compile", action="store_true", help="leave out what runs under torch.compile")
    add("--device", help="cpu or cuda (cuda where there is one; cpu in retina and shapes)")
    add("--quick", action="store_true", help="few inputs and rounds, for a first impression")
    add("--resume", action="store_true",
        help="keep the rows of an interrupted run of the same commit and device")
    add("--compare", type=Path, metavar="OLD.json", help="say what got slower than in that file")
    args = parser.parse_args(argv)
    if any(number is not None and number < 1 for number in (args.rounds, args.threads)):
        parser.error("--rounds and --threads must be above 0")
    return args
# fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    maps = args.suite in ("retina", "shapes")
    default = "cuda" if torch.cuda.is_available() and not maps else "cpu"
    device = torch.device(args.device or default)
    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"quick": args.quick, "threads": threads}
    if args.suite == "scaling":
        options["threads"] = [1] if device.type == "cuda" else sorted({args.threads or 1, threads})
    if args.suite == "retina":
        from .networks import retina_inputs  # with torchvision, which layers do not need

        print("feature maps: photograph, ResNet-50 with PPCR, 8 views of 224x224 ...", flush=True)
        options["stages"] = retina_inputs(device)
    found = cases.SUITES[args.suite](device, **options)
    if args.no_compile:  # a compiled network is a case of its own
        found = [replace(c, compiled=()) for c in found if not (c.variants and c.compiled)]
    settings = {name: getattr(args, name) for name in ("quick", "no_compile")}
    settings["rounds"] = args.rounds or ROUNDS.get(args.suite, (30, 10))[args.quick]
    settings["seconds_per_case"] = SECONDS.get(args.suite, (None, None))[args.quick]
    name, files = args.suite.replace("-", "_"), {"resuming": args.resume, "against": args.compare}
    return runner.run(name, found, device, args.out, settings, **files)


if __name__ == "__main__":
    sys.exit(main())
