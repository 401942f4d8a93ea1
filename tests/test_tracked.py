"""What stands in the files of the repository: nothing of one machine, no registry, no pictographs."""

import re

import pytest
from house import ROOT, tracked

TEXT = (".py", ".md", ".toml", ".ini", ".txt", ".in", ".yml", ".yaml", ".css", ".ipynb", ".json", ".cfg", "")
REGISTRIES = re.compile(r"\b(pypi|pythonhosted|npmjs|debian)\.(org|com)\b")
PLACES = re.compile(r"(?<![\w.])/(work|root|home/\w+|Users/\w+)/")
PICTOGRAPHS = re.compile(r"[\U0001f000-\U0001faff\u2600-\u26ff\u2705\u274c\u2728\ufe0f]")
CHECKS = {"a registry's host": REGISTRIES, "a folder of one machine": PLACES, "a pictograph": PICTOGRAPHS}


def problems(name, text):
    "The lines of a text that hold what no file here should."
    return [
        f"{name}, line {number}: {what}: {found[0]!r}"
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in CHECKS.items()
        if (found := pattern.search(line))
    ]


def test_tracked_files_hold_none_of_it():
    names = [name for name in tracked() if (ROOT / name).suffix in TEXT]
    assert "tests/test_tracked.py" in names
    found = [problem for name in names for problem in problems(name, (ROOT / name).read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "see https://" + "pypi" + ".org/project/x",
        "cache_dir = '" + "/root" + "/.cache'",
        'File "' + "/work" + '/main/x.py"',
        "done " + chr(0x1F389),
        chr(0x2705) + " kept",
    ],
)
def test_each_is_found(line):
    assert len(problems("x", "fine\n" + line)) == 1


def test_what_is_allowed_is_not_found():
    assert problems("x", "a path such as network/root/x, a check mark \u2713, an arrow \u2192, 1.15\u00d7") == []
