"""Answer many queries about each of many long documents, from one compressed prompt cache per document."""

from turboquant.runtime.versions import __version__ as __version__
