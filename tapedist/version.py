"""The version, for those who must not import the package's face to learn it."""

__version__ = "0.1.0"
