"""The version of this package, for the build and for every record."""

__version__ = "0.1.0"
