"""Images with labels, split into training, validation and test.

Bundled digits, or a local file or folder of a known kind.
"""

import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from files import BadInput
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2


@dataclass
class Data:
    """All three splits hold pairs of a float32 image ``[C, H, W]`` and its class."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    channels: int
    classes: int

    def missing_classes(self) -> dict[str, list[int]]:
        """The classes of which a split has no image, for every split that lacks one."""
        splits = {"training": self.train, "validation": self.validation, "test": self.test}
        missing = {
            name: sorted(set(range(self.classes)) - set(_labels(split)))
            for name, split in splits.items()
        }
        return {name: classes for name, classes in missing.items() if classes}


def _labels(dataset: Any) -> list[int]:
    if isinstance(dataset, Augmented):
        return _labels(dataset.dataset)
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1].tolist()
    return list(dataset.targets)  # ImageFolder


def load(source: str, augment: bool, size: int) -> Data:
    """``digits``, a MedMNIST ``.npz``, or a folder: the Python version of CIFAR-10 or CIFAR-100, or
    train/, val/ and test/ (ImageFolder).

    ``augment`` crops and flips training images at random. ``size`` is the side to which the images
    of an ImageFolder are brought.
    """
    if source == "digits":
        return _digits(augment)
    path = Path(source)
    if not path.exists():
        raise BadInput(f"--data: {source} is neither digits nor an existing file or folder")
    if path.is_file():
        return _medmnist(path, augment)
    if (path / "data_batch_1").exists():
        batches = [f"data_batch_{i}" for i in range(1, 6)]
        return _cifar(path, [*batches, "test_batch"], "labels", augment)
    if (path / "train").is_file():
        return _cifar(path, ["train", "test"], "fine_labels", augment)
    if (path / "train").is_dir():
        return _image_folder(path, augment, size)
    raise BadInput(f"--data: {source} holds neither batches of CIFAR nor a folder train")


class Augmented(Dataset[Any]):
    """Another dataset with random crops and flips."""

    def __init__(self, dataset: Dataset[Any], side: int) -> None:
        self.dataset = dataset
        self.transform = v2.Compose(
            [v2.RandomCrop(side, padding=max(1, side // 8)), v2.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.dataset[index]
        return self.transform(image), label


def _from_arrays(parts: list[tuple[np.ndarray, np.ndarray]], augment: bool) -> Data:
    """Data of three pairs of uint8 images ``[N, H, W, C]`` and labels ``[N]``.

    All are normalized by the statistics of the training images.
    """
    for split, (images, labels) in zip(("training", "validation", "test"), parts, strict=True):
        if not len(images) or len(images) != len(labels):
            count = f"{len(images)} {split} images and {len(labels)} labels"
            raise BadInput(f"--data: there are {count}")
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            got = f"{labels.dtype} from {labels.min()} on"
            raise BadInput(f"--data: the {split} labels must be whole numbers from 0 on, got {got}")
    classes = int(max(labels.max() for _, labels in parts)) + 1
    training = parts[0][0].astype(np.float32) / 255
    mean, std = training.mean((0, 1, 2)), training.std((0, 1, 2)) + 1e-6
    sets: list[Dataset[Any]] = []
    for images, labels in parts:
        normalized = (images.astype(np.float32) / 255 - mean) / std
        images_chw = torch.from_numpy(normalized).permute(0, 3, 1, 2).contiguous()
        sets.append(TensorDataset(images_chw, torch.from_numpy(labels.astype(np.int64))))
    if augment:
        sets[0] = Augmented(sets[0], training.shape[1])
    return Data(*sets, channels=training.shape[-1], classes=classes)


def _digits(augment: bool) -> Data:
    """The 1797 handwritten digits of 8 x 8 pixels that scikit-learn bundles.

    1000 of them train, 297 validate and 500 test.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = (digits.images[..., None] * (255 / 16)).astype(np.uint8), digits.target
    rest, test, rest_labels, test_labels = train_test_split(
        images, labels, test_size=500, stratify=labels, random_state=0
    )
    train, val, train_labels, val_labels = train_test_split(
        rest, rest_labels, test_size=297, stratify=rest_labels, random_state=0
    )
    return _from_arrays([(train, train_labels), (val, val_labels), (test, test_labels)], augment)


def _medmnist(path: Path, augment: bool) -> Data:
    """A MedMNIST file.

    Its arrays are {train,val,test}_images ``[N, H, W(, C)]`` uint8 and {train,val,test}_labels
    ``[N, 1]``.
    """
    parts = []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for split in ("train", "val", "test"):
                images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
                parts.append((images[..., None] if images.ndim == 3 else images, labels))
    except KeyError as error:
        raise BadInput(
            f"--data: {path} has no array {error.args[0]!r}, which MedMNIST files have"
        ) from None
    except (
        OSError,
        EOFError,
        ValueError,
        AttributeError,
        zipfile.BadZipFile,
        zipfile.zlib.error,
    ) as error:  # type: ignore[attr-defined]
        raise BadInput(f"--data: {path} is no whole .npz file: {error}") from None
    checked = []
    for images, labels in parts:
        if images.ndim != 4 or images.dtype != np.uint8:
            got = f"images {images.dtype} {images.shape} with labels {labels.shape}"
            raise BadInput(f"--data: {path} holds {got}: no 2-D MedMNIST")
        if labels.ndim == 2 and labels.shape[1] != 1:
            got = f"{labels.shape[1]} labels an image"
            raise BadInput(f"--data: {path} has {got}; this example classifies into one class each")
        checked.append((images, labels.reshape(-1)))
    return _from_arrays(checked, augment)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles what CIFAR's batches hold, NumPy arrays in a dict, and nothing that runs code."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            if name == "_reconstruct":
                return np._core.multiarray._reconstruct  # numpy.core before NumPy 2
            return getattr(np, name)
        self.refuse(module, name)

    def refuse(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which batches of CIFAR do not")


def _cifar(path: Path, names: Sequence[str], key: str, augment: bool) -> Data:
    """CIFAR-10 or CIFAR-100, Python version; ``names`` are its files, the last one the test images.

    The last tenth of the training images validates.
    """
    images, labels = [], []
    for name in names:
        try:
            with open(path / name, "rb") as file:
                batch = _ArraysOnly(file, encoding="latin1").load()
            images.append(
                np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            )
            labels.append(np.asarray(batch[key]))
        except (
            OSError,
            EOFError,
            KeyError,
            TypeError,
            ValueError,
            pickle.UnpicklingError,
        ) as error:
            raise BadInput(f"--data: {path / name} is no batch of CIFAR: {error}") from None
    training, training_labels = np.concatenate(images[:-1]), np.concatenate(labels[:-1])
    held_out = max(1, len(training) // 10)
    return _from_arrays(
        [
            (training[:-held_out], training_labels[:-held_out]),
            (training[-held_out:], training_labels[-held_out:]),
            (images[-1], labels[-1]),
        ],
        augment,
    )


def _image_folder(path: Path, augment: bool, size: int) -> Data:
    """One folder a class in train/, val/ and test/; without test/, val/ serves for both."""
    from torchvision.datasets import ImageFolder

    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # ImageNet's, as usual
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((size, size), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            normalize,
        ]
    )
    try:
        train, validation = (
            ImageFolder(str(path / split), transform) for split in ("train", "val")
        )
        test = (
            ImageFolder(str(path / "test"), transform) if (path / "test").is_dir() else validation
        )
    except (OSError, ValueError) as error:
        raise BadInput(f"--data: {path} is no ImageFolder: {error}") from None
    if not train.classes == validation.classes == test.classes:
        raise BadInput(f"--data: {path}: train, val and test hold different classes")
    return Data(
        Augmented(train, size) if augment else train,
        validation,
        test,
        channels=3,
        classes=len(train.classes),
    )
