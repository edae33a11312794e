"""What mkdocs.yml cannot say: pages that are in the navigation only where they exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RECORDED = "results"
"""Folder of the pages on recorded results."""


def on_config(config: Any) -> Any:
    """Append the recorded results to the navigation: its README first, then the rest by name."""
    folder = Path(config["docs_dir"]) / RECORDED
    pages = sorted(folder.rglob("*.md"), key=lambda page: (page.name != "README.md", page))
    if pages:
        names = [page.relative_to(config["docs_dir"]).as_posix() for page in pages]
        config["nav"].append({"Recorded results": names})
    return config
