"""Settings of the documentation site: ``make docs`` builds it in build/docs, without a network.

With PPCR_DOCS_ONLINE=1 in the environment, the names of PyTorch and Python become links to their
documentation, whose lists of names are then downloaded. Without it they stay plain text, and only
references to names of this package must resolve.
"""

import os

import ppcr_ext

project = "ppcr_ext"
author = "the ppcr_ext authors"
version = release = ppcr_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
if os.environ.get("PPCR_DOCS_ONLINE", "0") not in ("", "0"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
nitpick_ignore_regex = [("py:.*", r"(torch|collections)\..*|\w+Error|dict|list|str|int")]

highlight_language = "text"
myst_heading_anchors = 3  # as Git hosts make them
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature shows the defaults, the sections say the types
napoleon_numpy_docstring = False
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_show_copyright = False
pygments_dark_style = "github-dark"
html_title = f"ppcr_ext {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
