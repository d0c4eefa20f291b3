"""The version: one place, read by packaging, `adapter --version` and the files we write."""

__version__ = "0.1.0.dev0"
