"""Prepares docstrings for mkdocstrings: as an extension of Griffe, which reads them."""

import re
from typing import Any

import griffe

from website.algorithm import with_boxes
from website.reference import with_links


class Docstrings(griffe.Extension):
    """Sets algorithm boxes as mathematics and examples as code, and makes links of public names."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object that was read."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = with_links(with_boxes(text))
