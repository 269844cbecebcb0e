"""The version of Hearth, read by the build and by `hearth --version`."""

__version__ = "0.1.0"
