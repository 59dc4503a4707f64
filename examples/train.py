"""Trains a classifier with PPCR or another attention layer.

It writes metrics, a picture and checkpoints:

    python examples/train.py --out results/digits     # digits, a small network, a minute
    python examples/train.py --data bloodmnist.npz --model timm/resnet18 --out results/blood
    torchrun --nproc-per-node=2 examples/train.py --parallel fsdp --out results/two  # two processes

A run that was stopped goes on with ``--resume``, to the same numbers as if it had never been.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import files
import torch
import torch.distributed as dist
from data import Data, load
from files import BadInput
from models import ATTENTION, build
from report import COLUMNS, draw, metrics
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

# What a checkpoint must share with the run that goes on from it.
IDENTITY = (
    "data",
    "model",
    "attention",
    "batch",
    "lr",
    "weight_decay",
    "epochs",
    "seed",
    "amp",
    "augment",
    "image_size",
)

POSITIVE = ("epochs", "batch", "lr", "image_size", "stop_after")
NOT_NEGATIVE = ("weight_decay", "workers", "seed")


def parser(description: str) -> files.Parser:
    """Takes all options that say how a network is trained; examples/compare.py has them as well."""
    parser = files.Parser(description=description)
    parser.add_argument(
        "--data",
        default="digits",
        help="digits, a MedMNIST .npz, a CIFAR folder or an ImageFolder",
    )
    parser.add_argument(
        "--model",
        default="small",
        help="small, small-resnet18, either with a width (small-resnet18/16), "
        "torchvision/NAME or timm/NAME (residual networks)",
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="images a step, over all processes")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--amp", choices=("none", "bfloat16", "float16"), default="none")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--augment", action="store_true", help="random crops and flips")
    parser.add_argument(
        "--image-size", type=int, default=224, help="side of the images of an ImageFolder"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun")
    return parser


def check(found: Any) -> Any:
    """The options, none of them out of its range."""
    for name, value in vars(found).items():
        option = f"--{name.replace('_', '-')}"
        if name in POSITIVE and value is not None and not 0 < value < math.inf:
            raise BadInput(f"{option} must be positive and finite, got {value}")
        if name in NOT_NEGATIVE and not 0 <= value < math.inf:
            raise BadInput(f"{option} must be 0 or more and finite, got {value}")
    return found


def arguments() -> Any:
    own = parser("Trains a classifier with PPCR or another attention layer.")
    own.add_argument("--attention", choices=ATTENTION, default="ppcr")
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--out", type=Path, default=Path("results/train"))
    own.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    own.add_argument("--stop-after", type=int, help="stop after this epoch, to go on later")
    found = check(own.parse_args())
    if found.seed >= 2**32:
        raise BadInput(f"--seed must be below 2^32, got {found.seed}")
    return found


def read_checkpoint(path: Path, option: str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["identity"], state["epoch"]
    except FileNotFoundError:
        raise BadInput(f"{option}: there is no checkpoint {path}") from None
    except Exception as error:  # torch.load raises many kinds
        raise BadInput(
            f"{option}: {path} is no whole checkpoint of this program ({type(error).__name__})"
        ) from None
    return dict(state)


class Trainer:
    """A network with what trains it, on one process or one of several."""

    def __init__(self, options: Any, data: Data) -> None:
        self.options, self.data = options, data
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        cuda = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if cuda
            else torch.device("cpu")
        )
        if options.batch % self.world:
            raise BadInput(f"--batch {options.batch} is not divisible by {self.world} processes")
        torch.manual_seed(options.seed)  # every process builds the same network
        model = build(options.model, options.attention, data.channels, data.classes).to(self.device)
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if options.compile:
            model.compile()
        self.model = model
        if dist.is_initialized() and options.parallel == "fsdp":
            fully_shard(model, mesh=init_device_mesh(self.device.type, (self.world,)))
        elif dist.is_initialized():
            self.model = DistributedDataParallel(model, [self.device.index] if cuda else None)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            options.lr,
            momentum=0.9,
            weight_decay=options.weight_decay,
            nesterov=True,
        )
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            data.train, self.world, self.rank, seed=options.seed, drop_last=True
        )
        self.batches = self._loader(data.train, self.sampler)
        if len(self.batches) == 0:  # it takes whole batches only
            there = f"the {len(data.train)} training images"
            raise BadInput(f"--batch {options.batch} is more than {there}")
        steps = options.epochs * len(self.batches)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, options.lr, total_steps=steps + 1, pct_start=0.2
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "float16")
        self.rows: list[dict[str, Any]] = []

    def _loader(self, dataset: Dataset[Any], sampler: Any = None) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            self.options.batch // self.world,
            sampler=sampler,
            num_workers=self.options.workers,
            drop_last=sampler is not None,
        )

    def _forward(self, images: Tensor) -> Tensor:
        if self.options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = getattr(torch, self.options.amp, None)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            logits: Tensor = self.model(images.to(self.device))
        return logits.float()

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of the optimizer; the loss."""
        try:
            logits = self._forward(images)
        except ValueError as error:  # of normalization layers: one pixel is a single value
            few = f"--batch: {len(images)} images a process are too few"
            raise BadInput(f"{few} for --model {self.options.model}: {error}") from None
        loss = nn.functional.cross_entropy(logits, labels.to(self.device))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def epoch(self, index: int, quiet: bool = False) -> float:
        """One pass over the training images; the mean loss."""
        torch.manual_seed(
            self.options.seed + 1000 * (index + 1) + self.rank
        )  # of augmentation: no state to save
        self.sampler.set_epoch(index)
        self.model.train()
        total = torch.zeros((), device=self.device)
        bar = tqdm(
            self.batches,
            f"epoch {index + 1}/{self.options.epochs}",
            leave=False,
            disable=None if self.rank == 0 and not quiet else True,
        )
        for images, labels in bar:
            total += self.step(images, labels)
            self.schedule.step()
        if self.world > 1:
            dist.all_reduce(total)
        return float(total) / self.world / len(self.batches)

    @torch.no_grad()
    def evaluate(self, dataset: Dataset[Any]) -> dict[str, float]:
        """Every process looks at all images, so that none is counted twice."""
        self.model.eval()
        logits, labels = zip(
            *((self._forward(images).cpu(), labels) for images, labels in self._loader(dataset)),
            strict=True,
        )
        return metrics(torch.cat(logits), torch.cat(labels), self.data.classes)

    def save(self, path: Path, epoch: int) -> None:
        """The whole state in one file, whatever the number of processes."""
        model, optimizer = get_state_dict(
            self.model,
            self.optimizer,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True),
        )
        state = {
            "epoch": epoch,
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rows": self.rows,
            "identity": {name: getattr(self.options, name) for name in IDENTITY},
        }
        if self.rank == 0:
            files.write_atomically(path, functools.partial(torch.save, state))

    def load(self, path: Path) -> int:
        """Takes up a checkpoint; the epochs it has behind it."""
        state = read_checkpoint(path, "--resume")
        identity, epoch = state["identity"], state["epoch"]
        for name in IDENTITY:
            if identity.get(name) != getattr(self.options, name):
                option = f"--{name.replace('_', '-')}"
                raise BadInput(f"--resume: {path} was made with {option} {identity.get(name)}")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.rows = state["rows"]
        return int(epoch)


def train(
    options: Any,
    data: Data | None = None,
    quiet: bool = False,
    done: Callable[[int], object] = lambda epochs: None,
) -> None:
    """One run. ``done`` is called with the number of epochs that are newly behind it."""
    data = data or load(options.data, options.augment, options.image_size)
    trainer = Trainer(options, data)
    checkpoint: Path = options.out / "checkpoint.pt"
    start = trainer.load(checkpoint) if options.resume else 0
    if options.stop_after is not None and options.stop_after <= start:
        behind = f"{checkpoint} has {start} epochs behind it"
        raise BadInput(f"--stop-after {options.stop_after}: {behind}")
    if not options.resume and checkpoint.exists():
        raise BadInput(f"{checkpoint} exists: pass --resume to go on from it, or another --out")
    if trainer.rank == 0:
        files.make_folder(options.out)

    def say(line: str) -> None:
        if trainer.rank == 0 and not quiet:
            print(line, flush=True)

    def write_metrics() -> None:
        if trainer.rank == 0:
            files.write_csv(options.out / "metrics.csv", trainer.rows, COLUMNS)
            draw(options.out / "curves.png", trainer.rows, f"{options.model}, {options.attention}")

    if start:
        write_metrics()  # the last run may have been stopped between its checkpoint and its tables
        done(start)
    for index in range(start, min(options.epochs, options.stop_after or options.epochs)):
        began = time.perf_counter()
        loss = trainer.epoch(index, quiet)
        row = {
            "epoch": index + 1,
            "train_loss": loss,
            **trainer.evaluate(data.validation),
            "seconds": time.perf_counter() - began,
        }
        trainer.rows.append(row)
        trainer.save(checkpoint, index + 1)
        write_metrics()
        done(1)
        say(f"epoch {index + 1}: train loss {loss:.3f}, validation accuracy {row['accuracy']:.4f}")
    if len(trainer.rows) == options.epochs:
        result = trainer.evaluate(data.test)
        if trainer.rank == 0:
            files.write_csv(options.out / "test.csv", [result], COLUMNS[2:-1])
        say("test: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))


@contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun has started, if it has."""
    torch.backends.cudnn.deterministic = True
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    options = arguments()
    with processes():
        train(options)


if __name__ == "__main__":
    files.run(main)
