"""The shape of the house, kept: no circles, no climbs, short files, one step loop.

`tools/figures.py` measures (`make figures` prints all of it); this names who breaks a rule.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

import revivemoe

TOOL = Path(__file__).parents[2] / "tools" / "figures.py"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


figures = load(TOOL)
SOURCES = figures.read_package(Path(revivemoe.__file__).parent)
FOUND = figures.measure(SOURCES)


def listed(names: Sequence[str]) -> str:
    return "".join(f"\n    {name}" for name in names)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not FOUND.circles, f"circles of imports:{listed(FOUND.circles)}"


def test_no_import_climbs_to_a_higher_layer() -> None:
    assert not FOUND.climbs, f"imports of a higher layer:{listed(FOUND.climbs)}"


def test_every_room_has_a_layer() -> None:
    assert not FOUND.without_layer, f"not in figures.LAYERS: {FOUND.without_layer}"


def test_the_root_has_five_loose_modules() -> None:
    assert FOUND.loose_modules == list(figures.LOOSE_MODULES)


def test_no_file_is_longer_than_400_lines() -> None:
    assert not FOUND.files_over_400, f"too long:{listed(FOUND.files_over_400)}"


def test_there_is_one_step_loop() -> None:
    assert len(FOUND.step_loops) == 1, f"class StepLoop stands at:{listed(FOUND.step_loops)}"


def test_any_is_rare() -> None:
    in_all = sum(FOUND.any_of_package.values())
    by_file = {s.path: figures.uses_of([s], "Any") for s in SOURCES}
    counts = sorted(((sum(n.values()), path) for path, n in by_file.items() if n), reverse=True)
    worst = [f"{path}: {count}" for count, path in counts[:20]]
    assert in_all < figures.ANY_BELOW, f"{in_all} times `Any`, most often in:{listed(worst)}"


# ---- the measuring itself ---------------------------------------------------------------------

TOY = {
    "__init__.py": '"""A toy."""\n',
    "ground.py": "def late():\n    from toy.upper import roof\n",
    "middle/__init__.py": "",
    "middle/a.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from toy.middle.b import B
        class A:
            kept: int
            def __init__(self):
                self.x = self.y = 1
                self.x, (self.z, w) = 2, (3, 4)
                self.z.inner = 5
        """,
    "middle/b.py": """
        from typing import Any
        from toy import middle
        import toy.middle.c
        class B:
            '''Any number of words: Any.'''
            class StepLoop: ...
        def f(x: Any) -> None:
            def g():
                assert x
                return 1
        """,
    "middle/c.py": "from toy.middle import a\n\nassert True\n",
    "upper/__init__.py": "",
    "upper/roof.py": "import json\nimport toy.ground\nfrom toy.middle.a import A\n",
}
LAYERS = ("ground", "middle", "upper")


def without_indent(text: str) -> str:
    lines = text.strip("\n").splitlines()
    return "\n".join(line.removeprefix(" " * 8) for line in lines).rstrip() + "\n"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name, text in TOY.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(without_indent(text))
    return tmp_path / "toy"


def test_a_circle_is_found_through_the_type_checkers_and_the_functions_imports(toy: Path) -> None:
    found = figures.circles(figures.graph(figures.read_package(toy)))
    assert found == [
        ["toy.ground", "toy.upper.roof"],
        ["toy.middle.a", "toy.middle.b", "toy.middle.c"],
    ]


def test_without_the_closing_import_there_is_no_circle(toy: Path) -> None:
    (toy / "middle/c.py").write_text("import toy.middle.missing\n")
    (toy / "ground.py").write_text("from toy import __doc__\n")
    imports = figures.graph(figures.read_package(toy))
    assert figures.circles(imports) == []
    assert imports["toy.ground"] == {"toy"}
    assert figures.climbs(imports, LAYERS) == []


def test_a_climb_is_found(toy: Path) -> None:
    (toy / "__init__.py").write_text("from toy.ground import late\n")
    imports = figures.graph(figures.read_package(toy))
    assert figures.climbs(imports, LAYERS) == [
        "toy -> toy.ground",
        "toy.ground -> toy.upper.roof",
    ]
    assert figures.climbs(imports, ("upper", "middle", "ground")) == [
        "toy -> toy.ground",
        "toy.upper.roof -> toy.ground",
        "toy.upper.roof -> toy.middle.a",
    ]
    assert figures.without_layer(imports, ("ground",)) == ["middle", "upper"]


def test_relative_imports_are_refused(toy: Path) -> None:
    (toy / "middle/c.py").write_text("from . import a\n")
    with pytest.raises(ValueError, match=r"toy/middle/c\.py"):
        figures.graph(figures.read_package(toy))


def test_rooms_and_loose_modules_are_told_apart(toy: Path) -> None:
    sources = figures.read_package(toy)
    assert figures.packages(sources) == ["middle", "upper"]
    assert figures.loose_modules(sources) == ["ground"]


def test_sizes_are_measured(toy: Path) -> None:
    sources = figures.read_package(toy)
    sizes = {c.name: c for c in figures.class_sizes(sources)}
    assert sizes["toy.middle.a.A"] == figures.ClassSize("toy.middle.a.A", 6, 1, 4)
    lengths = figures.function_lengths(sources)
    assert lengths == figures.FunctionLengths(4, 3.5, 4, 4, "toy.middle.b.f")
    assert figures.files_over(sources, 8) == ["toy/middle/b.py: 10", "toy/middle/a.py: 9"]
    assert figures.classes_named(sources, "StepLoop") == ["toy/middle/b.py:6"]
    assert figures.uses_of(sources, "Any") == {"middle": 2}
    assert figures.asserts_per_1000_lines(sources, ["middle"]) == round(1000 * 2 / 23, 1)


def test_every_test_is_collected(pytestconfig: pytest.Config) -> None:
    """One that is not is none: `testpaths` names every folder with tests in it."""
    tests = Path(__file__).parents[1]
    collected = [tests.parent / folder for folder in pytestconfig.getini("testpaths")]
    makefile = (tests.parent / "Makefile").read_text()
    assert all(folder in makefile for folder in pytestconfig.getini("testpaths"))
    files = tests.rglob("test_*.py")
    left_out = [f for f in files if not any(f.is_relative_to(folder) for folder in collected)]
    assert not left_out, f"not in testpaths:{listed([str(file) for file in left_out])}"
