"""What the site has beside docs/: pages made of examples/ and configs/, and pictures that pages show.

Links in pages are those that GitHub follows; here links out of docs/ are turned to these pages and pictures. mkdocs
runs this file (see mkdocs.yml).
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>\.\.?/[^):#]+)\)")
FOLDERS = {"examples": "Examples", "configs": "Configurations"}
LANGUAGES = {".py": "python", ".yaml": "yaml"}
PICTURES = "pictures"  # folder of the site


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each of `FOLDERS`, and the pictures of benchmarks/."""
    for folder, title in FOLDERS.items():
        parts = [f"# {title}\n\nFiles of `{folder}/`, as they stand."]
        for file in sorted(file for file in (ROOT / folder).iterdir() if file.suffix in LANGUAGES):
            parts.append(f"## {file.name}\n\n```{LANGUAGES[file.suffix]}\n{file.read_text()}```")
        files.append(File.generated(config, f"{folder}.md", content="\n\n".join(parts)))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"{PICTURES}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that lead out of docs/ to what stands for their targets on the site."""
    here = PurePosixPath("docs", page.file.src_uri).parent

    def turned(match: re.Match[str]) -> str:
        target = PurePosixPath(os.path.normpath(here / match["target"]))
        if target.parts[0] in FOLDERS:
            anchor = f"#{target.name.replace('.', '')}" if target.suffix else ""
            there = PurePosixPath("docs", f"{target.parts[0]}.md{anchor}")
        elif target.suffix == ".png" and target.parts[0] == "benchmarks":
            there = PurePosixPath("docs", PICTURES, target.name)
        elif target.parts[0] == "docs":
            return match[0]
        else:
            return match["text"]  # the site does not have it
        return f"[{match['text']}]({os.path.relpath(there, here)})"

    return LINK.sub(turned, markdown)
