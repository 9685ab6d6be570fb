"""The form in which two answers are compared."""

from __future__ import annotations

import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, English articles and superfluous spaces.

    It is the form of the SQuAD metrics (Rajpurkar et al. 2016, arXiv 1606.05250).

    >>> normalised(" The  answer, of course: No. ")
    'answer of course no'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
