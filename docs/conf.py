"""Build the documentation: `./run docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "nogemm"
author = "The nogemm authors"
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "nogemm"
# Formulas are plain text in these pages: a reader without a network sees them too.
html_static_path: list[str] = []
autodoc_typehints = "description"
napoleon_use_ivar = True  # as link targets, attributes would catch arguments of the same name
exclude_patterns = ["_build"]
