"""Sphinx configuration of the site: ``sphinx-build -W --keep-going -q docs OUT``.

Neither the build nor the built pages need a network.
"""

import inspect
import os
import re
from pathlib import Path

import unidrop

# Autodoc imports TensorFlow, which would log messages about its own build as warnings.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

project = "unidrop"
author = copyright = "The unidrop authors"
release = unidrop.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
highlight_language = "none"  # for blocks without a language
myst_heading_anchors = 3

# Names in single backticks become links if the reference has them.
default_role = "py:obj"
autodoc_typehints = "none"  # the docstrings describe the types
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"unidrop {release}"
html_copy_source = False


def _link_files(app, docname, source):
    """Turn links to Markdown files outside of docs/ into links to the files."""
    folder = Path(app.srcdir, docname).parent

    def to_path(match):
        is_page = (folder / match[1]).resolve().is_relative_to(app.srcdir)
        return match[0] if is_page else f"](path:{match[1]})"

    source[0] = re.sub(r"\]\((\.\./[^)#]*\.md)\)", to_path, source[0])


def _signature(app, what, name, obj, options, signature, returns):
    """Show the arguments of a Keras layer, which Keras hides, and none for a protocol."""
    if getattr(obj, "_is_protocol", False):
        return "", returns
    if signature == "(*args, **kwargs)":
        _, *parameters = inspect.signature(obj.__init__).parameters.values()
        return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters])), returns
    return None


def setup(app):
    """Connect the two functions above."""
    app.connect("source-read", _link_files)
    app.connect("autodoc-process-signature", _signature)
