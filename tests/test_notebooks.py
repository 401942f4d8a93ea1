"""The notebooks themselves: their form, their reading order, and what they leave for the site and for `git diff`."""

import shutil
import subprocess
import sys

import pytest
from house import (
    PACKAGE,
    ROOT,
    Notebook,
    form_problems,
    layering_problems,
    notebook_paths,
    notebooks,
)

BOOKS = notebooks()


def test_there_are_notebooks():
    assert any(book.module == "core" for book in BOOKS)


def test_a_module_reads_only_lower_numbers():
    assert layering_problems([book for book in BOOKS if book.module]) == []


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_title_subtitle_and_name(book):
    assert form_problems(book) == []


CORE = Notebook.of("nbs/api/00_core.ipynb", "# core\n\n> s", "#| default_exp core")


@pytest.mark.parametrize(
    "line",
    [
        f"from {PACKAGE}.text import generate",
        f"import {PACKAGE}.text as t",
        f"from {PACKAGE} import text",
        f"import {PACKAGE}\n{PACKAGE}.text.generate()",
        f"def later():\n    from {PACKAGE}.text import generate",
    ],
)
@pytest.mark.parametrize("name", ["nbs/api/08_early.ipynb", "nbs/api/08b_early.ipynb", "nbs/api/09_text2.ipynb"])
def test_reading_forward_is_found(line, name):
    text = Notebook.of("nbs/api/09_text.ipynb", "#| default_exp text")
    early = Notebook.of(name, "#| default_exp early", "%matplotlib inline\n" + line)
    problems = layering_problems([CORE, text, early])
    assert len(problems) == 1
    assert problems[0].startswith(f"{name}, cell 2, line ")


def test_reading_back_is_allowed():
    late = Notebook.of("nbs/api/08a_late.ipynb", "#| default_exp late", f"from {PACKAGE}.core import require")
    middle = Notebook.of("nbs/api/08_middle.ipynb", "#| default_exp middle", "1 + 1")
    last = Notebook.of("nbs/api/10_last.ipynb", "#| default_exp last", f"from {PACKAGE}.late import x, middle")
    assert layering_problems([CORE, middle, late, last]) == []


def test_a_notebook_may_show_its_own_module_but_not_export_from_it():
    line = f"from {PACKAGE}.core import require"
    assert layering_problems([Notebook.of("nbs/api/00_core.ipynb", "#| default_exp core", line)]) == []
    exported = Notebook.of("nbs/api/00_core.ipynb", "#| default_exp core", f"#| export\n{line}")
    assert len(layering_problems([exported])) == 1


@pytest.mark.parametrize(
    ("book", "problem"),
    [
        (Notebook.of("nbs/api/00_core.ipynb", "#| default_exp core"), "not a `# title`"),
        (Notebook.of("nbs/api/00_core.ipynb", "# core\n\nNo subtitle", "#| default_exp core"), "subtitle"),
        (Notebook.of("nbs/api/00_core.ipynb", "# core\n\n> s", "1 + 1", "#| default_exp core"), "default_exp"),
        (Notebook.of("nbs/api/00_base.ipynb", "# core\n\n> s", "#| default_exp core"), "NN_core"),
        (Notebook.of("nbs/api/core.ipynb", "# core\n\n> s", "#| default_exp core"), "NN_core"),
    ],
)
def test_a_broken_form_is_found(book, problem):
    assert any(problem in found for found in form_problems(book))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes."
    folder = tmp_path_factory.mktemp("house")
    for name in ("nbs", PACKAGE):
        ignored = shutil.ignore_patterns("assets", "__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def nbdev(command, folder):
    "Runs one of nbdev's commands as its console script does."
    code = f"import sys; from nbdev.{command[0]} import {command[1]} as run; sys.argv = ['nbdev']; run()"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_is_in_step_with_the_notebooks(copy):
    before = {path.name: path.read_text() for path in (ROOT / PACKAGE).glob("*.py")}
    nbdev(("doclinks", "nbdev_export"), copy)
    after = {path.name: path.read_text() for path in (copy / PACKAGE).glob("*.py")}
    stale = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert stale == [], "run nbdev-export"
    edited = copy / PACKAGE / "core.py"
    edited.write_text(edited.read_text() + "\nx = 1\n")
    nbdev(("doclinks", "nbdev_export"), copy)
    assert edited.read_text() == before["core.py"], "nbdev-export takes back an edit by hand"


def test_the_notebooks_are_clean(copy):
    before = {path.relative_to(ROOT): path.read_text() for path in notebook_paths()}
    nbdev(("clean", "nbdev_clean"), copy)
    assert [str(name) for name, text in before.items() if (copy / name).read_text() != text] == [], "run nbdev-clean"
