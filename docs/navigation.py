"""The order of the pages. A technique's page is found by its file, so adding one edits nothing here."""

from pathlib import Path

_FIRST = ["index.md", "how-it-works.md"]
_LAST = ["add-a-technique.md", "file-format.md", "coders.md", "decisions.md"]


def on_config(config):
    root = Path(config["docs_dir"])
    pages = {page.relative_to(root).as_posix() for page in root.rglob("*.md")}
    techniques = sorted(page for page in pages if page.startswith("techniques/"))
    others = sorted(pages - set(_FIRST) - set(_LAST) - set(techniques))
    nav: list = [page for page in _FIRST if page in pages] + others
    if techniques:
        nav.append({"Techniques": techniques})
    config["nav"] = nav + [page for page in _LAST if page in pages]
    return config
