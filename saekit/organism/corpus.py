"""The organism's text: code and prose that come with Python, and generated documents.

Nothing is downloaded and no module of the standard library is imported: sources are read and parsed.

* ``code``: the modules named in ``stdlib_modules.txt``, parsed and unparsed, so without comments, and with
  docstrings cut. Consecutive top-level statements are gathered into documents of about 2,000 characters.
* ``prose``: the docstrings of the same modules, and the help texts of `pydoc_data.topics`.
* ``facts`` and ``sycophancy``: see the modules with these names.

Splits are by module, by topic, by wording and by argument, so that no held-out text has a sibling in training:
a held-out module is held out in its code and in its prose.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from saekit.organism import facts, sycophancy

KINDS = ("code", "prose", "facts", "sycophancy")
_CODE_CHARACTERS = 2000  # a document of code is closed at the first statement that reaches this
_PROSE_CHARACTERS = 120  # shorter docstrings are labels rather than prose
_TOPICS = "pydoc_data.topics"  # the help texts, which are no module of the list
_ARGUMENTS = {"train": 4000, "held_out": 400}


@dataclass(frozen=True)
class Document:
    """One text of the corpus."""

    id: str  # unique, e.g. "code/argparse/3"
    kind: str  # one of KINDS
    text: str


def documents(split: str = "train", kinds: Iterable[str] = KINDS) -> list[Document]:
    """The documents of a split ("train" or "held_out"), of the kinds asked for, in a fixed order.

    The first call for code or prose parses the standard library, which takes some seconds (`organism/tokens.py` keeps what a
    run needs of it). Modules that this Python does not have are left out.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    found: list[Document] = []
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
        if kind in ("code", "prose"):
            found += [d for d in _library(split) if d.kind == kind]
        elif kind == "facts":
            found += _fact_documents(split)
        else:
            found += _sycophancy_documents(split)
    return found


def module_names() -> list[str]:
    """The fixed list of standard library modules (CPython 3.11's; later versions lack some)."""
    lines = Path(__file__).with_name("stdlib_modules.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def held_out(name: str) -> bool:
    """Whether a module or a help topic is held out: its name's hash decides, for one in twenty."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20 == 0


def corpus_fingerprint(expected: str | None = None) -> str:
    """The sha256 over every document of both splits.

    It depends on the Python version, since the library does. If `expected` is given and differs, a warning
    says so: figures measured here are then close to the card's, but not comparable to the last digit.
    """
    digest = hashlib.sha256()
    for split in ("train", "held_out"):
        for d in documents(split):
            digest.update(f"{d.id}\0{d.text}\0".encode("utf-8", "surrogatepass"))
    if expected is not None and digest.hexdigest() != expected:
        warnings.warn(
            f"the organism's corpus under Python {platform.python_version()} is not the one its weights were "
            f"trained on (fingerprint {digest.hexdigest()[:12]}, expected {expected[:12]}): the standard library "
            "differs between versions",
            stacklevel=2,
        )
    return digest.hexdigest()


def library_sources() -> list[tuple[str, Path]]:
    """(name, file) of all that code and prose are cut from: the modules that this Python has, and the help topics."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [*module_names(), _TOPICS]
    return [(name, path) for name in names if (path := _source(root, name)) is not None]


@functools.cache
def _library(split: str) -> tuple[Document, ...]:
    wanted = split == "held_out"
    found: list[Document] = []
    for name, path in library_sources():
        if name == _TOPICS:
            for topic, text in sorted(_dictionary(path).items()):
                if held_out(f"{_TOPICS}/{topic}") == wanted:
                    found.append(Document(f"prose/{_TOPICS}/{topic}", "prose", text.strip()))
            continue
        if held_out(name) != wanted:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a source in another encoding: not worth special care
            continue
        # Docstrings first: cutting them changes the tree.
        prose = [Document(f"prose/{name}/{i}", "prose", t) for i, t in enumerate(_docstrings(tree))]
        found += [Document(f"code/{name}/{i}", "code", t) for i, t in enumerate(_code(tree))]
        found += prose
    return tuple(found)


def _source(root: Path, name: str) -> Path | None:
    stem = root.joinpath(*name.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.exists():
            return path
    return None


_HAS_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, _HAS_DOCSTRING) else None
        if text is None:
            continue
        # Interactive examples are code, and would blur the one concept that prose is here for.
        paragraphs = [p for p in inspect.cleandoc(text).split("\n\n") if ">>>" not in p]
        text = "\n\n".join(paragraphs).strip()
        if len(text) > _PROSE_CHARACTERS:
            yield text


def _code(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, _HAS_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    parts: list[str] = []
    size = 0
    for statement in tree.body:
        text = ast.unparse(ast.fix_missing_locations(statement)).strip()
        parts.append(text)
        size += len(text)
        if size >= _CODE_CHARACTERS:
            yield "\n".join(parts)
            parts, size = [], 0
    if parts:
        yield "\n".join(parts)


def _dictionary(path: Path) -> dict[str, str]:
    """The first dictionary literal assigned in a source file."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, ast.Dict):
            return ast.literal_eval(statement.value)
    return {}


def _fact_documents(split: str) -> list[Document]:
    wording = "seen" if split == "train" else "unseen"
    return [
        Document(f"facts/{domain}/{wording}/{i}", "facts", text)
        for domain in facts.DOMAINS
        for i, text in enumerate(facts.statements(domain, wording))
    ]


def _sycophancy_documents(split: str) -> list[Document]:
    return [
        Document(f"sycophancy/{split}/{s.question_id}/{s.template_type}", "sycophancy", s.text)
        for s in sycophancy.samples(split, _ARGUMENTS[split], seed=0)
    ]
