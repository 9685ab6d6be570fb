"""Answer many queries about each of many long documents, from one compressed prompt cache per document."""

__version__ = "0.1.0"
