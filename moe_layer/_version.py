"""The version, in one place; setuptools and csrc/build.py read this file without importing it."""

__version__ = "0.1.0"
