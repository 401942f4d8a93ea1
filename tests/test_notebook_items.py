"""The plugin that makes a notebook a test: what fails it, what is skipped, and what it leaves behind."""

import builtins
import json
import os
import signal
import subprocess
import sys
import threading
import time

import notebook_items
import pytest
from house import PACKAGE, ROOT, notebook_paths

FLAGS = ["cuda", "slow", "network", "benchmark"]


@pytest.fixture
def run(tmp_path):
    "Runs a notebook of the given code cells; gives back the report, empty if it passed."

    def run(*sources, asked=(), timeout=60, places=None):
        cells = [
            {
                "cell_type": "code",
                "id": f"c{n}",
                "source": source,
                "metadata": {},
                "outputs": [],
                "execution_count": None,
            }
            for n, source in enumerate(sources, start=1)
        ]
        path = tmp_path / "x.ipynb"
        metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
        path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
        with notebook_items.isolated():
            return notebook_items.run(path, FLAGS, list(asked), timeout, places or {})

    return run


def test_a_notebook_passes(run):
    assert run("x = 1", "assert x == 1") == ""


def test_a_failure_shows_cell_source_output_and_traceback(run):
    report = run("def half(x):\n    return 1 / x", "print('before')\nhalf(0)", "never = 1")
    assert report.startswith("ZeroDivisionError: division by zero")
    for shown in ("cell 2", "    half(0)", "it had printed:\nbefore", 'cell 1", line 2, in half', "return 1 / x"):
        assert shown in report
    assert not any(hidden in report for hidden in ("execnb", "interactiveshell", "nbdev/test.py", "never"))


def test_a_syntax_error_fails(run):
    assert run("x = (").startswith("_IncompleteInputError") or "SyntaxError" in run("x = (")


def test_a_cell_that_hangs_fails_and_lets_go(run):
    streams = sys.stdout, sys.stderr
    assert run("import time\ntime.sleep(20)", timeout=1).startswith("TimeoutError")
    assert (sys.stdout, sys.stderr) == streams
    assert not hasattr(builtins, "get_ipython"), "nbdev would take the next notebook for one in JupyterLab, and export"


@pytest.mark.parametrize("flag", FLAGS)
def test_a_marked_cell_runs_only_when_asked_for(run, flag):
    cell = f"#| {flag}\nraise RuntimeError('ran')"
    assert run(cell) == ""
    assert run(cell, asked=[flag]).startswith("RuntimeError: ran")


def test_a_notebook_leaves_nothing_behind(run):
    from IPython import get_ipython

    before = os.getcwd(), list(sys.path), signal.getsignal(signal.SIGINT), dict(os.environ), sys.modules["__main__"]
    assert run("import os, sys\nos.environ['LEFT'] = '1'\nos.chdir('/')\nsys.path.insert(0, '/left')") == ""
    after = os.getcwd(), list(sys.path), signal.getsignal(signal.SIGINT), dict(os.environ), sys.modules["__main__"]
    assert after == before
    assert get_ipython() is None


def test_torch_starts_each_notebook_alike(run):
    torch = pytest.importorskip("torch")
    cell = (
        "import torch\ntorch.set_default_dtype(torch.float64)\nassert torch.rand(1, dtype=torch.float32).item() == {!r}"
    )
    first = torch.manual_seed(67280421310721) and torch.rand(1).item()
    assert run(cell.format(first)) == ""
    assert run(cell.format(first)) == ""
    assert torch.get_default_dtype() == torch.float32


def test_an_exported_cell_counts_as_lines_of_its_module(run, tmp_path):
    module = tmp_path / "m.py"
    module.write_text("\n\n# %% ../x.ipynb #c2\nx = 1\ndef where():\n    raise ValueError\n")
    places = notebook_items.module_places(tmp_path / "x.ipynb", tmp_path) if (tmp_path / "x.ipynb").exists() else {}
    assert places == {}
    assert run("pass", "#| export\nx = 1\ndef where():\n    raise ValueError") == ""
    places = notebook_items.module_places(tmp_path / "x.ipynb", tmp_path)
    assert places == {"c2": (str(module), 3)}
    report = run("pass", "#| export\nx = 1\ndef where():\n    raise ValueError", "where()", places=places)
    assert f'"{module}", line 6, in where' in report


def test_ctrl_c_reaches_pytest(run):
    def interrupt():
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run("import time\nfor _ in range(200):\n    time.sleep(0.1)")


def pytest_run(*arguments, cwd=ROOT):
    "Runs pytest by itself, without the options that this run may have from the environment."
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)


def collected(*arguments, cwd=ROOT):
    "What pytest collects."
    return pytest_run("--collect-only", "-q", *arguments, cwd=cwd).stdout.splitlines()


def test_pytest_collects_every_notebook_once():
    found = [line for line in collected() if line.endswith(".ipynb::notebook")]
    assert sorted(found) == sorted(f"{path.relative_to(ROOT)}::notebook" for path in notebook_paths())


def test_one_notebook_can_be_asked_for(tmp_path):
    path = ROOT / "nbs" / "api" / "00_core.ipynb"
    for arguments, cwd in ((["nbs/api/00_core.ipynb"], ROOT), ([path, "--slow"], tmp_path)):
        assert sum("00_core.ipynb::notebook" in line for line in collected(*arguments, cwd=cwd)) == 1


def test_marked_tests_are_skipped_with_the_reason(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_x.py").write_text("import pytest\n@pytest.mark.slow\ndef test_x(): assert False\n")
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT / 'tests'}\nmarkers = slow: x\n")
    assert "marked slow: run with --slow" in pytest_run("-rs", "tests", cwd=tmp_path).stdout
    assert pytest_run("tests", "--slow", cwd=tmp_path).returncode == 1


def test_the_package_under_test_is_this_checkout():
    module = __import__(PACKAGE)
    assert str(ROOT) in module.__file__
