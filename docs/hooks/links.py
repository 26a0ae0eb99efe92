"""Links out of docs/, as they are in the repository: what they lead to joins the site under its path in the tree."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)\s#:]+)")


def _source(uri):
    return Path("docs", uri) if (ROOT / "docs" / uri).exists() else Path(uri)


def _uri(page, link):
    """The place in the site of what a page links to; of a folder that of the file which says most of it."""
    path = Path(os.path.normpath(_source(page).parent / link))
    inside = ("README.md", "__init__.py", "pyproject.toml", "CMakeLists.txt")
    path = next((path / name for name in inside if (ROOT / path / name).exists()), path)
    return path.relative_to("docs").as_posix() if path.parts[0] == "docs" else path.as_posix()


def on_files(files, config):
    pages = ["README.md", *(file.src_uri for file in files.documentation_pages() if not file.generated_by)]
    for page in pages:  # which grow by those that are found
        links = LINK.findall((ROOT / _source(page)).read_text(encoding="utf-8"))
        for uri in (page, *(_uri(page, link) for link in links)):
            if files.get_file_from_path(uri) is None and (ROOT / uri).is_file():
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / uri)))
                pages += [uri] if uri.endswith(".md") else []


def on_page_markdown(markdown, page, **_):
    def there(found):
        uri = _uri(page.file.src_uri, found[1])
        way = os.path.relpath(uri, os.path.dirname(page.file.src_uri) or ".")
        return f"]({way}" if (ROOT / _source(uri)).is_file() else found[0]

    return LINK.sub(there, markdown)
