"""What mkdocs.yml cannot say: documents of the repository's first folder are pages too.

MkDocs reads one folder, and GitHub shows README.md and its like in another. Here they become one flat folder, and a link
loses the folder that it names. `mkdocs build --strict` then fails on a link that leads nowhere.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in ROOT.glob("*.md"):
        files.append(File.generated(config, path.name, abs_src_path=str(path)))
    # a browser shows a file without a suffix as a download
    files.append(File.generated(config, "LICENSE.txt", abs_src_path=str(ROOT / "LICENSE")))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"\]\((?:docs/|\.\./)", "](", markdown).replace("](LICENSE)", "](LICENSE.txt)")
