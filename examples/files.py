"""Files that are either whole or not there, and how the examples refuse bad input."""

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


class BadInput(Exception):
    """What the user gave cannot be used; the message is the one line that they see."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers bad arguments with one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def run(main: Callable[[], None]) -> None:
    """Runs a program; :class:`BadInput` becomes exit status 2 and one line on stderr.

    The first of several processes alone says it.
    """
    try:
        main()
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr
            )
        sys.exit(2)


def make_folder(folder: Path) -> None:
    """Makes a folder, or says why nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"cannot write into {folder}: {error.strerror or error}") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` make a file beside ``path``, then renames it.

    Readers see the old file or the new one, never a part.
    """
    temporary = path.with_name(
        f".{path.stem}.part{path.suffix}"
    )  # the suffix says which format to write
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    def write(part: Path) -> None:
        with open(part, "w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)

    write_atomically(path, write)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda part: part.write_text(text))
