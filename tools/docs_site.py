"""What `mkdocs.yml` needs beside docs/: the repository's other pages, and links between them that hold on the site too.

In the repository a link is a path from file to file. On the site docs/ is the root and README its first page; a linked
file that is not a page (a script, a table) is copied to its place in the repository. A link to a folder, which a site
cannot show, becomes its words.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/LOG.md", "examples/README.md", "benchmarks/REPORT.md"]
LINK = re.compile(r"(!?)\[([^\]\n]*(?:\n[^\]\n]+)?)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and the other files that any page links to."""
    for page in PAGES:
        files.append(File.generated(config, site_path(page), abs_src_path=str(ROOT / page)))
    for page in list(files.documentation_pages()):
        source = repository_path(page)
        for _, _, link, _ in LINK.findall((ROOT / source).read_text("utf-8")):
            target = resolved(source, link)
            if (ROOT / target).is_file() and files.get_file_from_path(site_path(target)) is None:
                files.append(File.generated(config, site_path(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links within the repository into links within the site."""
    source = repository_path(page.file)

    def rewritten(found: re.Match) -> str:
        image, text, link, anchor = found.groups()
        target = resolved(source, link)
        if (ROOT / target).is_dir():
            return text
        if not (ROOT / target).is_file():
            return found[0]  # not a link, or a broken one, of which mkdocs warns
        path = os.path.relpath(site_path(target), os.path.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({path}{anchor or ''})"

    return LINK.sub(rewritten, markdown)


def site_path(path: str) -> str:
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def repository_path(file: File) -> str:
    return os.path.relpath(file.abs_src_path, ROOT)


def resolved(source: str, link: str) -> str:
    """Return a link's target, from the repository's root."""
    return os.path.normpath(os.path.join(os.path.dirname(source), link))
