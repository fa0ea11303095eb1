"""Tables of settings: `{{ settings quantize.integer }}` in a technique's page becomes what its fields say."""

import re

from pared import registry


def on_page_markdown(markdown, page, config, files):
    if not page.file.src_uri.startswith("techniques/"):
        return markdown
    return re.sub(r"\{\{ settings ([a-z_.]+) \}\}", lambda match: table(match[1]), markdown)


def table(name):
    """The settings of a technique as a Markdown table."""
    rows = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    for setting in registry.describe(name)["settings"]:
        default = "" if setting["default"] is None else f"`{setting['default']}`"
        rows.append(f"| `{setting['name']}` | {setting['range']} | {default} | {setting['help']} |")
    return "\n".join(rows) if len(rows) > 2 else "It has no settings."
