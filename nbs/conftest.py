"""Registers the plugin of tests/ that runs notebooks, so that `pytest nbs/api/00_core.ipynb` works too."""


def pytest_addoption(parser, pluginmanager):
    pluginmanager.import_plugin("notebook_items")
