"""How Sphinx makes the site of these pages: ``sphinx-build -W --keep-going -q docs OUT``.

Nothing is fetched, neither when it is made nor when it is read.
"""

import inspect
import os
import re
from pathlib import Path

import unidrop

# TensorFlow is imported for docstrings; what it logs of its build is no warning of the pages.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

project = "unidrop"
author = copyright = "The unidrop authors"
release = unidrop.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
highlight_language = "none"  # of blocks that name none
myst_heading_anchors = 3

# A name in single backticks is a link where it is one of ours.
default_role = "py:obj"
autodoc_typehints = "none"  # the docstrings say more
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"unidrop {release}"
html_copy_source = False


def _link_files(app, docname, source):
    """Let links to Markdown outside of these pages lead to the file, as those to code do."""
    folder = Path(app.srcdir, docname).parent

    def linked(match):
        is_page = (folder / match[1]).resolve().is_relative_to(app.srcdir)
        return match[0] if is_page else f"](path:{match[1]})"

    source[0] = re.sub(r"\]\((\.\./[^)#]*\.md)\)", linked, source[0])


def _signature(app, what, name, obj, options, signature, returns):
    """Show a class as it is made: of a protocol nothing is, and Keras hides how a layer is."""
    if getattr(obj, "_is_protocol", False):
        return "", returns
    if signature == "(*args, **kwargs)":
        _, *taken = inspect.signature(obj.__init__).parameters.values()
        return str(inspect.Signature([p.replace(annotation=p.empty) for p in taken])), returns
    return None


def setup(app):
    """Connect what is above."""
    app.connect("source-read", _link_files)
    app.connect("autodoc-process-signature", _signature)
