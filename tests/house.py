"""What the tests of the house read: notebooks cell by cell, modules by their syntax tree, settings.ini.

Each check is a function from sources to a list of problems, so that a test can also give it something broken.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from itertools import pairwise
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT, PACKAGE = Path(__file__).resolve().parents[1], "truthgpt_nb"
NUMBER = re.compile(r"(\d\d)([a-z]?)_")
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)(.*)$", flags=re.MULTILINE)


# files


def tracked() -> list[str]:
    "The files of the checkout that git tracks or would take up; without git, those that are not made by a tool."
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        made = re.compile(r"(^|/)(\.(?!ci/|gitignore)|(_proc|_docs|__pycache__|build|dist|[^/]*\.egg-info)/)")
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
        names = [name for name in names if not made.search(name)]
    return sorted(name for name in names if (ROOT / name).is_file())


# notebooks


@dataclass(frozen=True)
class Cell:
    "One cell of a notebook; `number` counts from 1."

    number: int
    kind: str
    source: str

    @cached_property
    def directives(self) -> dict[str, str]:
        return {name: value.strip() for name, value in DIRECTIVE.findall(self.source)}

    @property
    def exported(self) -> bool:
        return bool({"export", "exports", "exporti"} & self.directives.keys())

    @cached_property
    def tree(self) -> ast.Module:
        "The syntax tree, with magics and shell lines blanked so that line numbers hold."
        return ast.parse(re.sub(r"^[%!].*$", "", self.source, flags=re.MULTILINE))


class Notebook:
    "A notebook as its cells, and its place in the reading order."

    def __init__(self, name: str, cells: list[Cell]):
        self.name, self.cells = name, cells

    @classmethod
    def read(cls, path: Path) -> "Notebook":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        return cls(name, [Cell(n, c["cell_type"], "".join(c["source"])) for n, c in enumerate(cells, start=1)])

    @classmethod
    def of(cls, name: str, *sources: str) -> "Notebook":
        "A made-up notebook: a source that begins with `# ` and a letter is Markdown, every other is code."
        kinds = ["markdown" if re.match(r"#+ \w|>", source) else "code" for source in sources]
        return cls(name, [Cell(n, k, s) for n, (k, s) in enumerate(zip(kinds, sources, strict=True), start=1)])

    @property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def module(self) -> str | None:
        return next((c.directives["default_exp"] for c in self.code if "default_exp" in c.directives), None)

    @property
    def place(self) -> tuple[str, str]:
        "The number and the letter of its name, which say where it stands in the reading order."
        found = NUMBER.match(Path(self.name).name)
        return (found[1], found[2]) if found else ("", "")


def notebooks(folder: str = ".") -> list[Notebook]:
    "The notebooks under nbs/ or one of its folders."
    return [Notebook.read(path) for path in notebook_paths(folder)]


def notebook_paths(folder: str = ".") -> list[Path]:
    "The paths of the notebooks under nbs/, without what starts with `_` or `.`."
    top = ROOT / "nbs"
    paths = sorted((top / folder).rglob("*.ipynb"))
    return [p for p in paths if not any(part.startswith(("_", ".")) for part in p.relative_to(top).parts)]


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    "Every module of this package that code imports or reaches through its name, with the line."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{PACKAGE}."):
                    yield node.lineno, alias.name.split(".")[1]
        elif isinstance(node, ast.ImportFrom):
            full = (f"{PACKAGE}." if node.level else "") + (node.module or "")
            if full.strip(".") == PACKAGE:
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif full.startswith(f"{PACKAGE}."):
                yield node.lineno, full.split(".")[1]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
            yield node.lineno, node.attr


def layering_problems(books: list[Notebook]) -> list[str]:
    """Imports of a module whose notebook does not stand before the importing one.

    A notebook may show its own finished module before its parts, in a cell that is not exported.
    """
    places = {book.module: book.place for book in books if book.module}
    problems = []
    for book in books:
        for cell in book.code:
            for line, module in imported_modules(cell.tree):
                own = module == book.module and not cell.exported
                if module in places and places[module] >= book.place and not own:
                    text = cell.source.splitlines()[line - 1].strip()
                    problems.append(f"{book.name}, cell {cell.number}, line {line}: {text!r} reads forward")
    return problems


def form_problems(book: Notebook) -> list[str]:
    "What the form of a notebook lacks: title, subtitle, and for a module `#| default_exp` in its first code cell."
    first = book.cells[0].source if book.cells and book.cells[0].kind == "markdown" else ""
    problems = [] if re.match(r"# \S", first) else ["the first cell is not a `# title`"]
    if not re.match(r"# [^\n]+\n+> \S", first):
        problems.append("the title is not followed by a `> one-line subtitle`")
    if "/api/" in book.name:
        if not book.code or "default_exp" not in book.code[0].directives:
            problems.append("the first code cell is not `#| default_exp name`")
        elif book.place == ("", "") or not book.name.endswith(f"_{book.module}.ipynb"):
            problems.append(f"its name is not NN_{book.module}.ipynb")
    return [f"{book.name}: {problem}" for problem in problems]


# modules


def modules() -> dict[str, str]:
    "The sources of the generated modules, by name."
    paths = sorted((ROOT / PACKAGE).glob("*.py"))
    return {path.stem: path.read_text(encoding="utf-8") for path in paths if not path.stem.startswith("_")}


def exported_names(source: str) -> list[str]:
    "The names in a module's `__all__`."
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def commented_lines(source: str) -> set[int]:
    "The lines that carry a comment."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def documentation_problems(name: str, source: str) -> list[str]:
    "What the documentation of a module lacks: one-line docstrings, a comment at each public parameter and at a return."
    exported, comments = set(exported_names(source)), commented_lines(source)
    problems = []
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in exported:
            problems += [f"{name}.{problem}" for problem in undocumented(node, comments)]
    return problems


def undocumented(node: ast.AST, comments: set[int], owner: str = "") -> Iterator[str]:
    "The gaps in one definition and, for a class, in its public methods."
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    title = f"{owner}{node.name}"
    docstring = ast.get_docstring(node)
    if node.name != "__init__" and not (node.name.startswith("__") and owner) and not docstring:
        yield f"{title} has no docstring"
    if docstring and "\n\n" in docstring:
        yield f"{title} has a docstring of several paragraphs: explain in a cell, keep one line"
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if is_dataclass(node) and is_field(child) and not described(child, comments):
                yield f"{title}.{ast.unparse(child.target)} has no comment"
            name = getattr(child, "name", "_")
            if name in ("__init__", "__call__") or not name.startswith("_"):
                yield from undocumented(child, comments, f"{title}.")
        return
    for parameter, end in parameters_of(node):
        public = parameter.arg not in ("self", "cls") and not parameter.arg.startswith("_")
        if public and not set(range(parameter.lineno, end)) & comments:
            yield f"{title}: parameter {parameter.arg} has no comment of its own"
    decorators = {ast.unparse(d).split(".")[-1] for d in node.decorator_list}
    returns = node.returns and ast.unparse(node.returns)
    quiet = decorators & {"property", "cached_property", "contextmanager", "setter"}
    if returns and returns != "None" and not quiet and node.returns.end_lineno not in comments:
        yield f"{title}: what it returns has no comment"


def parameters_of(node: ast.FunctionDef) -> list[tuple[ast.arg, int]]:
    "The parameters of a function, each with the line at which what is said of it ends: where the next one begins."
    arguments = node.args
    found = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    found = sorted(filter(None, found), key=lambda parameter: (parameter.lineno, parameter.col_offset))
    closing = max(node.returns.lineno if node.returns else node.body[0].lineno, node.lineno + 1)
    return [(parameter, after.lineno) for parameter, after in pairwise(found)] + [(p, closing) for p in found[-1:]]


def is_dataclass(node: ast.ClassDef) -> bool:
    "Whether a class lists its parameters as annotated fields."
    return any("dataclass" in ast.unparse(d) or ast.unparse(d) == "config" for d in node.decorator_list)


def is_field(node: ast.AST) -> bool:
    "Whether a line of a class names a public field."
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")


def described(field: ast.AnnAssign, comments: set[int]) -> bool:
    "Whether a field has a comment, or a description for the schema."
    lines = set(range(field.lineno, field.end_lineno + 1))
    return bool(lines & comments) or (field.value is not None and "description=" in ast.unparse(field.value))


def demonstrated(book: Notebook) -> set[str]:
    "The names that stand in code of a notebook which is not exported and more than `show_doc`."
    names = set()
    for cell in book.code:
        if cell.exported:
            continue
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
        shown = [
            n.args[0] for n in ast.walk(cell.tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "show_doc"
        ]
        names -= {ast.unparse(node) for node in shown}
    return names


def demonstrated_exports(source: str, shown: set[str]) -> set[str]:
    "The exports that are shown, and the types that what is shown takes, holds or gives back."
    exports = set(exported_names(source))
    definitions = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    types = {name for name in exports if not isinstance(definitions.get(name), ast.FunctionDef)}
    found, todo = set(), exports & shown
    while todo:
        name = todo.pop()
        found.add(name)
        if name in definitions:
            todo |= (annotated(definitions[name]) & types) - found
    return found


def annotated(definition: ast.AST) -> set[str]:
    "The names in the annotations of a function, or of the fields and methods of a class."
    annotations = [getattr(node, "annotation", None) or getattr(node, "returns", None) for node in ast.walk(definition)]
    return {node.id for note in filter(None, annotations) for node in ast.walk(note) if isinstance(node, ast.Name)}


def clashes(sources: dict[str, str]) -> list[str]:
    "Names that two modules export."
    owners: dict[str, list[str]] = {}
    for module, source in sources.items():
        for name in exported_names(source):
            owners.setdefault(name, []).append(module)
    return [f"{name} is exported by {' and '.join(found)}" for name, found in owners.items() if len(found) > 1]


# requirements


def settings() -> dict[str, list[Requirement]]:
    "What settings.ini asks for: `requirements` and each extra."
    parser = ConfigParser(interpolation=None)
    with (ROOT / "settings.ini").open(encoding="utf-8") as file:
        parser.read_file(file)
    lines = {key.removesuffix("_requirements"): value.split("\n")[1:] for key, value in parser["DEFAULT"].items()}
    return {key: [Requirement(line) for line in value] for key, value in lines.items()}


def closure(requirements: Iterable[Requirement]) -> set[str]:
    "The distributions that requirements bring in, as far as they are installed here."
    found, todo = set(), list(requirements)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        try:
            asked = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        extras = requirement.extras or {""}
        needs = map(Requirement, asked)
        todo += [r for r in needs if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return found


@cache
def owners_of_modules() -> dict[str, list[str]]:
    "Which distributions install a top-level module; reading this takes seconds."
    return dict(packages_distributions())


def import_names(distributions: set[str]) -> set[str]:
    "The top-level modules that distributions install."
    return {
        module
        for module, owners in owners_of_modules().items()
        if {canonicalize_name(owner) for owner in owners} & distributions
    }


def foreign_imports(source: str, allowed: set[str]) -> list[str]:
    "Imports of exported code that are neither the standard library, this package, nor allowed."
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            top = name.split(".")[0]
            if top not in {*sys.stdlib_module_names, *allowed, PACKAGE}:
                problems.append(f"line {node.lineno} imports {name}")
    return problems


def required_packages(source: str) -> list[tuple[int, str, str]]:
    "The calls `require(package, extra, ...)` of exported code: line, package, extra."
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "require"]
    return [
        (c.lineno, *[a.value if isinstance(a, ast.Constant) else ast.unparse(a) for a in c.args[:2]]) for c in calls
    ]
