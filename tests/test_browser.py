"""Tutorial 01 in a real JupyterLab and a real browser: it is run, a prompt is typed, buttons are clicked, answers read.

What the browser saw last is kept as a picture in pytest's temporary folder when the test fails.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from house import ROOT, Notebook

TUTORIAL = ROOT / "nbs" / "tutorials" / "01_truthgpt_demo.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
missing = [name for name in ("jupyterlab", "playwright") if find_spec(name) is None] + ["chromium"] * (not CHROMIUM)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(not TUTORIAL.exists(), reason="this checkout has no tutorial 01"),
]

SOON, LONG = 120, 900  # seconds; limits, not waits: a machine with two busy cores needs them
LAB = "--no-browser --allow-root --ip=127.0.0.1 --IdentityProvider.token= --ServerApp.disable_check_xsrf=True"
LAB += " --LabApp.news_url= --LabApp.expose_app_in_browser=True --ServerApp.port_retries=0"
BROWSER = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking --disable-component-update"

# how far the notebook on show is
STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const cells = panel.content.widgets.filter(c => c.model.type === 'code' && c.model.sharedModel.source.trim());
    const outputs = cells.flatMap(c => c.model.outputs.toJSON());
    return {
        left: cells.filter(c => !c.model.executionCount).length,
        status: panel.sessionContext.session?.kernel?.status ?? 'none',
        errors: outputs.filter(o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`),
    };
}"""
# brings the first code cell with these words into view: JupyterLab takes cells far away out of the page
SHOW = """words => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const has = c => c.model.type === 'code' && c.model.sharedModel.source.includes(words);
    notebook.activeCellIndex = notebook.widgets.findIndex(has);
    return notebook.scrollToItem(notebook.activeCellIndex, 'start');
}"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(ready, seconds, what):
    "Asks again and again, and says what it waited for when the time is over."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if ready():
            return
        time.sleep(0.5)
    pytest.fail(f"after {seconds} s: {what}")


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@contextmanager
def jupyterlab(folder):
    "A JupyterLab of its own on `folder/work`, without the user's settings; gone at the end, with its kernels."
    port, log = free_port(), folder / "jupyterlab.log"
    homes = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    settings = folder / "jupyter_config_dir" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    homes |= {"TRUTHGPT_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        *LAB.split(),
        f"--port={port}",
        f"--ServerApp.root_dir={folder}/work",
    ]
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | homes, stdout=output, stderr=output, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: server.poll() is not None or answers(f"{url}/api"), SOON, "JupyterLab does not answer")
        assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()[-3000:]}"
        yield url
    finally:
        server.send_signal(signal.SIGTERM)  # ends the kernels, which have sessions of their own
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@contextmanager
def browser_page(picture):
    "A page of Debian's Chromium, 1280 wide; `picture` shows what it saw last when the block fails."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*BROWSER.split(), "--disable-sync"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(SOON * 1000)
            try:
                yield page
            except BaseException as error:
                page.screenshot(path=picture)
                error.add_note(f"what the browser saw: {picture}")
                raise
        finally:
            browser.close()


def as_a_reader_finds_it(path):
    "The notebook without outputs, without its long cells, and without those that fill the panels in for the site."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = Notebook.read(path).code
    out = {
        cell.number for cell in code if {"slow", "benchmark"} & set(cell.directives) or "panel.start()" in cell.source
    }
    notebook["cells"] = [cell for number, cell in enumerate(notebook["cells"], 1) if number not in out]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    notebook["metadata"].pop("widgets", None)
    return json.dumps(notebook)


def run_notebook(page, url):
    "Opens a notebook, runs all cells, and waits until the last has run."
    page.goto(f"{url}/lab/tree/{TUTORIAL.name}?reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    wait_until(lambda: page.evaluate(STATE)["status"] == "idle", SOON, "the kernel is not idle")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")

    def finished():
        state = page.evaluate(STATE)
        assert not state["errors"], state["errors"]
        return not state["left"] and state["status"] == "idle"

    wait_until(finished, LONG, "the notebook has not run to its end")


def panel_of(page, words, name):
    "The panel that the cell with these words shows."
    page.evaluate(SHOW, words)
    panel = page.locator(f".truthgpt-{name}-panel")
    panel.wait_for()
    panel.scroll_into_view_if_needed()
    return panel


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    (folder / "work").mkdir()
    (folder / "work" / TUTORIAL.name).write_text(as_a_reader_finds_it(TUTORIAL), encoding="utf-8")
    with jupyterlab(folder) as url:
        yield url


def test_the_panels_of_tutorial_01(lab, tmp_path):
    from playwright.sync_api import expect

    with browser_page(tmp_path / "failure.png") as page:
        run_notebook(page, lab)

        panel = panel_of(page, "TextPanel(", "text")
        prompt, write = panel.get_by_label("prompt"), panel.get_by_role("button", name="Write")
        state, written = panel.locator(".truthgpt-state"), panel.locator(".truthgpt-written")
        asked = "The old man went down to the"
        prompt.fill(asked)
        write.click()
        expect(state).to_contain_text("tokens/s", timeout=SOON * 1000)
        answer = written.inner_text()
        assert answer.startswith(asked) and len(answer) > len(asked) + 20, answer
        write.click()
        expect(state).to_contain_text("from the cache")
        assert written.inner_text() == answer

        panel.get_by_text("Settings").click()
        expect(panel.locator('[title^="how many tokens to write at most"]').first).to_be_visible()
        tokens = panel.get_by_label("max_new_tokens")
        tokens.fill("-3")
        tokens.press("Tab")
        write.click()
        expect(state).to_contain_text("max_new_tokens should be greater than or equal to 1, got -3")
        assert written.inner_text() == answer
        tokens.fill("32")
        tokens.press("Tab")
        prompt.fill("<b>An hour</b> later, she")
        write.click()
        expect(state).to_contain_text(re.compile("tokens/s"), timeout=SOON * 1000)
        expect(written).to_contain_text("<b>An hour</b> later, she")

        panel = panel_of(page, "ProfilePanel(", "profile")
        panel.get_by_role("button", name="Profile").click()
        expect(panel.locator(".truthgpt-state")).to_contain_text("One call takes", timeout=LONG * 1000)
        expect(panel.locator("table", has_text="aten::")).to_be_visible()
        expect(panel.get_by_text("module patterns, by self time")).to_be_visible()
        expect(panel.locator("table", has_text="model.layers.*")).to_be_visible()
        figure = panel.locator("img")
        assert figure.evaluate("image => image.complete && image.naturalWidth") > 300
