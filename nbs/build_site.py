"""Builds the site from the notebooks, offline: `python nbs/build_site.py` writes `_docs/`.

nbdev processes each notebook (documentation of what is exported, links from backticks), smalldocs lays the pages out,
and what a page would otherwise load from elsewhere (KaTeX, the widget manager) comes from npm and is put beside it.
Without npm the site is built without those two and says so. A notebook that does not render, a link inside the site
that leads nowhere, or a page that loads anything from outside fails the build.
"""

import argparse
import html
import importlib
import inspect
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import nbdev.doclinks
import nbdev.processors
import smalldocs.layout
import yaml
from fastcore.docments import _DocmentBase
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.config import nbpath2html
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults
from smalldocs.highlight import highlight
from smalldocs.site import build

ROOT, PACKAGE = Path(__file__).resolve().parents[1], "truthgpt_nb"
NOTEBOOKS, STAGE, VENDOR = ROOT / "nbs", ROOT / "_proc" / "site", ROOT / "_proc" / "npm"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # of the top folder, shown beside the notebooks
FILES = (".yml", ".css", ".png", ".jpg", ".gif", ".svg")  # beside notebooks, copied as they are
HERE = "https://site.invalid"  # stands for the site while nbdev writes its links
NPM = {
    "katex": (
        "katex@0.16.11",
        ("dist/katex.min.css", "dist/katex.min.js", "dist/contrib/auto-render.min.js", "dist/fonts/*.woff2"),
    ),
    "widgets": ("@jupyter-widgets/html-manager@1.0.15", ("dist/embed.js", "dist/*.woff2")),
}
VIEW, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
TITLE = re.compile(r"(?P<title># [^\n]+\s*(?:^>[^\n]*\n?)*)(?P<rest>.*)", flags=re.MULTILINE | re.DOTALL)
UNIT = re.compile(r"(?<=\d) (?=(?:[nµm]?s|[KMG]?i?B)\b)|(?<=→) ")  # the spaces in "→ 1.5 ms": no line ends there
MARKDOWN_LINK = re.compile(r"(\]\()([^()\s]+)(\))")
HTML_LINK = re.compile(r"""((?:href|src)=["'])([^"']+)(["'])""")


# what the pages link to


def link_to_ourselves() -> None:
    "Makes nbdev link names in backticks to this checkout's pages, whether or not the package is installed."
    sys.path.insert(0, str(ROOT))
    d = importlib.import_module(f"{PACKAGE}._modidx").d
    index = {
        "syms": {
            module: {name: place_of(name, *at) for name, at in syms.items()} for module, syms in d["syms"].items()
        },
        "settings": {**d["settings"], "doc_host": HERE, "doc_baseurl": "/", "git_url": HERE, "branch": "main"},
    }
    ours = SimpleNamespace(name=PACKAGE, load=lambda: index)
    others = [e for e in nbdev.doclinks.entry_points(group="nbdev") if e.name != PACKAGE]
    nbdev.doclinks.entry_points = lambda group: [*others, ours]


def place_of(symbol: str, page: str, code: str) -> str | tuple[str, str]:
    """Gives where a name in backticks leads, and its code.

    A method is explained under its class, so it leads there; a private name has no heading and leads to its code.
    """
    name = symbol.removeprefix(code.removesuffix(".py").replace("/", ".") + ".")
    if name.startswith("_"):
        return f"{HERE}/blob/main/{code}#L{nbdev.doclinks._lineno(name, code)}"
    top, _, method = name.partition(".")
    return (page.partition("#")[0] + f"#{top.lower()}" if method else page, code)


def document_in_order() -> None:
    "Makes nbdev document what one cell defines from top to bottom; its `add_show_docs` goes from bottom to top."
    names = nbdev.processors._def_names
    nbdev.processors._def_names = lambda cell, shown: names(cell, shown)[::-1]


def run_only_exports() -> None:
    """Keeps nbdev from running demonstrations that import something, in a namespace without the cells before them.

    Exported code is complete in itself, so running it is enough for what the pages say of it.
    """
    runs = nbdev.processors._do_eval
    exported = {"export", "exports", "exporti", "exec_doc"}

    def wanted(cell) -> bool:
        asked = exported & (cell.directives_ or {}).keys() or "show_doc(" in (cell.source or "")
        return bool(asked and runs(cell))

    nbdev.processors._do_eval = wanted


def document_fields() -> None:
    "Makes nbdev show what the fields of a class mean: it reads comments only of classes that stand in a module."
    owners = {
        symbol.rpartition(".")[2]: module
        for module, symbols in importlib.import_module(f"{PACKAGE}._modidx").d["syms"].items()
        for symbol in symbols
        if symbol.count(".") == module.count(".") + 1
    }
    plain = _DocmentBase.__init__

    def documented(self, shown: object) -> None:
        name = getattr(shown, "__name__", "")
        known = inspect.isclass(shown) and name in owners
        plain(self, getattr(importlib.import_module(owners[name]), name) if known else shown)
        for field, described in getattr(shown, "__pydantic_fields__", {}).items():
            self.dm[field]["docment"] = described.description

    _DocmentBase.__init__ = documented


def page_of(path: Path) -> PurePosixPath | None:
    "Gives the place in the site of a file of the repository, from the site's root; None where it has none."
    if path.is_relative_to(NOTEBOOKS):
        place = PurePosixPath(path.relative_to(NOTEBOOKS).as_posix())
        return place.with_name(nbpath2html(place).with_suffix(".ipynb").name) if path.suffix == ".ipynb" else place
    if path.is_relative_to(ROOT / "images") or path.name in PAGES:
        return PurePosixPath(path.relative_to(ROOT).as_posix())
    return None


def relink(text: str, source: Path) -> str:
    "Turns links to files of the repository, in Markdown or HTML that stands in `source`, into links of the site."

    def target(match: re.Match) -> str:
        before, link, after = match.groups()
        if link.startswith(HERE):
            link = re.sub(rf"^{HERE}/blob/main/{PACKAGE}/(\w+)\.py", r"/source/\1.html", link).removeprefix(HERE)
        parts = urlsplit(link)
        if not parts.path or parts.scheme or link.startswith(("/", "data:", "#")):
            return before + link + after
        place = page_of((source.parent / unquote(parts.path)).resolve())
        if place is None:
            return match.group(0)
        return f"{before}/{place}{'#' + parts.fragment if parts.fragment else ''}{after}"

    return HTML_LINK.sub(target, MARKDOWN_LINK.sub(target, text))


# pages


def stage_notebook(path: Path, order: int) -> list[str]:
    "Processes one notebook into the staging folder; returns what a reader of the build should know."
    notes = []
    notebook = read_nb(path)
    saved = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    split_title(notebook)
    FilterDefaults()(notebook)
    front = notebook.cells[0]  # the pages keep the order of the notebooks' numbers, which their names lose
    front.source = re.sub(r"^output-file: .*$", f"order: {order}", front.source, flags=re.MULTILINE)
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, path)
        outputs = cell.get("outputs", [])
        if any(output.get("name") == "stderr" for output in outputs):
            notes.append(f"{path.name}: what a cell wrote to stderr (warnings, progress) is left out")
            cell.outputs = outputs = [output for output in outputs if output.get("name") != "stderr"]
        for output in outputs:
            data = output.get("data", {})
            for kind in {"text/markdown", "text/html"} & set(data):
                data[kind] = UNIT.sub("\N{NO-BREAK SPACE}", relink("".join(data[kind]), path))
            if VIEW in data:
                model = data.pop(VIEW)["model_id"]
                if model in saved and has_vendor("widgets"):
                    shown.append(model)
                    data["text/html"] = script(VIEW, {"version_major": 2, "version_minor": 0, "model_id": model})
                else:
                    notes.append(f"{path.name}: a widget is shown as text (its state was not saved, or no npm)")
    if shown:
        state = script(STATE, {"version_major": 2, "version_minor": 0, "state": reachable(saved, shown)})
        loader = '<script src="/site_libs/widgets/embed.js" defer></script>'
        notebook.cells.append(mk_cell(f"````{{=html}}\n{state}\n{loader}\n````", "markdown"))
    destination = STAGE / page_of(path)
    destination.parent.mkdir(parents=True, exist_ok=True)
    write_nb(notebook, destination)
    return notes


def split_title(notebook) -> None:
    "Moves what follows title and subtitle in the first cell into a cell of its own: nbdev drops it from the page."
    first = notebook.cells[0]
    title = TITLE.match(first.source) if first.cell_type == "markdown" else None
    if title and title["rest"].strip():
        first.source = title["title"]
        notebook.cells.insert(1, mk_cell(title["rest"].strip(), "markdown"))


def reachable(models: dict, shown: list[str]) -> dict:
    "Gives the widgets that are shown and those that they are made of; a notebook saves every widget it ever made."
    found, new = set(), set(shown)
    while new:
        found |= new
        new = set(re.findall(r"IPY_MODEL_(\w+)", json.dumps([models[name] for name in new]))) & models.keys() - found
    return {name: model for name, model in models.items() if name in found}


def script(kind: str, value: dict) -> str:
    "Writes a value as JSON that a page carries."
    text = json.dumps(value).replace("</", "<\\/")  # so that no value can end the script
    return f'<script type="{kind}">{text}</script>'


def stage_source(path: Path) -> None:
    "Writes the page of one module, with an anchor at each line."
    lines = highlight_lines(path.read_text(encoding="utf-8"))
    rows = "\n".join(f'<span id="L{n}"><a class="line" href="#L{n}">{n}</a>{line}</span>' for n, line in lines)
    place = STAGE / "source" / f"{path.stem}.md"
    place.parent.mkdir(parents=True, exist_ok=True)
    front = f'---\ntitle: "{PACKAGE}/{path.name}"\nsearch: false\ntoc: false\npage-layout: full\n---\n'
    code = f'<div class="listing-source"><pre class="sourceCode"><code class="sourceCode">{rows}</code></pre></div>'
    place.write_text(f"{front}\n````{{=html}}\n{code}\n````\n", encoding="utf-8")


def highlight_lines(code: str) -> Iterator[tuple[int, str]]:
    "Highlights code line by line: a span that runs over several lines is closed and opened again at each end."
    opened = ""
    for number, line in enumerate(highlight(code, "python").splitlines(), start=1):
        line = opened + line
        spans = re.findall(r"<span[^>]*>|</span>", line)
        opened = spans[-1] if spans and spans[-1] != "</span>" else ""
        yield number, line + ("</span>" if opened else "")


def stage(paths: list[Path]) -> list[str]:
    "Fills the staging folder; returns one line for each notebook that did not render."
    failures = []
    for order, path in enumerate(paths):
        print(f"  {path.relative_to(ROOT)}", flush=True)
        try:
            for note in stage_notebook(path, order):
                print(f"    note: {note}")
        except Exception as error:  # whatever a notebook raises: it is named, and the build fails
            failures.append(f"{path.relative_to(ROOT)} did not render: {type(error).__name__}: {error}")
    for path in sorted((ROOT / PACKAGE).glob("*.py")):
        if path.stem != "_modidx":
            stage_source(path)
    for name in PAGES:
        if (ROOT / name).exists():
            (STAGE / name).write_text(relink((ROOT / name).read_text(encoding="utf-8"), ROOT / name), encoding="utf-8")
    if (ROOT / "images").is_dir():
        shutil.copytree(ROOT / "images", STAGE / "images")
    for path in NOTEBOOKS.rglob("*"):
        if path.suffix in FILES and not path.name.startswith("."):
            (STAGE / path.relative_to(NOTEBOOKS)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, STAGE / path.relative_to(NOTEBOOKS))
    stage_config(STAGE / "_quarto.yml")
    return failures


def stage_config(path: Path) -> None:
    "Gives the staged `_quarto.yml` the names of pages in place of notebooks, and leaves out sections without a page."
    text = re.sub(r"\S+\.ipynb", lambda match: str(page_of(NOTEBOOKS / match[0])), path.read_text(encoding="utf-8"))
    config = yaml.safe_load(text)
    sidebar = config["website"]["sidebar"]
    sidebar["contents"] = [entry for entry in sidebar["contents"] if not is_empty(entry)]
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def is_empty(entry: str | dict) -> bool:
    "Says whether a section of the sidebar names a folder in which no page stands."
    contents = entry.get("contents") if isinstance(entry, dict) else None
    return isinstance(contents, str) and not list(STAGE.glob(contents))


# what pages need from npm


def fetch_vendor() -> None:
    "Fetches with npm what `NPM` names, once; without npm, or without a network, says what the site goes without."
    for name, (package, wanted) in NPM.items():
        if has_vendor(name):
            continue
        folder = VENDOR / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"note: without {package}: npm did not give it ({getattr(error, 'stderr', '') or error})".strip())
            continue
        archive = folder / done.stdout.split()[-1]
        with tarfile.open(archive) as files:
            for member in files.getmembers():
                inner = PurePosixPath(member.name).relative_to("package")
                if member.isfile() and any(inner.match(pattern) for pattern in wanted):
                    place = folder / "files" / inner.relative_to("dist")
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(files.extractfile(member).read())
        archive.unlink()


def has_vendor(name: str) -> bool:
    "Says whether a thing from npm is at hand."
    wanted = (PurePosixPath(pattern).relative_to("dist") for pattern in NPM[name][1])
    return all(any((VENDOR / name / "files").glob(str(pattern))) for pattern in wanted)


# after smalldocs


def finish(site: Path) -> None:
    "Makes the pages stand alone: what came from npm goes in, what would be loaded from elsewhere goes out."
    for name in NPM:
        if has_vendor(name):
            shutil.copytree(VENDOR / name / "files", site / "site_libs" / name, dirs_exist_ok=True)
    for sheet in (site / "site_libs").rglob("*.css"):
        sheet.write_text(
            re.sub(r"@import url\(https?:[^)]*\);", "", sheet.read_text(encoding="utf-8")), encoding="utf-8"
        )
    for page in site.rglob("*.html"):
        up = posixpath.relpath(".", page.parent.relative_to(site).as_posix())
        text = page.read_text(encoding="utf-8").replace('"/site_libs/', f'"{up}/site_libs/')
        if has_vendor("katex"):
            text = text.replace(smalldocs.layout.KATEX, f"{up}/site_libs/katex")
        else:
            text = re.sub(rf'<(?:link|script)[^>]*"{re.escape(smalldocs.layout.KATEX)}[^>]*>(?:</script>)?', "", text)
        page.write_text(text, encoding="utf-8")


class Links(HTMLParser):
    "Collects the anchors of a page, its links, and what it loads."

    def __init__(self, page: Path):
        super().__init__()
        self.anchors, self.links, self.loads = {"", "top"}, [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.update(filter(None, (attributes.get("id"), attributes.get("name"))))
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag in ("link", "script", "img", "iframe") and (attributes.get("src") or attributes.get("href")):
            self.loads.append(attributes.get("src") or attributes.get("href"))


def check(site: Path) -> list[str]:
    "Follows every link inside the site; returns one line for each that leads nowhere or loads from outside."
    pages = {page: Links(page) for page in site.rglob("*.html")}
    problems = []
    for page, found in pages.items():
        for link in [*found.links, *found.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in found.loads and parts.scheme != "data":
                    problems.append(f"{page.relative_to(site)} loads {link}")
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file() or (target in pages and anchor not in pages[target].anchors):
                problems.append(f"{page.relative_to(site)} links to {html.unescape(link)}, which is not there")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the site from the notebooks.")
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="where the site goes (default _docs)")
    out = parser.parse_args().out.resolve()
    os.chdir(ROOT)
    os.environ["IN_TEST"] = "1"  # a notebook exports nothing while its page is made
    link_to_ourselves()
    document_in_order()
    document_fields()
    run_only_exports()
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir(parents=True)
    fetch_vendor()
    paths = sorted(nbglob(NOTEBOOKS, as_path=True))
    problems = stage(paths)
    if not problems:
        site = build(STAGE, quiet=True)
        problems += [w for w in site.warnings if "broken link" not in w]
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(site.out, out)
        finish(out)
        problems += check(out)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(paths)} notebooks, {len(problems)} problems: {out}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
