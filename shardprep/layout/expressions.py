"""Compute the integer expressions by which the rules say sizes, over the values of one config."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from typing import Any

from shardprep_runtime.errors import LayoutError, quote


def evaluate(expression: str, values: Mapping[str, Any]) -> int:
    """Compute an integer expression over config values.

    Args:
        expression: Python's arithmetic over keys; `a | b` is a where the config has it, else b.
        values: Key of the config -> value.

    Raises:
        LayoutError: Where the config lacks a key, or its value is not a positive integer.
    """

    def walk(node: ast.expr) -> int | None:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=key):
                found = values.get(key)
                if found is not None and (type(found) is not int or found < 1):
                    raise LayoutError(f"config.json: {key} is {quote(found)}, expected a positive integer")
                return found
            case ast.Call(func=ast.Name(id="len"), args=[ast.Name(id=key)]):
                listed = values.get(key)
                if listed is not None and not isinstance(listed, list):
                    raise LayoutError(f"config.json: {key} is {quote(listed)}, expected a list")
                return None if listed is None else len(listed)
            case ast.Attribute(value=ast.Name(id=outer), attr=key):
                inner = values.get(outer)
                return walk_in(inner, ast.Name(id=key)) if isinstance(inner, Mapping) else None
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                first = walk(left)
                return first if first is not None else walk(right)
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div() | ast.Add() as operator, right=right):
                a, b = walk(left), walk(right)
                if a is None or b is None:
                    return None
                return (
                    a + b
                    if isinstance(operator, ast.Add)
                    else a * b
                    if isinstance(operator, ast.Mult)
                    else a // b
                )
        raise AssertionError(f"architectures.json: {expression!r}")

    def walk_in(inner: Mapping[str, Any], node: ast.Name) -> int | None:
        return evaluate(node.id, inner) if inner.get(node.id) is not None else None

    found = walk(_parse(expression))
    if found is None:
        raise LayoutError(f"config.json lacks what the layout needs: {expression}")
    return found


@cache
def _parse(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body
