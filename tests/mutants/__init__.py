"""Small faults for tools/mutate.py, which plants one at a time in a copy of the sources: does a test fail?"""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault: ``text`` becomes ``replacement`` in a file of csrc.

    Args:
        name: what is wrong.
        file: relative to csrc.
        text: occurs once in the file, or once behind ``after``.
        replacement: instead of it.
        after: text that occurs once, before what is meant.
        tests: pytest's ``-k`` of the tests that should see it, run first; ``sanitize``: only the sanitizers can.
        survives: why no test can fail, for a mutant that computes the same. It must survive, else the reason is wrong.
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

    def plant(self, csrc: Path) -> None:
        path = csrc / self.file
        source = path.read_text()
        for unique in filter(None, (self.after, "" if self.after else self.text)):
            if source.count(unique) != 1:
                raise SystemExit(
                    f"{self.name}: csrc/{self.file} holds {source.count(unique)} times {unique!r}: update tests/mutants"
                )
        begin = source.find(self.after) if self.after else 0
        at = source.find(self.text, begin)
        if at < 0:
            raise SystemExit(
                f"{self.name}: csrc/{self.file} no longer holds {self.text!r} there: update tests/mutants"
            )
        path.write_text(source[:at] + self.replacement + source[at + len(self.text) :])
