"""Measures the structure of src/revivemoe and sets it beside what is aimed at (`make figures`).

    read_package --> sources --> graph --> circles, climbs
                        |------> long files, classes, functions, asserts, words
                        `------> figures --> a table, or --json

Only syntax trees are read; nothing of the package is imported. An import counts wherever it
stands: at module level, in a function, for the type checker only.
"""

import argparse
import ast
import io
import json
import re
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "src" / "revivemoe"

LAYERS = (
    "ids",
    "sampling_params",
    "membership",
    "checkpoint",
    "messages",
    "recovery",
    "host",
    "config",
    "streams",
    "detokenizer",
    "core",
    "kernels",
    "epochs",
    "engine",
    "comm",
    "model",
    "executor",
    "health",
    "cluster",
    "serving",
    "server",
    "sim",
    "bench",
    "cli",
)
"""From the ground: each may import what stands before it, and none what stands after."""

LOOSE_MODULES = ("config", "detokenizer", "ids", "sampling_params", "streams")
FILE_LINES = 400
LONG_FILE_LINES = 350
ANY_BELOW = 100

Graph = Mapping[str, frozenset[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file; its name is dotted and begins with the package's."""

    name: str
    path: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())


@dataclass(frozen=True)
class ClassSize:
    """`attributes` are the distinct `self.x =` in `__init__` and the fields in the class body."""

    name: str
    lines: int
    methods: int
    attributes: int

    def __str__(self) -> str:
        return f"{self.lines} lines, {self.methods} methods, {self.attributes} attributes"


@dataclass(frozen=True)
class FunctionLengths:
    """Lines from `def` to the last line, docstring counted, decorators not."""

    count: int
    median: float
    ninety_percent: int
    longest: int
    longest_name: str

    def __str__(self) -> str:
        return f"{self.median:g} / {self.ninety_percent} / {self.longest}"


@dataclass(frozen=True)
class Figures:
    """All that is measured, as `--json` prints it."""

    packages: list[str]
    loose_modules: list[str]
    without_layer: list[str]
    circles: list[str]
    climbs: list[str]
    files_over_400: list[str]
    files_over_350: list[str]
    engine: ClassSize | None
    largest_classes: list[ClassSize]
    step_loops: list[str]
    asserts_per_1000_lines: dict[str, float]
    any_of_package: dict[str, int]
    files: int
    lines: int
    functions: FunctionLengths


# ---- reading ----------------------------------------------------------------------------------


def read_package(root: Path) -> list[Source]:
    """The files of the package in folder `root`, by name."""
    return sorted((_read(root, path) for path in root.rglob("*.py")), key=lambda s: s.name)


def _read(root: Path, path: Path) -> Source:
    inside = path.relative_to(root.parent)
    parts = inside.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    text = path.read_text()
    return Source(name, inside.as_posix(), text, ast.parse(text))


def room(name: str) -> str:
    """The package or loose module of the root that a module belongs to; '' for the root itself."""
    return name.partition(".")[2].partition(".")[0]


def packages(sources: Iterable[Source]) -> list[str]:
    """The packages in the root."""
    return sorted({s.path.split("/")[1] for s in sources if s.path.count("/") > 1})


def loose_modules(sources: Iterable[Source]) -> list[str]:
    """The modules in the root that belong to no package."""
    return sorted(room(s.name) for s in sources if s.path.count("/") == 1 and room(s.name))


# ---- imports ----------------------------------------------------------------------------------


def graph(sources: Sequence[Source]) -> Graph:
    """Which modules of the package each one names in its imports.

    That naming `a.b` also loads `a/__init__.py` makes no edge: it would put every package whose
    `__init__` imports from within it into a circle.
    """
    names = {s.name for s in sources}
    return {s.name: frozenset(set(_imported(s, names)) - {s.name}) for s in sources}


def _imported(source: Source, names: set[str]) -> Iterator[str]:
    for node in ast.walk(source.tree):
        match node:
            case ast.Import(names=aliases):
                yield from (a.name for a in aliases if a.name in names)
            case ast.ImportFrom(module=str(base), names=aliases, level=0):
                found = (f"{base}.{a.name}" for a in aliases)
                yield from (n if n in names else base for n in found if {n, base} & names)
            case ast.ImportFrom():
                raise ValueError(f"{source.path}: write relative imports in full")
            case _:
                pass


def circles(imports: Graph) -> list[list[str]]:
    """The strongly connected components of more than one module."""
    reach = {name: _reached(imports, name) for name in imports}
    found = {frozenset(n for n in reach[name] if name in reach[n]) for name in imports}
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def _reached(imports: Graph, start: str) -> set[str]:
    """All that an import of `start` leads to; `start` too if it leads back."""
    seen: set[str] = set()
    todo = [*imports[start]]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(imports[name])
    return seen


def climbs(imports: Graph, layers: Sequence[str]) -> list[str]:
    """Imports of a room that stands above the importer's, as 'a -> b'. The root is the ground."""
    order = {"": -1, **{layer: n for n, layer in enumerate(layers)}}
    return sorted(
        f"{name} -> {other}"
        for name, others in imports.items()
        for other in others
        if room(name) in order and room(other) in order
        if order[room(name)] < order[room(other)]
    )


def without_layer(imports: Graph, layers: Sequence[str]) -> list[str]:
    """Rooms that `layers` forgot; `climbs` can't judge them."""
    return sorted({room(name) for name in imports} - {"", *layers})


# ---- sizes ------------------------------------------------------------------------------------


def files_over(sources: Iterable[Source], limit: int) -> list[str]:
    """'path: lines' of the files with more lines than that, longest first."""
    long = sorted((s for s in sources if s.lines > limit), key=lambda s: -s.lines)
    return [f"{s.path}: {s.lines}" for s in long]


def definitions(source: Source) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Every class and function of a file with its dotted name, nested ones too."""
    todo: list[tuple[str, ast.AST]] = [(source.name, source.tree)]
    while todo:
        name, node = todo.pop()
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.ClassDef | Function):
                inner = f"{name}.{child.name}"
                yield inner, child
            todo.append((inner, child))


def class_sizes(sources: Iterable[Source]) -> list[ClassSize]:
    """All classes, the largest first."""
    sizes = [
        _class_size(name, node)
        for source in sources
        for name, node in definitions(source)
        if isinstance(node, ast.ClassDef)
    ]
    return sorted(sizes, key=lambda c: (-c.lines, c.name))


def _class_size(name: str, node: ast.ClassDef) -> ClassSize:
    methods = [m for m in node.body if isinstance(m, Function)]
    attributes = {
        field.target.id
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }
    for method in methods:
        if method.name == "__init__":
            attributes |= set(_set_on_self(method))
    return ClassSize(name, _lines(node), len(methods), len(attributes))


def _set_on_self(method: Function) -> Iterator[str]:
    for node in ast.walk(method):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name
            case _:
                pass


def _lines(node: ast.ClassDef | Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def function_lengths(sources: Iterable[Source]) -> FunctionLengths:
    """Of all functions and methods, nested ones too."""
    lengths = sorted(
        (_lines(node), name)
        for source in sources
        for name, node in definitions(source)
        if isinstance(node, Function)
    )
    if not lengths:
        return FunctionLengths(0, 0, 0, 0, "")
    counts = [length for length, _ in lengths]
    ninety = counts[(len(counts) * 9 - 1) // 10]
    return FunctionLengths(len(counts), statistics.median(counts), ninety, *lengths[-1])


def asserts_per_1000_lines(sources: Iterable[Source], rooms: Iterable[str]) -> float:
    """`assert` statements per 1,000 lines of these packages."""
    wanted = set(rooms)
    inside = [s for s in sources if room(s.name) in wanted]
    asserts = sum(isinstance(node, ast.Assert) for s in inside for node in ast.walk(s.tree))
    return round(1000 * asserts / max(1, sum(s.lines for s in inside)), 1)


def uses_of(sources: Iterable[Source], word: str) -> dict[str, int]:
    """How often a name occurs in each room's code, imports counted, prose and strings not."""
    found: Counter[str] = Counter()
    for source in sources:
        tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
        found[room(source.name)] += sum(
            t.type == tokenize.NAME and t.string == word for t in tokens
        )
    return {name: count for name, count in found.most_common() if count}


def classes_named(sources: Iterable[Source], word: str) -> list[str]:
    """'path:line' of each definition of a class of that name."""
    return [
        f"{source.path}:{node.lineno}"
        for source in sources
        for _, node in definitions(source)
        if isinstance(node, ast.ClassDef) and node.name == word
    ]


# ---- together ---------------------------------------------------------------------------------


def measure(sources: Sequence[Source]) -> Figures:
    """All figures of the package."""
    imports = graph(sources)
    classes = class_sizes(sources)
    split = {"recovery": ["recovery"], "epochs": ["epochs"], "together": ["recovery", "epochs"]}
    return Figures(
        packages=packages(sources),
        loose_modules=loose_modules(sources),
        without_layer=without_layer(imports, LAYERS),
        circles=[" <-> ".join(circle) for circle in circles(imports)],
        climbs=climbs(imports, LAYERS),
        files_over_400=files_over(sources, FILE_LINES),
        files_over_350=files_over(sources, LONG_FILE_LINES),
        engine=next((c for c in classes if re.search(r"\.engine\.engine\.Engine$", c.name)), None),
        largest_classes=classes[:5],
        step_loops=classes_named(sources, "StepLoop"),
        asserts_per_1000_lines={k: asserts_per_1000_lines(sources, v) for k, v in split.items()},
        any_of_package=uses_of(sources, "Any"),
        files=len(sources),
        lines=sum(s.lines for s in sources),
        functions=function_lengths(sources),
    )


@dataclass(frozen=True)
class Row:
    """One line of the table, and what it counts, by name."""

    what: str
    now: str
    aim: str
    named: Sequence[str] = ()


def rows(f: Figures) -> list[Row]:
    """The table of redesign.md's aims, and what else is worth a look."""
    asserts = f.asserts_per_1000_lines
    any_named = [f"{room or 'root'}: {count}" for room, count in f.any_of_package.items()]
    return [
        Row(
            "loose modules and packages in the root",
            f"{len(f.loose_modules)} + {len(f.packages)}",
            "5 + 17",
            [" ".join(f.loose_modules), " ".join(f.packages)],
        ),
        Row("import circles", str(len(f.circles)), "0", f.circles),
        Row("imports that climb to a higher layer", str(len(f.climbs)), "0", f.climbs),
        Row("rooms without a layer", str(len(f.without_layer)), "0", f.without_layer),
        Row("files over 400 lines", str(len(f.files_over_400)), "0"),
        Row("files over 350 lines", str(len(f.files_over_350)), "2", f.files_over_350),
        Row("Engine", str(f.engine), "about 240, 24, 14"),
        Row("step loops", str(len(f.step_loops)), "1", f.step_loops),
        Row("hand-overs of Engine and Coordinator on a fault", "not measured", "2"),
        Row("asserts per 1,000 lines, recovery", f"{asserts['recovery']}", "10"),
        Row("asserts per 1,000 lines, epochs", f"{asserts['epochs']}", "10"),
        Row("asserts per 1,000 lines, both together", f"{asserts['together']}", "10"),
        Row("lines in all", f"{f.lines:,}", "22,053 or fewer"),
        Row("Any", str(sum(f.any_of_package.values())), f"below {ANY_BELOW}", any_named),
        Row("files", str(f.files), ""),
        Row("functions", f"{f.functions.count:,}", ""),
        Row(
            "lines of a function: median / 90 % / longest",
            str(f.functions),
            "",
            [f.functions.longest_name],
        ),
        Row("largest classes", "", "", [f"{c.name}: {c}" for c in f.largest_classes]),
    ]


def table(lines: Sequence[Row]) -> str:
    """Aligned columns; what is named stands below its row."""
    what, now = max(len(r.what) for r in lines), max(len(r.now) for r in lines)
    printed = [f"{'':{what}}  {'now':{now}}  aim"]
    for row in lines:
        printed.append(f"{row.what:{what}}  {row.now:{now}}  {row.aim}".rstrip())
        printed.extend(f"    {name}" for name in row.named)
    return "\n".join(printed)


def main() -> None:
    """Print the table, or everything as JSON."""
    parser = argparse.ArgumentParser(description="Structure of src/revivemoe, and its aims.")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_args()
    found = measure(read_package(ROOT))
    print(json.dumps(asdict(found), indent=2) if arguments.json else table(rows(found)))


if __name__ == "__main__":
    main()
