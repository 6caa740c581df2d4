"""Data flows one way: a module imports only from modules to its left."""

from __future__ import annotations

import ast
from pathlib import Path

import itd

SOURCE = Path(itd.__file__).parent
ORDER = (
    "settings", "artifacts", "cache", "prompts", "templates", "hooks", "pipelines", "words", "vocabulary", "synonyms",
    "screening", "selection", "kernels", "activations", "sae", "moments",
    "memory", "training", "features", "early_exit", "gate",
    "discriminants", "pooled", "drafts", "pictures", "explain", "attachment", "eraser", "retained", "erasing",
    "emoji",
)  # fmt: skip
"""The library. What is not named here uses it and stands to its right."""
SIDE_BY_SIDE = {"eraser", "attachment", "explain"}
"""The eraser's methods `attach` and `check` import these two when they are called."""


def module_of(path: Path) -> str:
    """Return the module, or the package, directly under itd that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def names_of(node: ast.AST) -> list[str]:
    """Return the dotted names that an import statement imports from."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == "itd":
        return [f"itd.{alias.name}" for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node: ast.AST, lazy: bool) -> set[str]:
    """Return what a file imports when it is loaded; with `lazy`, inside functions too. Imports for types do not count."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if is_typing_block(child) or (not lazy and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        found |= set(names_of(child)) | imports(child, lazy)
    return found


def itd_imports(path: Path, lazy: bool) -> set[str]:
    names = imports(ast.parse(path.read_text()), lazy)
    return {name.split(".")[1] for name in names if name.startswith("itd.")} - {module_of(path)}


def test_a_module_imports_only_from_modules_to_its_left() -> None:
    wrong = []
    for path in sources():
        module = module_of(path)
        if module in ORDER:
            left = ORDER[: ORDER.index(module)]
            strangers = itd_imports(path, lazy=module != "eraser") - set(left)
            wrong += [f"{path.relative_to(SOURCE)} imports {name}" for name in sorted(strangers)]
    assert wrong == []


def test_modules_outside_the_library_import_each_other_in_one_direction() -> None:
    left: dict[str, set[str]] = {}
    for path in sources():
        left.setdefault(module_of(path), set()).update(itd_imports(path, lazy=False))
    while leaves := [module for module, names in left.items() if not names & set(left)]:
        for module in leaves:
            del left[module]
    assert left == {}, "these import each other in a circle"


def test_the_eraser_imports_to_its_right_only_what_its_methods_call() -> None:
    path = SOURCE / "eraser.py"
    assert itd_imports(path, lazy=False).isdisjoint(SIDE_BY_SIDE)
    assert itd_imports(path, lazy=True) - itd_imports(path, lazy=False) == {"attachment", "explain", "emoji"}


def test_the_mathematics_knows_tensors_only() -> None:
    outside = {"diffusers", "transformers", "tokenizers"}
    for module in ("kernels", "sae", "features", "gate", "training", "eraser"):
        path = SOURCE / f"{module}.py"
        assert {name.split(".")[0] for name in imports(ast.parse(path.read_text()), lazy=True)}.isdisjoint(outside)
        assert "pipelines" not in itd_imports(path, lazy=True)


def test_only_hooks_registers_hooks() -> None:
    registering = {module_of(path) for path in sources() if "register_forward" in path.read_text()}
    assert registering == {"hooks"}


def test_nothing_is_pickled() -> None:
    for path in sources():
        text = path.read_text()
        assert "pickle" not in {name.split(".")[0] for name in imports(ast.parse(text), lazy=True)}
        assert "torch.load(" not in text


def test_every_module_of_the_order_is_there() -> None:
    assert set(ORDER) <= {module_of(path) for path in sources()}


def test_the_order_is_not_an_empty_claim() -> None:
    """Control: the reader of imports sees what is there."""
    assert itd_imports(SOURCE / "sae.py", lazy=False) == {"artifacts", "hooks", "kernels", "settings"}
    assert "attachment" not in itd_imports(SOURCE / "eraser.py", lazy=False)
    assert "attachment" in itd_imports(SOURCE / "eraser.py", lazy=True)


def test_the_public_names_are_there_and_few() -> None:
    assert all(hasattr(itd, name) for name in itd.__all__)
    assert len(itd.__all__) <= 25
