"""A hook of mkdocs: files of the repository that a page links to, such as results in JSON, become part of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add them, under repository/."""
    linked = {name for page in files.documentation_pages() for name in LINK.findall(page.content_string)}
    for name in sorted(linked):
        source = str(ROOT / name)
        files.append(File.generated(config, f"repository/{name}", abs_src_path=source, inclusion=InclusionLevel.INCLUDED))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link to them there."""
    return LINK.sub(r"](repository/\1", markdown)
