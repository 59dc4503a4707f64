"""README.md as the description in the metadata of the package, which an index such as PyPI shows.

There a relative address leads nowhere: an index has the page, and not the files beside it.
"""

import re

# Code comes first, so that nothing within it is taken for a link.
_CODE_OR_LINK = re.compile(
    r"(?P<code>^```.*?^```$|`[^`\n]+`)"
    r"|(?P<picture>!?)\[(?P<text>[^\[\]]+)\]\((?P<path>(?![a-z]+:|#)[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)
_WHERE = "The files that are named here are in the source distribution."


def description(readme: str, repository: str | None, version: str) -> str:
    """The text without relative addresses.

    ``repository`` is the public address of the sources, where there is one: links and pictures then
    lead to the files of this version there. Else a link becomes its text and the name of the file,
    which the sdist holds, and a picture is left out.
    """

    def replace(found: re.Match[str]) -> str:
        code, picture, text, path = found.group("code", "picture", "text", "path")
        if code:
            return code
        if repository:
            kind = "raw" if picture else "blob"
            return f"{picture}[{text}]({repository}/{kind}/v{version}/{path})"
        if picture:
            return ""
        return path if text == path else f"{text} ({path})"

    text = re.sub(r"\n{3,}", "\n\n", _CODE_OR_LINK.sub(replace, readme))
    return text if repository else f"{text}\n{_WHERE}\n"
