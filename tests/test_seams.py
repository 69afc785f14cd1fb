"""docs/vllm_seams.md lists what leans on the insides of vLLM: all that the code has, nothing it has not, and it exists."""

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dllm_plugin
from dllm_plugin.compat import vllm_version

ROOT = Path(dllm_plugin.__file__).parent.parent
FILES = sorted((ROOT / "dllm_plugin").rglob("*.py"))
RELEASE = ".".join(vllm_version().split(".")[:2])
WORKERS = ("vllm/v1/worker/worker_base.py", "vllm/v1/worker/gpu_worker.py", "vllm/v1/worker/cpu_worker.py")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Pairs = set[tuple[str, str]]


# ---- the ledger


@dataclass(frozen=True)
class Row:
    """``ours``, ``theirs``: names ``folder/file.py:Class.member``. ``cells``: all of the row, by the table's heads."""

    section: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    cells: dict[str, str]

    def __str__(self) -> str:
        return re.sub(r"[^\w.]+", "-", f"{self.section}-{(self.ours or self.theirs)[0]}")


def names_in(cell: str) -> tuple[str, ...]:
    """Names between backticks. ``.member`` stands beside the member before it; ``(0.33)`` is for that release only."""
    names, beside = [], ""
    for name, release in re.findall(r"`([^`]+)`(?: \((0\.\d+)\))?", cell):
        name = beside + name[1:] if name.startswith(".") else name
        beside = re.sub(r"[^.:]*$", "", name)
        if release in ("", RELEASE):
            names.append(name)
    return tuple(names)


def rows_of(text: str) -> Iterator[Row]:
    section, heads = "", []
    for line in text.splitlines():
        if line.startswith("## "):
            section, heads = line[3:], []
        elif line.startswith("| --"):
            continue
        elif line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            if not heads:
                heads = cells
                continue
            assert len(cells) == len(heads), line
            by_head = dict(zip(heads, cells, strict=True))
            yield Row(section, names_in(by_head.get("ours", "")), names_in(by_head.get("vLLM's", "")), by_head)


ROWS = [*rows_of((ROOT / "docs/vllm_seams.md").read_text())]


def rows(section: str) -> list[Row]:
    found = [row for row in ROWS if row.section == section]
    assert found, f"docs/vllm_seams.md has no table under {section!r}"
    return found


def last(name: str) -> str:
    return re.split(r"[.:]", name)[-1]


def agree(found: set, listed: set) -> None:
    assert found - listed == set(), "docs/vllm_seams.md lacks these seams of the code"
    assert listed - found == set(), "docs/vllm_seams.md lists what is not in the code"


# ---- reading source


@functools.cache
def tree_of(path: str) -> ast.Module:
    """Of a file of ours or of an installed package, by its path from the folder that holds the package."""
    package, _, rest = path.partition("/")
    return ast.parse((Path(importlib.import_module(package).__file__).parent / rest).read_text())


def path_of(cls: type) -> str:
    file = Path(inspect.getsourcefile(cls))
    package = Path(importlib.import_module(cls.__module__.split(".")[0]).__file__).parent
    return str(file.relative_to(package.parent))


def targets_of(node: ast.AST) -> Iterator[ast.expr]:
    for target in getattr(node, "targets", [getattr(node, "target", None)]):
        yield from target.elts if isinstance(target, ast.Tuple) else [target]


def members(scope: ast.AST) -> dict[str, ast.AST]:
    """What a module or class defines: names in its body and, of a class, what its methods assign to ``self``."""
    found: dict[str, ast.AST] = {}
    if isinstance(scope, ast.ClassDef):
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute) and is_self(node.value) and isinstance(node.ctx, ast.Store):
                found[node.attr] = node
    for node in scope.body:
        if isinstance(node, Function | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {target.id: node for target in targets_of(node) if isinstance(target, ast.Name)}
    return found


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def resolve(name: str) -> ast.AST | None:
    """What ``folder/file.py:Class.member`` is in the source; an instance of a class of the file has its members."""
    path, _, inner = name.partition(":")
    found: ast.AST | None = tree_of(path)
    for part in inner.split("."):
        value = getattr(found, "value", None)
        if isinstance(value, ast.Call):
            found = members(tree_of(path)).get(ast.unparse(value.func))
        if part == "__class__":
            return found
        found = members(found).get(part) if isinstance(found, ast.Module | ast.ClassDef) else None
    return found


def functions() -> Iterator[tuple[str, ast.ClassDef | None, ast.AST]]:
    """Every function and method of the package by name, with the class it is in; a function in it belongs to it.

    What stands outside of functions is ``file.py:<module>``.
    """
    for file in FILES:
        path = str(file.relative_to(ROOT))
        outside = ast.Module([], [])
        for node in tree_of(path).body:
            owner = node if isinstance(node, ast.ClassDef) else None
            for one in owner.body if owner else [node]:
                if isinstance(one, Function):
                    yield f"{path}:{owner.name}.{one.name}" if owner else f"{path}:{one.name}", owner, one
                else:
                    outside.body.append(one)
        yield f"{path}:<module>", None, outside


@functools.cache
def classes() -> dict[str, tuple[type, ast.ClassDef]]:
    """The classes of the package by name."""
    found = {}
    for file in FILES:
        path = str(file.relative_to(ROOT))
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                found[f"{path}:{node.name}"] = getattr(importlib.import_module(module), node.name), node
    return found


def is_of_vllm(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "vllm"


def ancestors(cls: type) -> Iterator[list[type]]:
    """For each class of vLLM that one of ours is built on, that class and its own bases in vLLM."""
    for base in (base for one in cls.__mro__ if not is_of_vllm(one) for base in one.__bases__):
        if is_of_vllm(base):
            yield [one for one in base.__mro__ if is_of_vllm(one)]


def defined(cls: type) -> set[str]:
    return set(members(members(tree_of(path_of(cls)))[cls.__name__]))


def inherited(cls: type) -> dict[str, list[str]]:
    """Names that a class of ours has from vLLM, each with where vLLM defines it."""
    found: dict[str, list[str]] = {}
    for line in ancestors(cls):
        seen: set[str] = set()
        for one in line:
            for name in defined(one) - seen:
                seen.add(name)
                found.setdefault(name, []).append(f"{path_of(one)}:{one.__name__}.{name}")
    return found


def own_members(cls: type) -> set[str]:
    """Names that a class has from classes of ours, itself among them."""
    return {name for one, node in classes().values() if issubclass(cls, one) for name in provided(node)}


def provided(scope: ast.ClassDef) -> dict[str, ast.AST]:
    """Its members without those it only says the type of."""
    return {
        name: node
        for name, node in members(scope).items()
        if not (isinstance(node, ast.AnnAssign) and node.value is None)
    }


# ---- what the code has


def overrides() -> Pairs:
    found = set()
    for name, (cls, node) in classes().items():
        theirs = inherited(cls)
        for member, definition in provided(node).items():
            if not isinstance(definition, ast.Attribute):  # what methods assign is found by `assignments`
                found |= {(f"{name}.{member}", there) for there in theirs.get(member, ())}
    return found


def assignments() -> Pairs:
    """Function and attribute, of each that is set on an object whose class is not entirely ours.

    Ours are the attributes of ``self`` that no base in vLLM has. Of other objects they are those with a name that a class
    of ours declares, if it has no base in vLLM and its instances may change, and that no imported class of vLLM has.
    """
    ours: set[str] = set()
    for cls, node in classes().values():
        frozen = (params := getattr(cls, "__dataclass_params__", None)) is not None and params.frozen
        if not frozen and not issubclass(cls, tuple) and not any(is_of_vllm(one) for one in cls.__mro__):
            ours |= members(node).keys()
    for cls in (getattr(importlib.import_module(module), name) for module, name in imports()):
        ours -= {name for one in getattr(cls, "__mro__", ()) if is_of_vllm(one) for name in defined(one)}
    found = set()
    for function, owner, node in functions():
        theirs = inherited(classes()[function.rpartition(".")[0]][0]) if owner else {}
        for target in ast.walk(node):
            if isinstance(target, ast.Attribute) and not isinstance(target.ctx, ast.Load):
                if target.attr in theirs if is_self(target.value) else target.attr not in ours:
                    found.add((function, target.attr))
            elif not isinstance(target, ast.Call) or (called := ast.unparse(target.func)) == "super().__setattr__":
                continue
            elif "setattr" in called and not is_self(target.args[0]):
                found.add((function, "setattr"))
    return found


def inherited_members_in_use() -> Pairs:
    found = set()
    for name, (cls, node) in classes().items():
        theirs = inherited(cls).keys() - own_members(cls)
        for use in ast.walk(node):
            if isinstance(use, ast.Attribute) and is_self(use.value) and use.attr in theirs:
                found.add((name, use.attr))
    return found


def imports() -> Pairs:
    """Module of vLLM and name."""
    nodes = [node for file in FILES for node in ast.walk(tree_of(str(file.relative_to(ROOT))))]
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in whole if name.split(".")[0] == "vllm"], "import names of vLLM, not modules"
    imported = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "vllm"]
    return {(node.module, alias.name) for node in imported for alias in node.names}


def registries() -> Pairs:
    """Function and registry of vLLM or transformers, with the member that is used; without one where it is filled."""
    found = set()
    for file in FILES:
        for node in ast.walk(tree_of(path := str(file.relative_to(ROOT)))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("vllm", "transformers"):
                names = {alias.name for alias in node.names}
                found |= {(path, name) for name in names if re.search(r"registry$|_map$|^Auto", name, re.I)}
    uses = set()
    for function, _, node in functions():
        mine = {name for path, name in found if function.startswith(f"{path}:")}
        for use in ast.walk(node):
            if (
                isinstance(use, ast.Attribute | ast.Subscript)
                and isinstance(use.value, ast.Name)
                and use.value.id in mine
            ):
                uses.add((function, f"{use.value.id}.{use.attr}" if isinstance(use, ast.Attribute) else use.value.id))
    return uses


def private_names() -> Pairs:
    """Function and private attribute of an object that is not ``self``, where no class of ours declares it."""
    ours = {"_replace", *(name for _, node in classes().values() for name in members(node))}
    return {
        (function, use.attr)
        for function, _, node in functions()
        for use in ast.walk(node)
        if isinstance(use, ast.Attribute) and re.match(r"_(?!_)", use.attr) and use.attr not in ours
        if not is_self(use.value)
    }


def asked_of_a_model_runner() -> set[str]:
    """Members of a model runner that vLLM's workers use."""
    nodes = [node for path in WORKERS for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if last(ast.unparse(node.value)) == "model_runner"}


# ---- both agree


def listed(section: str) -> Pairs:
    """Function of ours and last name of vLLM's, each with each."""
    return {(ours, last(theirs)) for row in rows(section) for ours in row.ours for theirs in row.theirs}


def test_every_override_is_listed() -> None:
    table = rows("Overridden members")
    agree(overrides(), {(o, t) for row in table for o in row.ours for t in row.theirs if last(o) == last(t)})
    for row in table:
        assert {last(name) for name in row.ours} == {last(name) for name in row.theirs}


def test_every_assignment_to_what_is_not_ours_is_listed() -> None:
    agree(assignments(), listed("Replaced on an object") | listed("Set on an object"))


def test_what_is_replaced_is_a_method_or_a_class_and_what_is_set_is_neither() -> None:
    for section, code in (("Replaced on an object", True), ("Set on an object", False)):
        for row in rows(section):
            assert {isinstance(resolve(name), Function | ast.ClassDef) for name in row.theirs} == {code}, row


def test_every_inherited_member_in_use_is_listed() -> None:
    agree(inherited_members_in_use(), listed("Inherited members in use"))


def test_every_use_of_a_registry_is_listed() -> None:
    agree(
        registries(),
        {(ours, name.partition(":")[2]) for row in rows("Registries") for ours in row.ours for name in row.theirs},
    )


def test_every_import_is_listed() -> None:
    table = rows("Imports")
    agree(
        imports(), {(names_in(row.cells["module"])[0], name) for row in table for name in names_in(row.cells["names"])}
    )
    assert len({row.cells["module"] for row in table}) == len(table)


def test_every_private_name_is_listed_and_all_that_is_listed_is_used() -> None:
    pairs = listed("Read, called or filled")
    assert private_names() <= pairs
    used = {
        (function, use.attr)
        for function, _, node in functions()
        for use in ast.walk(node)
        if isinstance(use, ast.Attribute)
    }
    assert pairs - used == set(), "docs/vllm_seams.md lists what is not in the code"


def test_all_that_vllms_workers_ask_of_a_model_runner_is_listed() -> None:
    from dllm_plugin.worker.model_runner import DiffusionModelRunner

    answered, not_asked = rows("Answered by our model runner"), rows("Not asked of our model runner")
    has = own_members(DiffusionModelRunner)
    agree(asked_of_a_model_runner() & has, {last(name) for row in answered for name in row.theirs})
    for row in answered:
        assert sorted(map(last, row.ours)) == sorted(map(last, row.theirs)), row
    lacks = asked_of_a_model_runner() - has - inherited(DiffusionModelRunner).keys()
    agree(lacks, {last(name) for row in not_asked for name in row.theirs})


@pytest.mark.parametrize("row", rows("Relied on"), ids=str)
def test_what_is_relied_on_is_in_the_source(row: Row) -> None:
    for name in row.theirs:
        (code,) = re.findall(r"`([^`]+)`", row.cells["its code"])
        assert (found := resolve(name)) is not None, name
        assert code in ast.unparse(found), name


# ---- what the ledger names exists


@pytest.mark.parametrize("section", sorted({row.section for row in ROWS}))
def test_names_exist(section: str) -> None:
    for row in rows(section):
        for name in (*row.ours, *row.theirs):
            assert resolve(name) is not None, f"vLLM {RELEASE} has no {name}" if name in row.theirs else name
        for test in re.findall(r"tests/[\w/]+\.py(?:::\w+)?", row.cells.get("noticed by", "")):
            path, _, function = test.partition("::")
            assert f"def {function}(" in (ROOT / path).read_text() if function else (ROOT / path).exists(), test


def test_imported_names_exist() -> None:
    for module, name in imports():
        assert hasattr(importlib.import_module(module), name), f"vLLM {RELEASE} has no {module}.{name}"


def parameters(function: ast.AST) -> list[str]:
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return names[names[:1] in (["self"], ["cls"]) :]


def takes(function: ast.AST, num_positional: int, names: set[str]) -> bool:
    """Whether a function of ours may be called so; one of any arguments may."""
    known, args = parameters(function), function.args
    return bool(args.vararg) or bool(args.kwarg) or (num_positional <= len(known) and names <= set(known))


def test_overrides_take_what_vllms_take() -> None:
    pairs = [(resolve(ours), resolve(theirs), theirs) for ours, theirs in overrides()]
    methods = [pair for pair in pairs if all(isinstance(one, Function) for one in pair[:2])]
    assert len(methods) > 20
    for ours, theirs, name in methods:
        assert takes(ours, 0, set(parameters(theirs))), (
            f"{name} of vLLM {RELEASE} has parameters that ours does not take"
        )


def test_our_model_runner_takes_what_vllms_workers_give() -> None:
    ours = {last(name): resolve(name) for row in rows("Answered by our model runner") for name in row.ours}
    calls = [node for path in WORKERS for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    calls = [node for node in calls if "model_runner." in ast.unparse(node.func)]
    compared = [node for node in calls if isinstance(ours.get(last(ast.unparse(node.func))), Function)]
    assert len(compared) > 15
    for node in compared:
        given = {keyword.arg for keyword in node.keywords} - {None}  # *args and **kwargs give what a caller names
        num_positional = sum(not isinstance(arg, ast.Starred) for arg in node.args)
        assert takes(ours[last(ast.unparse(node.func))], num_positional, given), ast.unparse(node)
