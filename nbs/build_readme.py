"""Writes README.md from nbs/index.ipynb: `python nbs/build_readme.py`; with `--check` only says whether it is in step.

Prose stays as it is; code cells become fences in their language, results follow them, pictures go to images/.
Cells marked `#| hide` are left out. Links are written from the top folder, or into the published site or repository
when pyproject.toml names one (a package index shows no files of the repository).
"""

import argparse
import base64
import json
import posixpath
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK, README, IMAGES = ROOT / "nbs" / "index.ipynb", ROOT / "README.md", ROOT / "images"
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
HTML_LINK = re.compile(r"""((?:href|src)=["'])([^"']+)(["'])""")
PICTURES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}


def directives(source: str) -> dict[str, str]:
    "Reads the `#|` lines of a code cell."
    found = re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", source, flags=re.MULTILINE)
    return dict(found)


def relink(text: str, base: str) -> str:
    "Rewrites links of the notebook, which stand relative to nbs/, so that they hold from the top folder."

    def target(match: re.Match) -> str:
        before, link, after = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|#|/", link):
            return match.group(0)
        kind = base.replace("/blob/", "/raw/") if link.endswith(tuple(PICTURES.values())) else base
        return before + kind + posixpath.normpath(posixpath.join("nbs", link)) + after

    return HTML_LINK.sub(target, LINK.sub(target, text))


def picture(kind: str, data: str, number: int, title: str, pictures: dict[str, bytes]) -> str:
    "Notes a picture to be written and returns the line that shows it."
    name = f"readme-{number}.{PICTURES[kind]}"
    pictures[name] = data.encode() if kind == "image/svg+xml" else base64.b64decode(data)
    return f"![{title}](../images/{name})"


def result(output: dict, number: int, title: str, pictures: dict[str, bytes]) -> str:
    "Turns one output of a cell into Markdown: the richest form that a README can show."
    if output["output_type"] == "stream":
        return fence("".join(output["text"]).rstrip(), "text") if output["name"] == "stdout" else ""
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items() if not kind.endswith("json")}
    for kind in PICTURES:
        if kind in data:
            return picture(kind, data[kind], number, title, pictures)
    if "text/markdown" in data:
        return data["text/markdown"].strip()
    return fence(data["text/plain"].rstrip(), "text") if "text/plain" in data else ""


def fence(text: str, language: str) -> str:
    "Puts text in a fence that it cannot close."
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def convert(notebook: dict, base: str = "") -> tuple[str, dict[str, bytes]]:
    "Turns the notebook into the text of README.md and the pictures that it shows."
    parts, pictures = [], {}
    language = notebook["metadata"].get("kernelspec", {}).get("language", "python")
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        if cell["cell_type"] != "code":
            continue
        said = directives(source)
        if "hide" in said or said.get("include") == "false":
            continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()
        if code and said.get("echo") != "false":
            parts.append(fence(code, language))
        title = said.get("fig-alt") or said.get("fig-cap") or "what the cell above shows"
        for output in cell.get("outputs", []):
            parts.append(result(output, len(pictures) + 1, title.strip("\"'"), pictures))
    warning = "<!-- Written by nbs/build_readme.py from nbs/index.ipynb: edit that notebook. -->"
    return relink("\n\n".join([warning, *filter(None, parts)]), base) + "\n", pictures


def base_of_links() -> str:
    "Gives what links to files begin with: the repository's address if pyproject.toml names one, else nothing."
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    return f"{urls['Repository'].rstrip('/')}/blob/main/" if "Repository" in urls else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes README.md from nbs/index.ipynb.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md is out of step")
    check = parser.parse_args().check
    text, pictures = convert(json.loads(NOTEBOOK.read_text(encoding="utf-8")), base_of_links())
    wanted = {README: text.encode(), **{IMAGES / name: data for name, data in pictures.items()}}
    stale = [path for path, data in wanted.items() if not path.exists() or path.read_bytes() != data]
    stale += [path for path in IMAGES.glob("readme-*") if path not in wanted]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is {'out of step with nbs/index.ipynb' if check else 'written'}")
        if not check and path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(wanted[path])
        elif not check:
            path.unlink()
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
