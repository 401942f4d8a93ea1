"""Reads the requirements and the extras from settings.ini, their only source."""

from configparser import ConfigParser

from setuptools import setup

config = ConfigParser(interpolation=None)
with open("settings.ini", encoding="utf-8") as file:
    config.read_file(file)
settings = config["DEFAULT"]
suffix = "_requirements"
extras = {key.removesuffix(suffix): value.split("\n")[1:] for key, value in settings.items() if key.endswith(suffix)}
users = ("dev", "docs")
extras["all"] = sorted({line for key, lines in extras.items() if key not in users for line in lines})
setup(install_requires=settings["requirements"].split("\n")[1:], extras_require=extras)
