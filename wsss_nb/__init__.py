from importlib.metadata import version

__version__ = version('wsss_nb')
