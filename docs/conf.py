"""Sphinx: ./dev docs."""

import os
import re

import remnant

project = "Remnant"
author = "The Remnant developers"
version = release = remnant.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = []
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = "Remnant"
myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True
if os.environ.get("REMNANT_DOXYGEN"):
    extensions.append("breathe")
    breathe_projects = {"remnant": os.environ["REMNANT_DOXYGEN"]}
    breathe_default_project = "remnant"


def to_rst(app, what, name, subject, options, lines):
    """Docstrings are plain text for people; Sphinx wants lists, code and bars marked."""
    made, item, section, code = [], None, "", False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            section, code = line, False
        if not section.rstrip().endswith(":") or not re.match(r"(Args|Attributes|Raises|Returns|Yields):", section):
            if indent >= 4 and not code and made and not made[-1].strip():
                made += ["::", ""]
                code = True
            made.append(line if code and indent else plain(line))
            continue
        if re.match(r' +"[^"]+": ', line):
            if item is None:
                made.append("")
            item = indent
            made.append(" " * indent + "* " + plain(line.strip()))
        elif item is not None and line.strip() and indent > item:
            made.append(" " * (item + 2) + plain(line.strip()))
        else:
            if item is not None:
                made.append("")
            item = None
            made.append(plain(line))
    lines[:] = made


def plain(line):
    return re.sub(r"[|*]", lambda found: "\\" + found[0], line)


def cpp_reference(app, name, source):
    if name == "api_cpp":
        with_headers = "```{eval-rst}\n.. doxygennamespace:: remnant\n   :members:\n```"
        without = "This site was built without Doxygen, which puts their text here."
        source[0] += with_headers if "breathe" in extensions else without


def setup(app):
    app.connect("autodoc-process-docstring", to_rst, priority=100)  # before napoleon
    app.connect("source-read", cpp_reference)
