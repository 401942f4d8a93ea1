"""Registers the plugin that runs notebooks and reads --slow, --network and --cuda."""


def pytest_addoption(parser, pluginmanager):
    pluginmanager.import_plugin("notebook_items")
