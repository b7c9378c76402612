"""A pickle reader that executes nothing: it can build tensors' descriptions, containers, and inert stubs.

Megatron's `.pt` files are pickles of protocol 2 to 4 with `argparse.Namespace`, enums and library configs in them, more
than `torch.load(weights_only=True)` takes. This is a small stack machine over `pickletools.genops`: no class is
imported, no function called, no attribute set on a real object. `GLOBAL module name` gives a `Name`, calling anything
gives an `Inert` that remembers what was called with what, except for the handful in `_CALLS`. Everything is bounded.

Reference of the opcodes: CPython's Lib/pickletools.py.
"""

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from finerank.errors import CheckpointError

MAX_OPCODES = 20_000_000
_MAX_CONTAINERS = 5_000_000


@dataclass(frozen=True)
class Name:
    """A global that the pickle names, e.g. `torch BFloat16Storage`. Only a name."""

    module: str
    name: str


@dataclass(eq=False)
class Inert:
    """An object of a class that was not looked up: what it was called with and the state it was given."""

    kind: Any
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<inert {self.kind.name if isinstance(self.kind, Name) else 'object'}>"

    def attributes(self) -> dict[str, Any]:
        """Attributes of a Namespace-like object."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return {k: v for k, v in state.items() if isinstance(k, str)} if isinstance(state, dict) else {}


@dataclass(frozen=True)
class Persistent:
    """A persistent id; for torch files `('storage', Name, key, device, numel)`."""

    pid: Any


class _Mark:
    pass


_MARK = _Mark()


def _make_dict(args: tuple[Any, ...]) -> Any:
    return {} if not args else None


def _make_defaultdict(args: tuple[Any, ...]) -> Any:
    return {}


def _make_set(args: tuple[Any, ...]) -> Any:
    return list(args[0]) if len(args) == 1 and isinstance(args[0], list) else None


_CALLS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("collections", "OrderedDict"): _make_dict,
    ("collections", "defaultdict"): _make_defaultdict,
    ("builtins", "dict"): _make_dict,
    ("builtins", "set"): _make_set,
}
"""Calls that give a plain container; None falls back to an inert object."""


def load(data: bytes, source: str) -> Any:
    """The object that a pickle describes. Raises CheckpointError, naming `source`, for what is not well formed.

    Dicts, lists, tuples, strings, numbers and None are themselves; sets are lists; all else is `Name`, `Inert` or
    `Persistent`.
    """
    try:
        return _Machine(source).run(data)
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, OverflowError, EOFError, RecursionError, struct.error) as error:
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(
            f"{source} is damaged or no checkpoint: its pickle is not well formed ({detail})."
        ) from error


class _Machine:
    def __init__(self, source: str):
        self.source = source
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.num_containers = 0

    def run(self, data: bytes) -> Any:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
            if count > MAX_OPCODES:
                raise ValueError("too many opcodes")
            if opcode.name == "STOP":
                (result,) = self.stack
                return self._plain(result)
            if opcode.name in _PUSH_ARG:
                self.stack.append(arg)
            elif opcode.name in _PUSH_CONSTANT:
                self.stack.append(_PUSH_CONSTANT[opcode.name])
            else:
                method = getattr(self, f"op_{opcode.name}", None)
                if method is None:
                    raise ValueError(f"opcode {opcode.name} is not allowed")
                method(arg)
        raise ValueError("no STOP")

    def _plain(self, value: Any) -> Any:
        if value is _MARK:
            raise ValueError("a mark where a value is needed")
        return value

    def _pop(self) -> Any:
        return self._plain(self.stack.pop())

    def _top(self) -> Any:
        return self._plain(self.stack[-1])

    def _push_container(self, value: Any) -> None:
        self.num_containers += 1
        if self.num_containers > _MAX_CONTAINERS:
            raise ValueError("too many objects")
        self.stack.append(value)

    def _pop_to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise ValueError("no mark")

    def op_PROTO(self, arg: int) -> None:
        if not 0 <= arg <= 5:
            raise ValueError(f"protocol {arg}")

    def op_FRAME(self, arg: int) -> None:
        pass

    def op_MARK(self, arg: None) -> None:
        self.stack.append(_MARK)

    def op_POP(self, arg: None) -> None:
        self.stack.pop()

    def op_POP_MARK(self, arg: None) -> None:
        self._pop_to_mark()

    def op_DUP(self, arg: None) -> None:
        self.stack.append(self._top())

    def op_EMPTY_DICT(self, arg: None) -> None:
        self._push_container({})

    def op_EMPTY_LIST(self, arg: None) -> None:
        self._push_container([])

    def op_EMPTY_SET(self, arg: None) -> None:
        self._push_container([])

    def op_LIST(self, arg: None) -> None:
        self._push_container(self._pop_to_mark())

    def op_DICT(self, arg: None) -> None:
        target: dict[Any, Any] = {}
        self._set_items(target, self._pop_to_mark())
        self._push_container(target)

    def op_TUPLE(self, arg: None) -> None:
        self._push_container(tuple(self._pop_to_mark()))

    def op_TUPLE1(self, arg: None) -> None:
        self._tuple(1)

    def op_TUPLE2(self, arg: None) -> None:
        self._tuple(2)

    def op_TUPLE3(self, arg: None) -> None:
        self._tuple(3)

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push_container(tuple(items[::-1]))

    def op_FROZENSET(self, arg: None) -> None:
        self._push_container(self._pop_to_mark())

    def op_APPEND(self, arg: None) -> None:
        item = self._pop()
        self._append(self._top(), [item])

    def op_APPENDS(self, arg: None) -> None:
        items = self._pop_to_mark()
        self._append(self._top(), items)

    op_ADDITEMS = op_APPENDS

    def _append(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Inert):
            target.items.extend(items)
        else:
            raise ValueError("append to what is no list")

    def op_SETITEM(self, arg: None) -> None:
        value = self._pop()
        key = self._pop()
        self._set_items(self._top(), [key, value])

    def op_SETITEMS(self, arg: None) -> None:
        items = self._pop_to_mark()
        self._set_items(self._top(), items)

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, Inert):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            for key, value in pairs:
                target[_hashable(key)] = value
        else:
            raise ValueError("set an item of what is no dict")

    def op_GLOBAL(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.stack.append(Name(module, name))

    def op_STACK_GLOBAL(self, arg: None) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global whose name is no text")
        self.stack.append(Name(module, name))

    def op_REDUCE(self, arg: None) -> None:
        args, kind = self._pop(), self._pop()
        self._call(kind, args)

    def op_NEWOBJ(self, arg: None) -> None:
        self.op_REDUCE(arg)

    def op_NEWOBJ_EX(self, arg: None) -> None:
        kwargs, args, kind = self._pop(), self._pop(), self._pop()
        if not isinstance(kwargs, dict):
            raise ValueError("keywords that are no dict")
        self._call(kind, args)

    def _call(self, kind: Any, args: Any) -> None:
        if not isinstance(args, tuple):
            raise ValueError("arguments that are no tuple")
        made = None
        if isinstance(kind, Name) and (make := _CALLS.get((kind.module, kind.name))):
            made = make(args)
        self._push_container(Inert(kind, args) if made is None else made)

    def op_BUILD(self, arg: None) -> None:
        state = self._pop()
        target = self._top()
        if isinstance(target, Inert):
            target.state = state
        # a dict's own attributes (OrderedDict of a state_dict has `_metadata`) are of no use here

    def op_PUT(self, arg: int) -> None:
        if len(self.memo) > _MAX_CONTAINERS:
            raise ValueError("too many objects")
        self.memo[arg] = self._top()

    op_BINPUT = op_LONG_BINPUT = op_PUT

    def op_MEMOIZE(self, arg: None) -> None:
        self.op_PUT(len(self.memo))

    def op_GET(self, arg: int) -> None:
        self.stack.append(self.memo[arg])

    op_BINGET = op_LONG_BINGET = op_GET

    def op_BINPERSID(self, arg: None) -> None:
        self.stack.append(Persistent(self._pop()))


def _hashable(key: Any) -> Any:
    """Keys are scalars or short tuples of them: hashing a deeply nested tuple would exhaust the C stack."""
    if isinstance(key, str | int | float | bool | bytes | Name) or key is None or isinstance(key, Inert):
        return key
    if isinstance(key, tuple) and all(isinstance(k, str | int | float | bool | bytes) or k is None for k in key):
        return key
    raise ValueError("a dict key that is no scalar")


_PUSH_ARG = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
