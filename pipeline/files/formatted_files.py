"""Files of formatted text: PDF, DOCX, HTML and EPUB. Each is a row."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.files.columns import Needs
from pipeline.files.encoding import NotText, Unreadable
from pipeline.files.extraction import NoText, extracted_text, require_packages
from pipeline.files.formats import InputFile
from pipeline.files.text_files import WholeText


class FormattedText(WholeText):
    """Files whose text is taken out of them by the packages of the extra `documents`."""

    name = "PDF, DOCX, HTML or EPUB"
    magic = b"%PDF-"

    def __init__(self) -> None:
        super().__init__(".pdf", ".docx", ".html", ".htm", ".xhtml", ".epub")

    def columns(self, file: InputFile, needs: Needs) -> Sequence[str]:
        """Return the two columns of texts. Raises InputError if the extra is not installed."""
        require_packages(file)
        return super().columns(file, needs)

    def text(self, file: InputFile, needs: Needs) -> str | Unreadable:
        """Return the text of a file, or why it has none."""
        require_packages(file)
        try:
            return extracted_text(file.name, file.content(), needs.encoding)
        except NoText as error:
            return Unreadable(str(error))
        except NotText as error:
            return Unreadable(f"{error}{needs.remedy}")
