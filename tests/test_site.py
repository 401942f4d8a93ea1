"""What makes README.md and the site from the notebooks: on small examples, without building the site (.ci/run does)."""

import base64
import subprocess
import sys
from pathlib import Path

import pytest
from house import ROOT

sys.path.insert(0, str(ROOT / "nbs"))
import build_readme
import build_site

LINES = ("pip install -c constraints.txt . && truthgpt demo", 'pip install -c constraints.txt -e ".[dev]" && pytest')
DOT = base64.b64encode(b"a picture").decode()


def notebook(*cells):
    "A notebook of (source, outputs) for code and of text for Markdown."
    made = []
    for cell in cells:
        source, outputs = cell if isinstance(cell, tuple) else (cell, None)
        kind = {"cell_type": "markdown"} if outputs is None else {"cell_type": "code", "outputs": outputs}
        made.append({**kind, "source": source.splitlines(True), "metadata": {}})
    return {"cells": made, "metadata": {"kernelspec": {"language": "python"}}}


def test_readme_is_in_step_with_the_front_page():
    done = subprocess.run([sys.executable, ROOT / "nbs" / "build_readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", LINES)
def test_readme_gives_the_line(line):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(f"```bash\n{line}\n```") == 1


def test_readme_shows_code_and_results():
    output = {"output_type": "execute_result", "data": {"text/plain": ["'hello'"]}}
    text, pictures = build_readme.convert(notebook("# Title", ("#| slow\ngreet()", [output])))
    assert text.endswith("# Title\n\n```python\ngreet()\n```\n\n```text\n'hello'\n```\n")
    assert pictures == {}


@pytest.mark.parametrize("directive", ["#| hide", "#|hide", "#| include: false"])
def test_readme_leaves_hidden_cells_out(directive):
    output = {"output_type": "stream", "name": "stdout", "text": ["secret"]}
    text, _ = build_readme.convert(notebook("# Title", (f"{directive}\nx = 'secret'", [output])))
    assert "secret" not in text


def test_readme_can_leave_out_the_code_and_keep_the_result():
    output = {"output_type": "stream", "name": "stdout", "text": ["shown"]}
    text, _ = build_readme.convert(notebook(("#| echo: false\nprint(x)", [output])))
    assert "print" not in text
    assert "shown" in text


def test_readme_puts_pictures_into_files():
    output = {"output_type": "display_data", "data": {"image/png": DOT, "text/plain": "<Figure>"}}
    text, pictures = build_readme.convert(notebook(("#| fig-alt: a dot\nplot()", [output])))
    assert "![a dot](images/readme-1.png)" in text
    assert pictures == {"readme-1.png": b"a picture"}


@pytest.mark.parametrize(
    ("link", "wanted"),
    [
        ("api/00_core.ipynb", "nbs/api/00_core.ipynb"),
        ("../CHANGELOG.md#x", "CHANGELOG.md#x"),
        ("https://example.com/x", "https://example.com/x"),
        ("#try-it", "#try-it"),
    ],
)
def test_readme_links_hold_from_the_top_folder(link, wanted):
    text, _ = build_readme.convert(notebook(f"[a]({link})"))
    assert f"[a]({wanted})" in text


def test_readme_links_lead_into_a_repository_that_is_named():
    cells = notebook("[a](api/00_core.ipynb) ![b](../images/b.png)")
    text, _ = build_readme.convert(cells, "https://example.com/x/blob/main/")
    assert "(https://example.com/x/blob/main/nbs/api/00_core.ipynb)" in text
    assert "(https://example.com/x/raw/main/images/b.png)" in text


def test_a_fence_is_longer_than_what_it_holds():
    assert build_readme.fence("a\n```\nb", "text") == "````text\na\n```\nb\n````"


@pytest.mark.parametrize(
    ("link", "wanted"),
    [
        ("../api/00_core.ipynb#errors", "/api/core.html#errors"),
        ("../../CONTRIBUTING.md", "/CONTRIBUTING.html"),
        ("../../images/a.png", "/images/a.png"),
        ("../../LICENSE", "../../LICENSE"),  # not in the site: the check of the links names it
        ("https://example.com/a.ipynb", "https://example.com/a.ipynb"),
        (f"{build_site.HERE}/api/core.html#x", "/api/core.html#x"),
        (f"{build_site.HERE}/blob/main/truthgpt_nb/core.py#L7", "/source/core.html#L7"),
    ],
)
def test_links_of_the_site(link, wanted):
    here = ROOT / "nbs" / "tutorials" / "01_x.ipynb"
    wanted = wanted.replace(".html", ".ipynb") if "ipynb" in link and not link.startswith("http") else wanted
    wanted = wanted.replace(".html", ".md") if link.endswith("CONTRIBUTING.md") else wanted
    assert build_site.relink(f"[a]({link})", here) == f"[a]({wanted})"
    assert build_site.relink(f'<img src="{link}">', here) == f'<img src="{wanted}">'


def site(folder: Path, **pages: str) -> list[str]:
    "Checks a site of a few pages."
    for name, body in pages.items():
        (folder / f"{name}.html").write_text(f"<html><body>{body}</body></html>")
    return build_site.check(folder)


def test_a_site_whose_links_hold(tmp_path):
    assert (
        site(tmp_path, index='<a href="a.html#x">a</a> <a href="https://example.com">e</a>', a='<p id="x">x</p>') == []
    )


@pytest.mark.parametrize(
    "body",
    [
        '<a href="nowhere.html">a</a>',
        '<a href="index.html#nowhere">a</a>',
        '<a href="#nowhere">a</a>',
        '<img src="nowhere.png">',
        '<script src="https://example.com/x.js"></script>',
        '<link rel="stylesheet" href="https://example.com/x.css">',
    ],
)
def test_a_broken_link_is_found(tmp_path, body):
    assert len(site(tmp_path, index=body)) == 1


def test_highlighting_closes_its_spans_on_each_line():
    lines = dict(build_site.highlight_lines('x = """a\nb\nc"""\ny = 1'))
    assert list(lines) == [1, 2, 3, 4]
    assert all(line.count("<span") == line.count("</span>") for line in lines.values())
    assert '<span class="st">b</span>' in lines[2]


def test_text_after_the_title_is_kept():
    found = build_site.TITLE.match("# core\n\n> One line\n\nThe problem.\n\n> a quotation")
    assert found["title"].strip() == "# core\n\n> One line"
    assert found["rest"].strip() == "The problem.\n\n> a quotation"


@pytest.mark.parametrize(
    ("symbol", "wanted"),
    [
        ("truthgpt_nb.cache.CacheManager", ("api/cache.html#cachemanager", "truthgpt_nb/cache.py")),
        ("truthgpt_nb.cache.CacheManager.get", ("api/cache.html#cachemanager", "truthgpt_nb/cache.py")),
    ],
)
def test_a_method_leads_to_its_class(symbol, wanted):
    page = f"api/cache.html#{symbol.removeprefix('truthgpt_nb.cache.').lower()}"
    assert build_site.place_of(symbol, page, "truthgpt_nb/cache.py") == wanted


def test_a_private_name_leads_to_its_code():
    place = build_site.place_of("truthgpt_nb.text._Reader", "api/text.html#_reader", "truthgpt_nb/text.py")
    line = int(place.removeprefix(f"{build_site.HERE}/blob/main/truthgpt_nb/text.py#L"))
    code = (ROOT / "truthgpt_nb" / "text.py").read_text(encoding="utf-8").splitlines()
    assert code[line - 1].startswith("class _Reader")


def test_a_page_carries_only_the_widgets_that_it_shows():
    models = {
        "a": {"state": {"children": ["IPY_MODEL_b"]}},
        "b": {"state": {"layout": "IPY_MODEL_c", "other": "IPY_MODEL_a"}},
        "c": {"state": {"width": "IPY_MODEL_gone"}},
        "d": {"state": {"children": ["IPY_MODEL_a"], "value": "/somebody/s/folder"}},
    }
    assert list(build_site.reachable(models, ["a"])) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "lines_may_end"),
    [("1.5 ms", 0), ("15.3 MiB → 7.64 MiB", 1), ("3 calls", 1), ("12 B", 0), ("2 settings", 1), ("1 s", 0)],
)
def test_a_number_stays_with_its_unit(text, lines_may_end):
    assert build_site.UNIT.sub("\N{NO-BREAK SPACE}", text).count(" ") == lines_may_end
