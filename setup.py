"""Reads the requirements and the extras from settings.ini, their only source, and puts that file into the wheel."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SETTINGS = Path(__file__).with_name("settings.ini")
SUFFIX = "_requirements"


class BuildWithSettings(build_py):
    "Copies settings.ini beside the modules; an editable install has it in the checkout already."

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(str(SETTINGS), str(Path(self.build_lib) / "truthgpt_nb" / SETTINGS.name))


config = ConfigParser(interpolation=None)
with SETTINGS.open(encoding="utf-8") as file:  # `ConfigParser.read` would pass over a missing file in silence
    config.read_file(file)
lines = {key: value.split("\n")[1:] for key, value in config["DEFAULT"].items() if key.endswith("requirements")}
requirements = lines.pop("requirements")
extras = {key.removesuffix(SUFFIX): extra for key, extra in lines.items()}
extras["all"] = sorted({line for key, extra in extras.items() if key not in ("dev", "docs") for line in extra})
setup(install_requires=requirements, extras_require=extras, cmdclass={"build_py": BuildWithSettings})
