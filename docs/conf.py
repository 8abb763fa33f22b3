"""Sphinx's settings for `make docs`, whose source folder is the clone: relative links work."""

import pathlib
import re

from sphinx.domains.python._object import PyObject

import mbv2_jax

_DOCS = pathlib.Path(__file__).parent
_FIRST = (
    "installation",
    "library",
    "finetuning",
    "detection",
    "segmentation",
    "training",
    "data",
    "conversion",
    "export",
    "analysis",
)

project = "mbv2_jax"
author = "The authors of mbv2_jax"
release = mbv2_jax.__version__

root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = [".*", "build", "runs", "tests", "**/.ipynb_checkpoints", "**/__pycache__"]

extensions = [
    "myst_nb",  # pages in Markdown, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # Google's docstrings
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_heading_anchors = 4  # links such as training.md#resume, as on GitHub
nb_execution_mode = "off"  # tests run the notebooks; the pages show their cells alone

default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute has its place in the class's docstring alone
add_module_names = False
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
# References to other projects would need their inventories from the network.
nitpick_ignore_regex = [("py:.*", r"(?!mbv2_jax\b).*")]

html_theme = "furo"
html_title = f"mbv2_jax {release}"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_additional_pages = {"index": "redirect.html"}
html_show_sphinx = False
html_show_copyright = False


def _add_contents(app, docname, source):
    """Adds the contents to the README, which needs none on GitHub.

    Every page and notebook in docs/ is listed: those in `_FIRST` in its order, then the others.
    """
    if docname == root_doc:
        found = sorted(file.stem for file in _DOCS.glob("*.md"))
        guides = sorted(found, key=lambda name: (*_FIRST, name).index(name))
        notebooks = sorted(f"notebooks/{file.stem}" for file in _DOCS.glob("notebooks/*.ipynb"))
        source[0] += _toctree("Guides", guides)
        source[0] += _toctree("Notebooks", notebooks)
        source[0] += _toctree("Reference", ["api/mbv2_jax", "api/*"])
        source[0] += _toctree("Project", ["../CONTRIBUTING", "../CHANGELOG"])


def _toctree(caption, pages):
    entries = "\n".join(f"/docs/{page}" for page in pages)
    fence = "```"
    block = f"{fence}{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{entries}\n{fence}"
    return f"\n\n{block}\n" if pages else ""


def _skip_named_tuple_field(app, what, name, member, skip, options):
    """Leaves out "Alias for field number 0": the class's docstring describes the fields."""
    return True if type(member).__name__ == "_tuplegetter" else None


def _shorten_signature(app, what, name, obj, options, signature, returns):
    """Leaves out the fields that Flax adds to every module."""
    flax_fields = r"(, )?parent=<flax[^>]*>, name=None"
    return re.sub(flax_fields, "", signature or "") or None, returns


def _keep_returns_whole(app, what, name, obj, options, lines):
    """Marks Returns sections as text: Napoleon would take the words before a colon as a type."""
    for i, line in enumerate(lines[:-1]):
        if line.strip() in ("Returns:", "Yields:"):
            lines[i + 1] = re.sub(r"^\s*", r"\g<0>: ", lines[i + 1])


def setup(app):
    """Registers the functions above with Sphinx."""
    app.connect("source-read", _add_contents)
    app.connect("autodoc-skip-member", _skip_named_tuple_field)
    app.connect("autodoc-process-signature", _shorten_signature)
    app.connect("autodoc-process-docstring", _keep_returns_whole, priority=400)  # before Napoleon
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as in the docstrings, instead of "Variables"
