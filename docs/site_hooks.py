"""What MkDocs calls while it builds the site: files from elsewhere, links to them, and formulas as MathML."""

from __future__ import annotations

import html
import posixpath
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = (
    "prime_kernels",
    *(f"prime_kernels.integrations{name}" for name in ("", ".trl", ".verl", ".openrlhf", ".skyrl")),
)
DOCUMENTED += ("prime_trainer.prm",)
FOLDERS = ("bench", "examples")
"""Part of the site under their own names, so that pages can link to results and settings."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "configuration.md", content=configuration()))
    with tempfile.TemporaryDirectory() as folder:
        reference(Path(folder))
        for path in sorted(Path(folder).rglob("*.*")):
            name = f"api/{path.relative_to(folder).as_posix()}"
            files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to folders lead to their README; what is not part of the site stays as text. Fenced code is left alone."""
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    source = page.file.src_uri
    return "".join(p if p.startswith("```") else LINK.sub(lambda m: _linked(m, source), p) for p in parts)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML here, so that a reader's browser needs no script and no font from elsewhere."""
    return FORMULA.sub(lambda found: mathml(html.unescape(found[2]), found[1] == "div"), content)


def mathml(formula: str, block: bool) -> str:
    from latex2mathml.converter import convert

    return convert(formula.strip(), display="block" if block else "inline")


def _linked(found: re.Match[str], source: str) -> str:
    text, target, anchor = found[1], found[2], found[3] or ""
    here = posixpath.dirname(source if source.split("/")[0] in FOLDERS else f"docs/{source}")
    path = posixpath.normpath(posixpath.join(here, target))
    if (ROOT / path).is_dir() and (ROOT / path / "README.md").is_file():
        path = f"{path}/README.md"
    inside = path.removeprefix("docs/") if path.startswith("docs/") else path
    if not path.startswith("docs/") and (path.split("/")[0] not in FOLDERS or (ROOT / path).is_dir()):
        assert (ROOT / path).exists(), f"{source} links to {target}, which does not exist"
        return text
    return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(source) or '.')}{anchor})"


def reference(folder: Path) -> None:
    """The API reference of the public modules, from their docstrings."""
    import pdoc
    import pdoc.render

    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*DOCUMENTED, output_directory=folder)


def configuration() -> str:
    """Every configuration key with its type, default and description, as Markdown."""
    from prime_trainer.config.run_config import RunConfig

    lines = ["# Configuration keys", "", "`--section.key value` on the command line overrides the TOML file."]
    for title, model, prefix in _sections(RunConfig, ""):
        lines += ["", f"## {title}", ""]
        for name, field in model.model_fields.items():
            if not hasattr(field.annotation, "model_fields"):
                default = field.get_default(call_default_factory=True)
                plain = isinstance(field.annotation, type) and "[" not in str(field.annotation)
                kind = field.annotation.__name__ if plain else re.sub(r"typing\.|pathlib\.", "", str(field.annotation))
                about = " ".join((field.description or "").split())
                # A list and no table: on a phone the descriptions would be off the screen.
                lines.append(f"* `{prefix}{name}` ({kind}) = `{default}`" + (f"<br>{about}" if about else ""))
    return "\n".join(lines) + "\n"


def _sections(model: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    yield (f"`[{prefix[:-1]}]`" if prefix else "Top level"), model, prefix
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from _sections(field.annotation, f"{prefix}{name}.")
