"""What is built from this checkout: an sdist, from it a wheel, and in both what they promise."""

import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser

import pytest
from house import PACKAGE, ROOT, settings, tracked
from packaging.requirements import Requirement

FILES = (f"{PACKAGE}/settings.ini", f"{PACKAGE}/py.typed", f"{PACKAGE}/__init__.py", f"{PACKAGE}/core.py")
# built in this interpreter's environment, with no isolation and so with no network
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(what, folder, out):
    "Builds one distribution of the project in a folder; returns its path."
    done = subprocess.run([sys.executable, "-c", BUILD, what, str(out)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    "The sdist, unpacked."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    with tarfile.open(build("build_sdist", source, out)) as archive:
        archive.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    "The wheel, built from the sdist and from nothing else."
    return zipfile.ZipFile(build("build_wheel", sdist, tmp_path_factory.mktemp("wheel")))


def metadata(wheel):
    "The wheel's METADATA."
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def normal(requirement):
    "A requirement without its marker, comparable."
    return requirement.name, str(requirement.specifier), tuple(sorted(requirement.extras))


def test_the_sdist_has_what_builds_it(sdist):
    wanted = ("settings.ini", "constraints.txt", "LICENSE", "README.md", "setup.py", "nbs/api/00_core.ipynb")
    assert [name for name in wanted if not (sdist / name).is_file()] == []


def test_the_wheel_has_its_files(wheel):
    assets = [name for name in tracked() if name.startswith(f"{PACKAGE}/assets/")]
    assert sorted({*FILES, *assets} - set(wheel.namelist())) == []


def test_the_wheel_has_nothing_else(wheel):
    others = [name for name in wheel.namelist() if not name.startswith((f"{PACKAGE}/", f"{PACKAGE}-"))]
    assert others == []


def test_settings_in_the_wheel_are_those_of_the_checkout(wheel):
    assert wheel.read(f"{PACKAGE}/settings.ini") == (ROOT / "settings.ini").read_bytes()


def test_the_wheel_asks_for_what_settings_ini_says(wheel):
    stated = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist", [])]
    plain = {normal(r) for r in stated if r.marker is None}
    assert plain == {normal(r) for r in settings()["requirements"]}
    assert plain, "a wheel without requirements installs and then fails"


def test_the_wheel_has_the_extras_of_settings_ini(wheel):
    stated = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist", [])]
    wanted = {key: found for key, found in settings().items() if key != "requirements"}
    wanted["all"] = [r for key, found in wanted.items() if key not in ("dev", "docs") for r in found]
    assert sorted(metadata(wheel).get_all("Provides-Extra")) == sorted(wanted)
    for extra, requirements in wanted.items():
        got = {normal(r) for r in stated if r.marker is not None and r.marker.evaluate({"extra": extra})}
        assert got == {normal(r) for r in requirements}, extra


def test_the_wheel_has_the_command_and_the_licence(wheel):
    names = wheel.namelist()
    entry_points = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert f"truthgpt = {PACKAGE}.cli:main" in entry_points
    assert any(name.endswith("/LICENSE") for name in names)


def test_an_sdist_without_settings_builds_no_wheel(sdist, tmp_path):
    # without this, a manifest that forgets settings.ini gives a wheel that asks for nothing
    broken = shutil.copytree(sdist, tmp_path / "broken")
    (broken / "settings.ini").unlink()
    with pytest.raises(AssertionError, match=r"settings\.ini"):
        build("build_wheel", broken, tmp_path)


def test_constraints_cover_every_requirement():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[pin.name.lower().replace("_", "-")] = str(pin.specifier).removeprefix("==")
    # xformers is never installed by CI: it needs CUDA
    wanted = [r for key, found in settings().items() if key != "xformers" for r in found]
    missing = [str(r) for r in wanted if r.name.lower() not in pins or not r.specifier.contains(pins[r.name.lower()])]
    assert missing == []


def test_one_file_states_the_requirements():
    parser = ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert "\ndependencies" not in pyproject
    assert "[project.optional-dependencies]" not in pyproject
