"""``python -m benchmarks``: errors and times of every usable backend beside plain PyTorch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from . import (
    end_to_end,
    files,
    inputs,
    operators,
    picture,
    pictures,
    report,
    scaling,
    session,
    suite,
    timing,
)

DESCRIPTION = """\
Errors and times of every usable backend of ppcr_ext, beside plain PyTorch. SUITE is one of

  retina      real inputs, on the CPU: the fundus photograph that scikit-image bundles goes through a torchvision ResNet-50
              (random weights of a fixed seed, PPCR in every residual block), and what the last PPCR layer of each of the
              four stages sees is measured
  shapes      the same for random inputs of eight shapes
  operators   ppcr, gate and add_relu, forward, backward and both, in shares of the bandwidth of a copy measured in the
              same rounds; beside plain PyTorch, eager and compiled, and beside SE, ECA and the spatial gate of CBAM
  scaling     time against pixels, channels, levels and batch
  end-to-end  training and inference of whole networks (--help after it lists its own options)

In retina and shapes the floor is what any such layer must cost at the least: x * 0.5, and for forward+backward x * 0.5
plus x + gy. Plain PyTorch comes in three formulations (the finest bins pooled once and the coarser ones from them; level
by level; as a matrix product). Every result is compared with a float64 evaluation before it is timed. All columns of an
input are timed in every round, in a new random order; the figures are medians over the rounds.

In operators and scaling inputs rotate through more memory than a cache holds, and times on a GPU are CUDA events. Ctrl-C
keeps what was measured, --resume goes on from there.

Writes SUITE.csv, SUITE.json and pictures to the folder of --out.
Exit status: 0; 1 if an error exceeds its tolerance, or --compare found something slower; 130 if interrupted."""

COMPILE_ROUNDS = 60  # about what compiling a case costs, in rounds: only the progress bar asks
SUITES = ("retina", "shapes", "operators", "scaling", "end-to-end")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "suite",
        nargs="?",
        default="retina",
        choices=SUITES,
        metavar="SUITE",
        help="what to measure (retina)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=30,
        metavar="N",
        help="timing rounds per input, at most (30)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="threads (torch's default; 2 in shapes and operators)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), metavar="DIR", help="where files go (results)"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out the columns under torch.compile"
    )
    parser.add_argument(
        "--dtypes",
        type=_dtypes,
        default="float32,float16,bfloat16",
        metavar="LIST",
        help="retina and shapes: dtypes, with commas; float32 is always timed, the others forward and fused only (%(default)s)",
    )
    more = parser.add_argument_group("operators and scaling")
    more.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (%(default)s)",
    )
    more.add_argument(
        "--quick", action="store_true", help="few inputs and rounds, for a first impression"
    )
    more.add_argument(
        "--all",
        action="store_true",
        help="operators: all shapes, dtypes and modes; hours on a CPU (default on cuda)",
    )
    more.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of an interrupted run of the same commit and device",
    )
    more.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="say what got slower than in that file"
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _dtypes(text: str) -> list[torch.dtype]:
    known = {suite.dtype_name(d): d for d in (torch.float32, torch.float16, torch.bfloat16)}
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown dtype {unknown[0]!r}; known are {', '.join(known)}"
        )
    return [
        torch.float32,
        *(known[name] for name in dict.fromkeys(text.split(",")) if name != "float32"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["end-to-end"]:
        return end_to_end.run(argv[1:])
    args = parse(argv)
    return suites(args) if args.suite in ("operators", "scaling") else layers(args)


def suites(args: argparse.Namespace) -> int:
    """The operators or the scaling suite."""
    device, threads = torch.device(args.device), args.threads or min(2, torch.get_num_threads())
    if args.suite == "operators":
        everything = args.all or (device.type == "cuda" and not args.quick)
        groups = operators.groups(
            device,
            everything=everything,
            quick=args.quick,
            compiling=not args.no_compile,
            threads=threads,
        )
        limit, draw = 0.5 if args.quick else 2.0, pictures.draw_operators
    else:
        counts = (
            [1]
            if device.type == "cuda"
            else [args.threads]
            if args.threads
            else sorted({1, threads})
        )
        groups = scaling.groups(device, quick=args.quick, threads=counts)
        limit, draw = 0.2 if args.quick else 0.8, pictures.draw_scaling
    return session.run(
        args.suite,
        groups,
        device,
        args.out,
        rounds=args.rounds,
        limit=limit,
        draw=draw,
        quick=args.quick,
        resuming=args.resume,
        against=args.compare,
    )


def layers(args: argparse.Namespace) -> int:
    """The retina or the shapes suite."""
    start = time.perf_counter()
    if args.threads or args.suite == "shapes":
        torch.set_num_threads(args.threads or 2)
    timing.keep_memory()
    backends, reasons = suite.usable_backends()
    about = {
        "command": args.suite,
        "rounds": args.rounds,
        "environment": files.environment(),
    }
    env = about["environment"]
    print(f"{env['cpu']} ({env['capability']}), {env['threads']} threads, torch {env['torch']}")
    print(f"backends: {', '.join(backends)}")
    for name, reason in reasons.items():
        print(f"  {name}: {reason}")

    if args.suite == "retina":
        print(
            "feature maps: retina photograph, ResNet-50 with PPCR, 8 views of 224x224 ...",
            flush=True,
        )
    cases = inputs.sweep_cases() if args.suite == "shapes" else inputs.retina_cases()
    result = run(cases, backends, args)

    print("\n" + report.full_report(result))
    where = args.out / about["command"]
    written = files.write(result, where, about)
    title = f"PPCR on {env['cpu']}, {env['threads']} threads, float32, torch {env['torch']}: time over that of x * 0.5"
    written.append(picture.draw(result, where.with_suffix(".png"), title))
    print(f"\nwrote {', '.join(map(str, written))} in {time.perf_counter() - start:.0f} s")

    failed = [row for row in result.errors if not row.ok]
    for row in failed:
        where = f"{row.backend}, {row.dtype}, {row.case}, {row.layout}"
        print(f"error above tolerance: {where}: {row.errors} (may be: {row.limits})")
    return 1 if failed else 0


def run(
    cases: Sequence[inputs.Case], backends: Sequence[str], args: argparse.Namespace
) -> suite.Result:
    """All cases in both layouts, with a progress bar."""
    compiled = [name for name in backends if name != suite.REFERENCE] + ["pooled once"]
    if args.suite == "shapes":
        compiled.append("level by level")
    columns = suite.columns(
        backends, compiled=[] if args.no_compile else compiled, dtypes=args.dtypes
    )
    preparing = 2 if args.no_compile else COMPILE_ROUNDS
    result = suite.Result()
    total = len(cases) * len(inputs.LAYOUTS) * (preparing + args.rounds)
    form = "{l_bar}{bar}| {elapsed}, {remaining} left"
    with tqdm(total=total, bar_format=form, smoothing=0, file=sys.stderr) as bar:
        for case in cases:
            result.errors += suite.check_case(case, backends, args.dtypes)
            for layout in inputs.LAYOUTS:
                bar.set_description(f"{case.name}, {layout}")
                first = True

                def tick() -> None:
                    nonlocal first
                    bar.update(1 + preparing * first)
                    first = False

                result.rows += suite.time_case(case, layout, columns, args.rounds, tick)
    return result


if __name__ == "__main__":
    sys.exit(main())
