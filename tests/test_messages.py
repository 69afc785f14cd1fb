"""Values in messages are a line at most, wherever they come from."""

import ast
from pathlib import Path

import pytest

import dllm_plugin
from dllm_plugin.messages import LONGEST, shown

PACKAGE = Path(dllm_plugin.__file__).parent
# whose values come from requests, from command lines and from files
FILES = (
    "admission", "engine_config", "extras", "front_end", "models/configs", "models/experts", "params", "renderer",
    "scheduler/scheduler", "settings",
)  # fmt: skip


class Counted:
    """How often a repr was asked for."""

    times = 0

    def __repr__(self) -> str:
        Counted.times += 1
        return "counted"


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    "value, text",
    [
        (5, "5"),
        ("many", "'many'"),
        ([1, 2], "[1, 2]"),
        ({"a": 1}, "{'a': 1}"),
        (2**64, "18446744073709551616"),
        (10**5000, "a value of type int"),
        (Broken(), "<Broken instance at"),
        ([0] * 1_000_000, "[0, 0, 0, 0, 0, 0, ...]"),
        ({str(i): i for i in range(50_000)}, ", ...}"),
        ("x" * 1_000_000, "xxx...xxx"),
        ([["y" * 1_000_000] * 100] * 100, "..."),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_a_value_takes_a_line_at_most(value: object, text: str) -> None:
    assert text in shown(value)
    assert len(shown(value)) <= LONGEST + 3


def test_a_large_value_is_never_shown_as_a_whole() -> None:
    Counted.times = 0
    shown([Counted()] * 1_000_000)
    assert Counted.times <= 10


@pytest.mark.parametrize("name", FILES)
def test_no_message_shows_a_value_by_itself(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    shown_whole = [
        node for node in ast.walk(tree) if isinstance(node, ast.FormattedValue) and node.conversion == ord("r")
    ]
    assert not shown_whole, [ast.unparse(node.value) for node in shown_whole]
