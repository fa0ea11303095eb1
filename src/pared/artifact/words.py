"""Words that manifests are made of; part of version 1 of the format, so it never changes."""

WORDS = b""
