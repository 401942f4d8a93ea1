"""Notebooks as pytest items, and the options that un-skip what is slow, needs a network or a CUDA device.

`tests/conftest.py` and `nbs/conftest.py` both register this module, so that it serves whichever folder is asked for.
A notebook runs through nbdev's own runner (`nbdev.test.test_nb`), in this process, as one item.
"""

import ast
import builtins
import gc
import json
import os
import random
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = ("slow", "network", "cuda", "benchmark")
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "nbs"
RUNNER = ("nbdev", "execnb", "IPython", "asyncio", "fastcore", "concurrent")  # frames of these only say how a cell ran
CELL_MARK = re.compile(r"^# %% .*\.ipynb #(\S+)$")  # the line that nbdev-export writes above the code of each cell


def pytest_addoption(parser):
    group = parser.getgroup("truthgpt", "tests and notebook cells that are skipped unless asked for")
    for flag in FLAGS:
        group.addoption(f"--{flag}", action="store_true", help=f"also run what is marked {flag}")


def pytest_configure(config):
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ.setdefault("TRUTHGPT_DEVICE", "cpu")  # what is marked cuda names its device


def pytest_collection_modifyitems(config, items):
    for item in items:
        for flag in FLAGS:
            if item.get_closest_marker(flag) and not config.getoption(flag):
                item.add_marker(pytest.mark.skip(reason=f"marked {flag}: run with --{flag}"))


def pytest_collect_file(file_path, parent):
    if file_path.suffix != ".ipynb" or not file_path.is_relative_to(NOTEBOOKS):
        return None
    if any(part.startswith(("_", ".")) for part in file_path.relative_to(NOTEBOOKS).parts):
        return None
    return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    "A notebook under nbs/; it holds one item."

    def collect(self):
        yield NotebookItem.from_parent(self, name="notebook")


class CellFailed(Exception):
    "A cell raised; the message is the whole report."


class NotebookItem(pytest.Item):
    "Runs every cell of its notebook, without those whose flag was not asked for."

    def runtest(self):
        from nbdev.config import get_config
        from nbdev.frontmatter import nb_frontmatter
        from nbdev.process import NBProcessor

        config = get_config(self.path.parent)
        if str(nb_frontmatter(NBProcessor(self.path).nb).get("skip_exec", "")).lower() == "true":
            pytest.skip("skip_exec in its front matter")
        asked = [flag for flag in FLAGS if self.config.getoption(flag)]
        with isolated():
            covered = self.config.pluginmanager.hasplugin("_cov")
            places = module_places(self.path, config.lib_path) if covered else {}
            report = run(self.path, config.tst_flags.split(), asked, config.cell_timeout, places)
        if report:
            raise CellFailed(report)

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if excinfo.errisinstance(CellFailed) else super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, None, str(self.path.relative_to(ROOT))


def run(
    path: Path,  # the notebook
    flags: list[str],  # cells with one of these directives are skipped
    asked: list[str],  # unless it is one of these
    timeout: int,  # seconds for one cell
    places: dict[str, tuple[str, int]],  # cells to compile as lines of a module: see `module_places`
) -> str:  # what to show of a failure; empty when every cell passed
    "Runs one notebook through `nbdev.test.test_nb`, which prints failures instead of raising them."
    import nbdev.test
    from IPython.core.compilerop import CachingCompiler

    shells, interrupts = [], []

    class Compiler(CachingCompiler):
        "Compiles an exported cell as what it is in the module, so that coverage counts it there."

        def __call__(self, source, filename, symbol):
            place = places.get(shells[-1].current.get("id")) if shells and shells[-1].current else None
            if place and isinstance(source, ast.AST):
                directives = sum(line.startswith("#|") for line in shells[-1].current.source.splitlines())
                filename = place[0]
                for node in ast.iter_child_nodes(source):
                    ast.increment_lineno(node, place[1] - directives)
            return super().__call__(source, filename, symbol)

    class Shell(nbdev.test.CaptureShell):
        "Remembers the cell it is at."

        current, leaks, compiler_class = None, (), Compiler

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.numbers = {}  # of cells, by what IPython counts
            shells.append(self)

        def cell(self, cell, *args, **kwargs):
            self.current = cell
            self.numbers[self.execution_count] = cell.idx_ + 1
            return super().cell(cell, *args, **kwargs)

        def run(self, *args, **kwargs):
            try:
                return super().run(*args, grace=1, **kwargs)  # seconds that a cell has after its time to stop
            except Exception as error:  # of what runs the cell: `test_nb` would swallow it
                self.exc = error
                raise

    def interrupt(signum, frame):
        interrupts.append(signum)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbdev.test, "CaptureShell", Shell)
        patch.setattr(nbdev.test, "_int_handler", interrupt)  # nbdev's own ends the process
        passed, _ = nbdev.test.test_nb(
            path, skip_flags=flags, force_flags=asked, showerr=False, profile=False, cell_timeout=timeout
        )
    if interrupts:
        raise KeyboardInterrupt
    report = "" if passed else describe(path, shells[-1])
    for shell in shells:
        shell.close()
        shell.user_ns.clear()
    return report


def module_places(path: Path, library: Path) -> dict[str, tuple[str, int]]:
    "Finds where each exported cell stands in its module: by cell id, the file and the line above the code."
    cells = {cell["id"]: cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if "id" in cell}
    places = {}
    for module in library.glob("*.py"):
        for number, line in enumerate(module.read_text(encoding="utf-8").splitlines(), start=1):
            mark = CELL_MARK.match(line)
            if mark and mark.group(1) in cells and path.name in line:
                places[mark.group(1)] = (str(module), number)
    return places


def relative(path: Path) -> str:
    "Names a notebook from the top folder, if it stands under it."
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def describe(path: Path, shell) -> str:
    "Says which cell of a notebook failed, shows its source and printed output, and the traceback from the cell on."
    cell, error = shell.current, shell.exc or RuntimeError("the run ended, and not by an error of the cell")
    source = "\n".join(f"    {line}" for line in cell.source.splitlines())
    printed = "".join("".join(out.get("text", "")) for out in cell.get("outputs") or [])
    printed = f"\n\nit had printed:\n{printed.rstrip()}" if printed else ""
    where, shown = f"{relative(path)}, cell {cell.idx_ + 1}", trace(error, relative(path), shell.numbers)
    what = traceback.format_exception_only(error)[-1].strip()
    return f"{what}\n\n{where} (id {cell.get('id', 'none')}):\n\n{source}{printed}\n\n{shown}"


def trace(error: BaseException, name: str, numbers: dict[int, int]) -> str:
    "Formats the traceback of an error raised in a cell, without the frames of the machinery that ran the cell."
    report = traceback.TracebackException.from_exception(error)
    frames = list(report.stack)
    while frames and set(RUNNER) & set(Path(frames[0].filename).parts):
        del frames[0]
    for frame in frames:
        counted = re.match(r"<ipython-input-(\d+)-", frame.filename)
        if counted:
            frame.filename = f"{name}, cell {numbers.get(int(counted[1]), '?')}"
    report.stack[:] = frames
    return "".join(report.format()).rstrip()


@contextmanager
def isolated() -> Iterator[None]:
    "Gives a notebook the state of a fresh process as far as one process can, and takes back what it changed."
    from IPython.core.interactiveshell import InteractiveShell

    main_thread = threading.current_thread() is threading.main_thread()
    handler, streams = signal.getsignal(signal.SIGINT), (sys.stdout, sys.stderr)
    names = {name: vars(builtins).get(name) for name in ("get_ipython", "input", "display", "__IPYTHON__")}
    environ, folder, path, main = dict(os.environ), os.getcwd(), list(sys.path), sys.modules["__main__"]
    shell, hook, chance = InteractiveShell._instance, sys.displayhook, random.getstate()
    restore_torch = torch_state()
    os.environ["IN_TEST"] = "1"  # nbdev_export does nothing
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, handler)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environ)
        sys.path[:], sys.modules["__main__"] = path, main
        InteractiveShell._instance, sys.displayhook = shell, hook
        sys.stdout, sys.stderr = streams  # a cell that ran out of time still holds these, and the built-in names
        for name, value in names.items():
            vars(builtins).pop(name, None) if value is None else setattr(builtins, name, value)
        random.setstate(chance)
        restore_torch()
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
            sys.modules["matplotlib"].rcdefaults()
        gc.collect()


def torch_state():
    "Seeds torch as it seeds itself in a fresh process, if it is loaded; returns what puts its global settings back."
    torch = sys.modules.get("torch")
    if torch is None:
        return lambda: None
    torch.manual_seed(67280421310721)
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    strict = torch.are_deterministic_algorithms_enabled()

    def restore():
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        torch.use_deterministic_algorithms(strict)

    return restore
