"""Small faults for tools/mutate.py, which plants one at a time in a copy of the sources."""

import dataclasses
import re
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault: ``text`` becomes ``replacement`` in a file.

    Texts match whatever their line breaks and spaces, which belong to the formatter.

    Args:
        name: what is wrong.
        file: relative to csrc, or to ppcr_ext for a Python file.
        text: occurs once in the file, or follows ``after``.
        replacement: instead of it.
        after: text that occurs once, before what is meant.
        tests: which tests should see it, as its group understands it.
        survives: why no test can fail, for a mutant that computes the same. It must survive, else
            the reason is wrong.
        sample: one of those that continuous integration plants.
    """

    name: str
    file: str
    text: str
    replacement: str
    after: str = ""
    tests: str = ""
    survives: str = ""
    sample: bool = False

    def planted(self, source: str) -> str:
        """The source with the fault; ValueError where the texts are not found, or not once."""
        begin = self._find(self.after, source).end() if self.after else 0
        found = self._find(self.text, source, begin, once=not self.after)
        return source[: found.start()] + self.replacement + source[found.end() :]

    def _find(self, text: str, source: str, begin: int = 0, once: bool = True) -> re.Match[str]:
        tokens = re.findall(r"\w+|[^\w\s]", text)
        found = list(re.compile(r"\s*".join(map(re.escape, tokens))).finditer(source, begin))
        if not found or (once and len(found) > 1):
            raise ValueError(f"{self.name}: {self.file} holds {len(found)} times {text!r}")
        return found[0]

    def plant(self, folder: Path) -> None:
        """In a copy of csrc, or of ppcr_ext for a Python file."""
        path = folder / self.file
        path.write_text(self.planted(path.read_text()))


def first_failure(status: int, output: str) -> str | None:
    """Of a run of pytest: the first failing test, or how the tests died; None where all pass."""
    if status in (0, 5):  # 5: no test of that name
        return None
    for line in output.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return line.split(" - ")[0]
    if status < 0:
        return f"a test killed by signal {-status}"
    raise SystemExit(f"the tests did not run: {output[-4000:]}")
