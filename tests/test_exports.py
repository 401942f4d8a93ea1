"""What the modules export: documented, demonstrated, complete in itself, and claimed by one module only."""

import subprocess
import sys

import pytest
from house import (
    PACKAGE,
    ROOT,
    Notebook,
    clashes,
    closure,
    demonstrated,
    demonstrated_exports,
    documentation_problems,
    exported_names,
    foreign_imports,
    import_names,
    modules,
    notebooks,
    required_packages,
    settings,
)

SOURCES = modules()
BOOKS = {book.module: book for book in notebooks("api")}
each_module = pytest.mark.parametrize("name", SOURCES)


@each_module
def test_every_export_is_documented(name):
    assert documentation_problems(name, SOURCES[name]) == []


@each_module
def test_every_export_is_demonstrated(name):
    shown = demonstrated_exports(SOURCES[name], demonstrated(BOOKS[name]))
    missing = [export for export in exported_names(SOURCES[name]) if export not in shown]
    assert missing == [], f"no unexported cell of {BOOKS[name].name} uses them; a private name begins with _"


def test_no_name_is_exported_twice():
    assert clashes(SOURCES) == []


def undefined_names(folder):
    "What ruff finds undefined (F821) or star-imported (F403, F405) in the modules of a folder."
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "F821,F822,F403,F405",
        "--output-format",
    ]
    done = subprocess.run([*command, "concise", str(folder)], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if ".py:" in line]


def test_exported_code_uses_no_name_of_its_notebook():
    assert undefined_names(ROOT / PACKAGE) == []


@each_module
def test_exported_code_imports_only_requirements(name):
    # fastcore and nbdev are for development; optional packages go through `require`
    assert foreign_imports(SOURCES[name], import_names(closure(settings()["requirements"]))) == []


@each_module
def test_what_is_required_is_an_extra(name):
    extras = {
        key: import_names({r.name for r in requirements}) | {r.name for r in requirements}
        for key, requirements in settings().items()
    }
    for line, package, extra in required_packages(SOURCES[name]):
        assert package.split(".")[0] in extras.get(extra, ()), f"{name}, line {line}: {package} is not in extra {extra}"


# each of these checks finds what it is for

BROKEN = '''
__all__ = ["f", "C", "D", "Settings"]

def f(
    a,  # described
    b=1,
) -> int:
    "Does."
    return a

class C:
    def __init__(self, x, y):  # one comment for two
        "Makes."

    def method(
        self,
        z: int,  # described
    ) -> str:  # described
        "Does."

def D(n: int = (
    1
)) -> int:  # the number
    """One line.

    Parameters: n
    """

@dataclass
class Settings:
    "Fields."

    good: int = 1  # described
    also: int = Field(1, description="described")
    bad: int = 2
'''


def test_missing_documentation_is_found():
    assert documentation_problems("m", BROKEN) == [
        "m.f: parameter b has no comment of its own",
        "m.f: what it returns has no comment",
        "m.C has no docstring",
        "m.C.__init__: parameter x has no comment of its own",
        "m.D has a docstring of several paragraphs: explain in a cell, keep one line",
        "m.D: parameter n has no comment of its own",
        "m.Settings.bad has no comment",
    ]


def test_missing_demonstrations_are_found():
    book = Notebook.of("x", "#| export\nf = g = h = 1", "show_doc(f)", "g(1)", "m.h")
    assert demonstrated(book) & {"f", "g", "h"} == {"g", "h"}


def test_a_type_is_demonstrated_by_what_gives_it_back_and_a_function_is_not():
    source = """
__all__ = ["f", "g", "Given", "Field", "Other"]
Field = int
class Given:
    size: Field
class Other: ...
def f(x: int) -> list[Given]: ...
def g() -> Other: ...
"""
    assert demonstrated_exports(source, {"f"}) == {"f", "Given", "Field"}


def test_a_name_exported_twice_is_found():
    assert clashes({"a": "__all__ = ['x', 'y']", "b": "__all__ = ['y']"}) == ["y is exported by a and b"]


def test_a_name_of_the_notebook_is_found(tmp_path):
    (tmp_path / "module.py").write_text("import os\n\ndef f():\n    return os.sep + prompt\n")
    assert len(undefined_names(tmp_path)) == 1


def test_a_foreign_import_is_found():
    source = "import os\nimport torch.nn\nfrom fastcore.test import *\nfrom .core import x\ndef f():\n    import nbdev"
    allowed = import_names(closure(settings()["requirements"]))
    assert foreign_imports(source, allowed) == ["line 3 imports fastcore.test", "line 6 imports nbdev"]


def test_a_required_package_is_read():
    assert required_packages("x = require('gguf', 'gguf', 'to read')") == [(1, "gguf", "gguf")]
