"""How the documentation is built; ``make docs`` does it, with warnings as errors."""

from __future__ import annotations

from weightlift import __version__

project = "weightlift"
author = "the authors of weightlift"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["Thumbs.db", ".DS_Store"]
html_theme = "furo"
html_title = "weightlift"

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
