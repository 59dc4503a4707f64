"""``python -m benchmarks``: errors and times of every usable backend beside plain PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import cases, runner

DESCRIPTION = """\
Errors and times of every usable backend of ppcr_ext, beside plain PyTorch. SUITE is one of

  retina      real inputs: the fundus photograph that scikit-image bundles goes through a
              torchvision ResNet-50 (random weights of a fixed seed, PPCR in every residual block),
              and what the last PPCR layer of each of the four stages sees is measured
  shapes      the same for random inputs of eight shapes
  operators   ppcr, gate and add_relu, forward, backward and both; beside plain PyTorch, eager and
              compiled, and beside SE, ECA and the spatial gate of CBAM
  scaling     time against pixels, channels, levels and batch
  end-to-end  training and inference of whole networks: torchvision's ResNets without attention,
              with PPCR fused into their residual blocks, unfused and in plain PyTorch, SE and CBAM

Every result is compared with a float64 evaluation before it is timed. docs/benchmarks.md says what
the baselines and lower bounds are, and how time is taken. In operators and scaling inputs rotate
through more memory than a cache holds. Ctrl-C keeps what was measured, --resume goes on from there.

Writes SUITE.csv, SUITE.json and pictures to the folder of --out. Exit status: 0; 1 if an error
exceeds its tolerance, or --compare found something slower; 130 if interrupted."""


# fmt: off
def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=DESCRIPTION, formatter_class=form)
    add = parser.add_argument
    add("suite", nargs="?", default="retina", choices=cases.SUITES, metavar="SUITE",
        help="what to measure (retina)")
    add("--rounds", type=_positive, metavar="N",
        help="timing rounds per input, at most (30; 15 in end-to-end)")
    add("--threads", type=_positive, metavar="N",
        help="threads (2; torch's default in retina; 1 and 2 in scaling)")
    add("--out", type=Path, default=Path("results"), metavar="DIR",
        help="where files go (%(default)s)")
    add("--no-compile", action="store_true", help="leave out what runs under torch.compile")
    add("--device", help="cpu or cuda (cuda where there is one; cpu in retina and shapes)")
    add("--quick", action="store_true", help="few inputs and rounds, for a first impression")
    add("--resume", action="store_true",
        help="keep the rows of an interrupted run of the same commit and device")
    add("--compare", type=Path, metavar="OLD.json", help="say what got slower than in that file")
    add("--all", action="store_true",
        help="operators and end-to-end: everything; hours on a CPU (default on cuda)")
    add("--dtypes", type=_dtypes, default="float32,float16,bfloat16", metavar="LIST",
        help="retina and shapes: dtypes, with commas, float32 always among them (%(default)s)")
    add("--network", choices=list(cases.NETWORKS), help="end-to-end: one of them, eagerly")
    return parser.parse_args(argv)
# fmt: on


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _dtypes(text: str) -> list[str]:
    known, given = cases.DTYPES[:3], text.split(",")
    if unknown := [name for name in given if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown dtype {unknown[0]!r}; known: {', '.join(known)}")
    return list(dict.fromkeys(["float32", *given]))


def cases_of(args: argparse.Namespace, device: torch.device) -> list[cases.Case]:
    quick, cuda = args.quick, device.type == "cuda"
    threads = args.threads or min(2, torch.get_num_threads())
    options: dict[str, Any] = {"quick": quick, "threads": threads}
    if args.suite == "operators":
        return cases.operators(device, everything=args.all or (cuda and not quick), **options)
    if args.suite == "scaling":
        options["threads"] = [1] if cuda else sorted({args.threads or 1, threads})
        return cases.scaling(device, **options)
    if args.suite == "end-to-end":
        everything = args.all or cuda
        return cases.end_to_end(device, everything=everything, network=args.network, **options)
    if args.suite == "retina":
        from .networks import retina_inputs  # with torchvision, which layers do not need

        print("feature maps: photograph, ResNet-50 with PPCR, 8 views of 224x224 ...", flush=True)
        options["threads"] = args.threads or torch.get_num_threads()
        options["stages"] = retina_inputs()
    return cases.maps(args.suite, args.dtypes, **options)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    maps = args.suite in ("retina", "shapes")
    default = "cuda" if torch.cuda.is_available() and not maps else "cpu"
    device = torch.device(args.device or default)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    rounds = args.rounds or (15 if args.suite == "end-to-end" else 30)
    rounds = min(rounds, 7) if args.quick and args.suite == "end-to-end" else rounds
    limits = {"operators": (2.0, 0.5), "scaling": (0.8, 0.2)}  # seconds a case, the second: quick
    limit = limits.get(args.suite, (None, None))[args.quick]
    found = cases_of(args, device)
    if args.no_compile:  # a compiled network is a case of its own
        found = [replace(case, modes=()) for case in found if not (case.variants and case.modes)]
    settings = {name: getattr(args, name) for name in ("quick", "network", "dtypes", "no_compile")}
    settings |= {"rounds": rounds, "seconds_per_case": limit}
    name, files = args.suite.replace("-", "_"), {"resuming": args.resume, "against": args.compare}
    return runner.run(name, found, device, args.out, settings, **files)


if __name__ == "__main__":
    sys.exit(main())
