"""The folders of `scaledown/` import only to their left, no modules import each other, and no file is long."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "scaledown"
# common → data → training, evaluation, benchmark → world → the outermost; those of one row are peers. The console
# commands, a file beside the folders, call whatever they start.
ROWS = (
    {"common"},
    {"data"},
    {"training", "evaluation", "benchmark"},
    {"world"},
    {"serving", "integrations", "tools", "app"},
    {"commands"},
)
PLACES = {folder: place for place, row in enumerate(ROWS) for folder in row}
MAX_LINES = 520


@dataclass(frozen=True)
class Import:
    """A module of ours that another names in an import statement, wherever that stands."""

    source: str
    target: str
    line: int

    def at(self, modules: dict[str, Path]) -> str:
        """The statement as an editor finds it."""
        path = modules[self.source]
        text = path.read_text(encoding="utf-8").splitlines()[self.line - 1].strip()
        return f"{path}:{self.line}: {text}"


def modules_in(root: Path) -> dict[str, Path]:
    """The modules of the package below a folder, by their names."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_among(modules: dict[str, Path]) -> list[Import]:
    """The imports of modules by one another; a package's `__init__` counts as a module."""
    found = []
    for name, path in modules.items():
        if path.stem == "__main__":  # a console command by another name
            continue
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")
                above = parts[: len(parts) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                named = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
            else:
                continue
            found += [Import(name, target, node.lineno) for target in dict.fromkeys(named) if target in modules]
    return found


def folder_of(module: str) -> str | None:
    """The folder of a module; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def pointing_wrong(imports: list[Import]) -> list[Import]:
    """Imports that do not point to the left."""
    crossing = [entry for entry in imports if folder_of(entry.source) != folder_of(entry.target)]
    return [
        entry
        for entry in crossing
        if folder_of(entry.target) is None
        or folder_of(entry.source) is None
        or PLACES[folder_of(entry.target)] >= PLACES[folder_of(entry.source)]
    ]


def in_circles(imports: list[Import]) -> list[Import]:
    """Imports that lead back to the module they stand in."""
    targets: dict[str, set[str]] = {}
    for entry in imports:
        targets.setdefault(entry.source, set()).add(entry.target)

    def reached(start: str) -> set[str]:
        seen, open_ends = set(), [start]
        while open_ends:
            for target in targets.get(open_ends.pop(), set()) - seen:
                seen.add(target)
                open_ends.append(target)
        return seen

    return [entry for entry in imports if entry.source in {entry.target, *reached(entry.target)}]


def too_long(root: Path) -> list[str]:
    """Files of more lines than one idea takes."""
    paths = [*sorted((root / PACKAGE).rglob("*.py")), *sorted(root.glob("*_scaledown.py"))]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > MAX_LINES]


def test_every_folder_has_its_place():
    assert {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").is_file()} <= PLACES.keys()


@pytest.fixture(scope="module")
def modules():
    return modules_in(ROOT)


@pytest.fixture(scope="module")
def imports(modules):
    return imports_among(modules)


def test_imports_point_left(modules, imports):
    found = [entry.at(modules) for entry in pointing_wrong(imports)]
    assert not found, "\n".join(found)


def test_no_module_imports_itself_by_way_of_others(modules, imports):
    found = [entry.at(modules) for entry in in_circles(imports)]
    assert not found, "\n".join(found)


def test_no_file_is_long():
    found = too_long(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("files", "wrong", "circles"),
    [
        ({"common/a.py": "", "data/b.py": "from ..common import a"}, [], []),
        ({"common/a.py": "def f():\n    from ..data.b import x", "data/b.py": ""}, [("a", 2)], []),
        ({"training/a.py": "import scaledown.evaluation.b", "evaluation/b.py": ""}, [("a", 1)], []),
        ({"world/a.py": "from . import b", "world/b.py": "from .c import x", "world/c.py": ""}, [], []),
        (
            {
                "world/a.py": "from . import b",
                "world/b.py": "from .c import x",
                "world/c.py": "def f():\n    from . import a",
            },
            [],
            [("a", 1), ("b", 1), ("c", 2)],
        ),
    ],
    ids=["left", "right, in a function", "across peers", "a line", "a circle"],
)
def test_what_these_tests_would_find(files, wrong, circles, tmp_path):
    for name, text in files.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    imports = imports_among(modules_in(tmp_path))
    assert [(entry.source[-1], entry.line) for entry in pointing_wrong(imports)] == wrong
    assert [(entry.source[-1], entry.line) for entry in in_circles(imports)] == circles
