"""Importing: light where it must be, and possible without any optional package."""

import json
import subprocess
import sys

import pytest
from house import PACKAGE, ROOT, closure, import_names, modules, required_packages, settings

HEAVY = ("torch", "transformers", "diffusers", "accelerate", "peft", "matplotlib", "wandb", "tensorboard")
REQUIRED = closure(settings()["requirements"])
OPTIONAL = import_names(closure([r for requirements in settings().values() for r in requirements])) - import_names(
    REQUIRED
)
NAMED = {"xformers", "torchao", "gguf", "gradio", "ray", "datasets", "pandas", "jupyterlab", "nbdev", "fastcore"}
# the finder that would find a hidden package does not: it is as if it were not installed
HIDE = """
import sys
hidden = set({hidden!r})
finders = [finder.find_spec for finder in sys.meta_path]
class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            return None
        return next(filter(None, (find(name, path, target) for find in finders)), None)
sys.meta_path[:] = [Hiding()]
"""


def python(code, *arguments):
    "Runs code in a fresh interpreter in this checkout and gives back what it printed as JSON last."
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded(code):
    "The heavy packages that code loads."
    report = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    return python(f"{code}\n{report}")


@pytest.mark.parametrize("name", ["", ".core", ".configs", ".cli"])
def test_importing_is_light(name):
    if name and name[1:] not in modules():
        pytest.skip(f"there is no {name[1:]} yet")
    assert loaded(f"import {PACKAGE}{name}") == []


@pytest.mark.skipif("cli" not in modules(), reason="there is no cli yet")
def test_help_is_light():
    run = f"""
import sys
from {PACKAGE}.cli import main
sys.argv = ["truthgpt", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    assert loaded(run) == []


def test_a_heavy_import_is_found():
    assert loaded("import torch") == ["torch"]


def test_the_blocked_packages_are_those_of_the_extras():
    assert {"nbdev", "fastcore", "jupyterlab", "gguf", "pytest", "smalldocs"} <= OPTIONAL
    assert not OPTIONAL & {"torch", "transformers", "ipywidgets", "IPython", "pydantic", "typer", "psutil"}


@pytest.mark.parametrize("name", ["", *[f".{module}" for module in modules()]])
def test_every_module_imports_without_optional_packages(name):
    check = f"""
import json, sys
import {PACKAGE}{name}
print(json.dumps(sorted(hidden & {{module.partition(".")[0] for module in sys.modules}})))
"""
    assert python(HIDE.format(hidden=OPTIONAL | NAMED) + check) == []


def test_a_hidden_package_is_as_if_absent():
    check = """
import importlib.util, json
try:
    import fastcore.test
except ModuleNotFoundError as error:
    print(json.dumps([error.name, importlib.util.find_spec("fastcore") is None]))
"""
    assert python(HIDE.format(hidden={"fastcore"}) + check) == ["fastcore", True]


@pytest.mark.parametrize(
    ("package", "extra"), sorted({(p, e) for source in modules().values() for _, p, e in required_packages(source)})
)
def test_a_missing_package_names_its_extra(package, extra):
    check = f"""
import json
from {PACKAGE}.core import DependencyError, require
try:
    require({package!r}, {extra!r}, "for this test")
except DependencyError as error:
    print(json.dumps(str(error)))
"""
    assert f"{PACKAGE}[{extra}]" in python(HIDE.format(hidden=OPTIONAL | NAMED) + check)
