"""Decide what a torch pickle says, executing nothing: every global stays a symbol, every call is looked up by name.

The opcodes are those that picklers write at protocols 2 to 5 (CPython's `Lib/pickletools.py` describes them), and
INT, which Python 2 wrote for large integers. The calls that are understood are torch's rebuild functions
(`torch/_utils.py`, `torch/_tensor.py`). What training scripts leave beside the weights becomes an `Opaque`. Any other
call has the whole file refused. Dicts are kept as pairs: a hostile file could make the hashing of its keys slow.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from shardprep_runtime.errors import FormatError, quote
from shardprep_runtime.format import dtypes
from shardprep_runtime.format.header import MAX_DIMS, is_size

MAX_PICKLE_BYTES: Final = 256 * 2**20
MAX_OPCODES: Final = 8_000_000
"""Opcodes that a pickle may have. About thirty describe a tensor. One may cost a hundred bytes of memory, so that this
bounds the memory that a file can make us use."""
MAX_NAME: Final = 256

_TORCH_DTYPES: Final = {torch_name: name for name, torch_name in dtypes.TORCH.items()}
_STORAGES: Final[
    dict[str, tuple[str, int]]
] = {  # class -> our dtype, or torch's own where we have none; bytes
    "BoolStorage": ("BOOL", 1),
    "ByteStorage": ("U8", 1),
    "CharStorage": ("I8", 1),
    "ShortStorage": ("I16", 2),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "IntStorage": ("I32", 4),
    "FloatStorage": ("F32", 4),
    "LongStorage": ("I64", 8),
    "DoubleStorage": ("F64", 8),
    "ComplexFloatStorage": ("C64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
    "UntypedStorage": ("U8", 1),
}

# Payloads find their calls in the standard library, so that its other names are refused even where nothing calls them.
_STDLIB: Final = sys.stdlib_module_names | {
    "__builtin__",
    "copy_reg",
    "commands",
    "popen2",
    "cPickle",
    "StringIO",
}
_HARMLESS: Final = re.compile(
    r"(builtins|__builtin__)\.(bool|int|long|float|complex|str|unicode|bytes|bytearray|list|tuple|dict|set|frozenset"
    r"|object|range|xrange|slice|Ellipsis|NotImplemented)"
    r"|collections\.(OrderedDict|defaultdict|Counter|deque|UserDict)|argparse\.Namespace|types\.SimpleNamespace"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path|datetime\.(datetime|date|time|timedelta|timezone)"
    r"|decimal\.Decimal|fractions\.Fraction|uuid\.(UUID|SafeUUID)|functools\.partial|random\.Random|_?io\.BytesIO"
    r"|_codecs\.encode|(copyreg|copy_reg)\._reconstructor|typing\.[A-Za-z]+"
)
_OPAQUE_CALLS: Final = re.compile(
    r"numpy\.(_?core)\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)|numpy\.(dtype|ndarray)"
    r"|numpy\.random\.([a-z0-9_]+\.)?(__(randomstate|generator|bit_generator)_ctor|__pyx_unpickle_[A-Za-z]+)"
    r"|torch\.(device|Generator)|torch\.serialization\._get_layout|torch\.torch_version\.TorchVersion"
    # enums and settings that training frameworks store: a class by its capital letter, never a function
    r"|(transformers|accelerate|deepspeed|peft|trl|omegaconf|megatron|lightning|lightning_fabric|pytorch_lightning)"
    r"(\.\w+)*\.[A-Z]\w*"
)
_MAPPINGS: Final = frozenset({"collections.OrderedDict", "collections.defaultdict"})
_PLAIN_TYPES: Final = frozenset(
    {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
)
_BAD_TENSORS: Final = {
    "torch._utils._rebuild_qtensor": "it is a quantized torch tensor; dequantize it before saving",
    "torch._utils._rebuild_sparse_tensor": "it is sparse; call .to_dense() before saving",
    "torch._utils._rebuild_nested_tensor": "it is a nested tensor, of no one shape",
    "torch.nested._internal.nested_tensor._rebuild_njt": "it is a nested tensor, of no one shape",
    "torch._utils._rebuild_meta_tensor_no_storage": "it is on the meta device: the file holds no data for it",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "it is a device tensor; call .cpu() before saving",
    "torch._utils._rebuild_device_tensor_from_numpy": "it is a device tensor; call .cpu() before saving",
    "torch._utils._rebuild_wrapper_subclass": "it is a tensor subclass; convert it to plain tensors before saving",
    "torch.nn.parameter.UninitializedParameter": "it was never initialized: the file holds no data for it",
    "torch.nn.parameter.UninitializedBuffer": "it was never initialized: the file holds no data for it",
    "torch.storage._load_from_bytes": "it is a pickle within the pickle; save it by torch.save",
}


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name that the pickle would have imported."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """A dict or an OrderedDict."""

    pairs: list[tuple[object, object]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """An object that was not made: what the pickle would have called, and all arguments of the call."""

    what: str
    parts: list[object] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of raw bytes elsewhere in the file, or a part of one."""

    key: str
    dtype: str
    itemsize: int
    start: int
    """First byte, counted from the start of the run."""
    nbytes: int
    location: str


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor as the pickle describes it. That it lies in its storage is proved later (torch_files.py)."""

    storage: Storage
    dtype: str
    """Our name of the dtype, or torch's where safetensors has no such dtype."""
    offset: object
    shape: tuple[object, ...]
    strides: tuple[object, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BadTensor:
    """A tensor of a kind that cannot be carried over."""

    reason: str


@dataclass(frozen=True, slots=True)
class Pickle:
    """The value that one pickle describes, and the storages that it refers to."""

    value: object
    stop: int
    """The byte after the STOP opcode, counted from the start of the data."""
    storages: dict[str, Storage]
    """Key -> storage, each of them whole, for every storage that the pickle mentions."""
    opcodes: int


class TruncatedPickleError(FormatError):
    """The bytes end within the pickle: a caller that passed a window of the file tries a larger one."""


def read_pickle(data: bytes, start: int = 0, *, where: str, legacy: bool = False) -> Pickle:
    """Interpret the pickle that begins at `data[start]`, in time and memory that are proportional to its bytes.

    Args:
        start: First byte of the pickle.
        where: The file as error messages name it.
        legacy: Whether storages are described as torch's format before the zip does.

    Raises:
        TruncatedPickleError: Where the data end within the pickle.
        FormatError: On any other breach, for a call that weights do not need, and for more than MAX_OPCODES.
    """
    machine = _Machine(data, start, where, legacy)
    value = machine.run()
    return Pickle(value, machine.pos, machine.storages, machine.opcodes)


def describe(value: object) -> str:
    """Say what `value` is in a few words. Its parts are not described, since they may contain it again."""
    match value:
        case Global():
            return f"a reference to {quote(value.path)}"
        case Opaque():
            return f"a {quote(value.what)} object"
        case Items():
            return "a dict"
        case View() | BadTensor():
            return "a tensor"
        case Storage():
            return "a bare storage"
        case None:
            return "None"
        case _:
            return f"a value of type {type(value).__name__}"


def _text(raw: bytes) -> object:
    return raw.decode("utf-8")


def _py2_text(raw: bytes) -> object:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:  # Python 2 wrote text and bytes with the same opcodes
        return raw


def _integer(raw: bytes) -> object:
    return int.from_bytes(raw, "little", signed=True)


def _unsigned(raw: bytes) -> object:
    return int.from_bytes(raw, "little")


def _float(raw: bytes) -> object:
    return struct.unpack(">d", raw)[0]


_CONSTANTS: Final[dict[bytes, object]] = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_FRESH: Final[dict[bytes, Callable[[], object]]] = {
    b"]": list,
    b"}": Items,
    b"\x8f": lambda: Opaque("set"),
}
_TUPLES: Final = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_FIXED: Final = {b"J": (4, _integer), b"K": (1, _unsigned), b"M": (2, _unsigned), b"G": (8, _float)}
# opcode -> bytes of the count, what follows
_COUNTED: Final[dict[bytes, tuple[int, Callable[[bytes], object]]]] = {
    b"X": (4, _text),
    b"\x8c": (1, _text),
    b"\x8d": (8, _text),
    b"T": (4, _py2_text),
    b"U": (1, _py2_text),
    b"B": (4, bytes),
    b"C": (1, bytes),
    b"\x8e": (8, bytes),
    b"\x96": (8, bytes),  # a bytearray: protocol 5 keeps numpy arrays in one
    b"\x8a": (1, _integer),
}
_PUTS: Final = {b"q": 1, b"r": 4}
_GETS: Final = {b"h": 1, b"j": 4}


class _Machine:
    """The stack machine that a pickle is written for. It changes nothing but its own stack and memo."""

    def __init__(self, data: bytes, pos: int, where: str, legacy: bool) -> None:
        self.data, self.pos, self.where, self.legacy = data, pos, where, legacy
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.storages: dict[str, Storage] = {}
        self.opcodes = 0

    def damaged(self, what: str) -> FormatError:
        return FormatError(f"{self.where}: byte {self.pos}: {what}; damaged, or made to harm")

    def hostile(self, what: str) -> FormatError:
        return FormatError(
            f"{self.where}: {what}: refused, nothing was executed\n"
            "if you trust the file, load it where it was made and torch.save(model.state_dict(), ...) alone"
        )

    def count(self, work: int) -> None:
        self.opcodes += work
        if self.opcodes > MAX_OPCODES:
            raise FormatError(
                f"{self.where}: more than {MAX_OPCODES} opcodes, far beyond any list of tensors"
            )

    def run(self) -> object:
        if self.take(1) != b"\x80" or not 2 <= self.take(1)[0] <= 5:
            raise self.damaged("not a pickle of protocol 2 to 5")
        stack, frame_stop = self.stack, 0
        while True:
            op = self.take(1)
            self.opcodes += 1
            if self.opcodes > MAX_OPCODES:
                self.count(0)
            if op in _GETS:
                index = int.from_bytes(self.take(_GETS[op]), "little")
                if index not in self.memo:
                    raise self.damaged(f"reads memo {index}, which was never written")
                stack.append(self.memo[index])
            elif op in _PUTS:
                self.memoize(int.from_bytes(self.take(_PUTS[op]), "little"))
            elif op == b"\x94":  # MEMOIZE
                self.memoize(len(self.memo))
            elif op in _COUNTED:
                width, kind = _COUNTED[op]
                raw = self.take(int.from_bytes(self.take(width), "little"))
                try:
                    stack.append(kind(raw))
                except UnicodeDecodeError:
                    raise self.damaged("text that is not UTF-8") from None
            elif op in _FIXED:
                width, kind = _FIXED[op]
                stack.append(kind(self.take(width)))
            elif op in _CONSTANTS:
                stack.append(_CONSTANTS[op])
            elif op in _FRESH:
                stack.append(_FRESH[op]())
            elif op in _TUPLES:
                stack.append(tuple(self.pop(_TUPLES[op])))
            elif op == b"(":
                self.marks.append(len(stack))
            elif op == b"t":
                stack.append(tuple(self.pop_mark()))
            elif op == b"Q":
                stack.append(self.persistent(*self.pop(1)))
            elif op == b"c":
                stack.append(self.symbol(self.line(), self.line()))
            elif op == b"\x93":  # STACK_GLOBAL
                stack.append(self.symbol(*self.pop(2)))
            elif op == b"R":
                stack.append(self.call(*self.pop(2)))
            elif op in (b"\x81", b"\x92"):  # NEWOBJ, NEWOBJ_EX
                stack.append(self.instance(*self.pop(2 if op == b"\x81" else 3)))
            elif op == b"b":
                self.build(*self.pop(1))
            elif op in (b"s", b"u"):
                self.set_items(self.pop(2) if op == b"s" else self.pop_mark())
            elif op in (b"a", b"e", b"\x90"):  # APPEND, APPENDS, ADDITEMS
                self.append(self.pop(1) if op == b"a" else self.pop_mark())
            elif op == b"\x91":  # FROZENSET
                stack.append(Opaque("frozenset", self.pop_mark()))
            elif op == b"I":
                stack.append(self.decimal())
            elif op == b"0":
                self.pop(1)
            elif op == b"1":
                self.pop_mark()
            elif op == b"\x95":  # FRAME
                length = int.from_bytes(self.take(8), "little")
                if frame_stop:
                    raise self.damaged("a frame within a frame")
                frame_stop = self.pos + length
                self.need(length)
            elif op == b".":
                break
            else:
                raise self.damaged(f"opcode 0x{op.hex()}, which torch.save does not write")
            if frame_stop and self.pos >= frame_stop:
                if self.pos > frame_stop:
                    raise self.damaged("an opcode that crosses the end of its frame")
                frame_stop = 0
        if frame_stop not in (0, self.pos) or self.marks or len(stack) != 1:
            raise self.damaged("stops before everything is put together")
        return stack[0]

    # bytes

    def need(self, count: int) -> None:
        if count > len(self.data) - self.pos:
            raise TruncatedPickleError(
                f"{self.where}: byte {self.pos}: truncated: {count} bytes expected, {len(self.data) - self.pos} left"
            )

    def take(self, count: int) -> bytes:
        start = self.pos
        self.pos = stop = start + count
        if stop > len(self.data):
            self.pos = start
            self.need(count)
        return self.data[start:stop]

    def line(self) -> str:
        end = self.data.find(b"\n", self.pos, self.pos + MAX_NAME)
        if end < 0:
            self.need(MAX_NAME)
            raise self.damaged(f"a line of more than {MAX_NAME} bytes")
        raw = self.take(end + 1 - self.pos)[:-1]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("a name that is not UTF-8") from None

    def decimal(self) -> int | bool:
        line = self.line()
        if line in ("00", "01"):
            return line == "01"
        if not re.fullmatch(r"-?[0-9]{1,20}", line):
            raise self.damaged("text that is not a decimal integer")
        return int(line)

    # the stack and the memo

    def pop(self, count: int) -> list[object]:
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise self.damaged("takes from an empty stack")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def pop_mark(self) -> list[object]:
        if not self.marks:
            raise self.damaged("looks for a mark where there is none")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.damaged("looks at an empty stack")
        return self.stack[-1]

    def memoize(self, index: int) -> None:
        if index > len(self.memo) + 1:  # Python 3 counts from 0, Python 2 from 1, neither skips
            raise self.damaged(f"writes memo {index} when {len(self.memo)} were written")
        self.memo[index] = self.top()

    def append(self, values: list[object]) -> None:
        match self.top():
            case list() as target:
                target.extend(values)
            case Opaque(parts=parts):
                parts.extend(values)
            case other:
                raise self.damaged(f"appends to {describe(other)}")

    def set_items(self, values: list[object]) -> None:
        if len(values) % 2:
            raise self.damaged("a key without a value")
        match self.top():
            case Items(pairs=pairs):
                pairs.extend(zip(values[::2], values[1::2], strict=True))
            case Opaque(parts=parts):
                parts.extend(values)
            case other:
                raise self.damaged(f"sets items of {describe(other)}")

    # symbols and calls

    def symbol(self, module: object, name: object) -> Global:
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > MAX_NAME:
            raise self.damaged("a global whose name is not a short text")
        found = Global(module, name)
        if module.partition(".")[0] in _STDLIB and not _HARMLESS.fullmatch(found.path):
            raise self.hostile(f"names {quote(found.path)}, which no weights need")
        return found

    def call(self, target: object, args: object) -> object:
        if not isinstance(target, Global) or type(args) is not tuple:
            raise self.hostile(f"calls {describe(target)}")
        path = target.path
        if path in _REBUILD:
            return _REBUILD[path](self, args)
        if path in _BAD_TENSORS:
            return BadTensor(_BAD_TENSORS[path])
        if path in _MAPPINGS:
            return self.mapping(target, args)
        if path.endswith("._reconstructor") and args and isinstance(args[0], Global):
            return self.instance(args[0], args)
        if args == () and target.module.partition(".")[0] not in _STDLIB and target.name[:1].isupper():
            return (
                Items()
            )  # a subclass of OrderedDict, say: its items follow, and its class is never looked for
        if _HARMLESS.fullmatch(path) or _OPAQUE_CALLS.fullmatch(path):
            return Opaque(path, [args])
        raise self.hostile(f"calls {quote(path)}")

    def instance(self, target: object, args: object, kwargs: object = None) -> Opaque:
        """Describe an object of a class that stays unknown. To make it would run the class's `__new__`.

        Args:
            target: The class, as a symbol.
        """
        if not isinstance(target, Global) or not target.name.isidentifier():
            raise self.hostile(f"makes an instance of {describe(target)}")
        return Opaque(target.path, [args, kwargs])

    def mapping(self, target: Global, args: tuple[object, ...]) -> Items:
        match args:
            case ():
                return Items()
            case (list() as pairs,) if target.name == "OrderedDict":  # Python 2 gave [key, value] lists
                self.count(len(pairs))  # a hostile file copies a long list by one opcode, again and again
                if all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
                    return Items([(key, value) for key, value in pairs])
            case (Global() | None,) if target.name == "defaultdict":
                return Items()
        raise self.damaged(f"a {target.name} made in an unknown way")

    def build(self, state: object) -> None:
        match self.top():
            case Items():
                return  # a state dict's _metadata: versions of modules
            case Opaque(parts=parts):
                parts.append(state)
            case View() | BadTensor() if isinstance(state, Items):
                return  # attributes that someone hung on a parameter
            case other:
                raise self.damaged(f"sets the state of {describe(other)}")

    def persistent(self, found: object) -> object:
        match found if type(found) is tuple else None:
            case ("module", Global() as container, _, _) if self.legacy:
                return (
                    container  # beside the source of a module's class; the module is refused where it is met
                )
            case ("storage", Global() as kind, str() as key, str() as location, int() as numel, *view):
                if (
                    kind.module not in ("torch", "torch.storage", "torch.cuda")
                    or kind.name not in _STORAGES
                    or not is_size(numel)
                    or len(view) != self.legacy
                ):
                    raise self.damaged("a storage described in an unknown way")
            case _:
                raise self.damaged("a reference to something outside the pickle that is not a storage")
        dtype, itemsize = _STORAGES[kind.name]
        whole = Storage(key, dtype, itemsize, 0, numel * itemsize, location)
        first = self.storages.setdefault(key, whole)
        if first.nbytes != whole.nbytes:
            raise self.damaged(
                f"storage {quote(key)} has {first.nbytes} bytes in one place, {whole.nbytes} in another"
            )
        match view:
            case [] | [None]:
                return whole
            case [tuple((str(), int() as start, int() as count))] if is_size(start) and is_size(count):
                if start + count <= numel:
                    return Storage(key, dtype, itemsize, start * itemsize, count * itemsize, location)
        raise self.damaged(f"a part of storage {quote(key)} that does not lie in it")

    # torch's rebuild functions

    def tensor(
        self, args: tuple[object, ...], *, least: int, dtype_at: int | None = None
    ) -> View | BadTensor:
        metadata = args[least] if len(args) > least > 4 else None
        if len(args) not in (least, least + (least > 4)) or not (
            metadata is None or isinstance(metadata, Items)
        ):
            raise self.damaged("a tensor with an unknown number of arguments")
        match args[:4]:
            case (Storage() as storage, offset, tuple() as shape, tuple() as strides):
                dtype = storage.dtype
            case _:
                raise self.damaged("a tensor without storage, sizes and strides")
        if dtype_at is not None:
            symbol = args[dtype_at]
            if not isinstance(symbol, Global) or symbol.module != "torch":
                raise self.damaged("a tensor whose dtype is not a torch dtype")
            dtype = _TORCH_DTYPES.get(symbol.name, symbol.name)
        if isinstance(metadata, Items) and any(value is not False for _, value in metadata.pairs):
            return BadTensor(
                "its conjugate or negative bit is set; call .resolve_conj().resolve_neg() before saving"
            )
        return View(storage, dtype, offset, shape, strides)

    def parameter(self, args: tuple[object, ...]) -> View | BadTensor:
        match args:
            case (View() | BadTensor() as tensor, _, _) | (View() | BadTensor() as tensor, _, _, _):
                return tensor
            case (Opaque() as found, _, _, *_):
                return BadTensor(f"it is a parameter made of {describe(found)}")
        raise self.damaged("a parameter without a tensor")

    def typed(self, args: tuple[object, ...]) -> View | BadTensor:
        match args:
            case (Global() as function, Global() as kind, tuple() as inner, _):
                if kind.path not in _PLAIN_TYPES:
                    return BadTensor(
                        f"it is a {quote(kind.path)}; convert it to a plain tensor before saving"
                    )
                if function.path in _BAD_TENSORS:
                    return BadTensor(_BAD_TENSORS[function.path])
                if function.path in _DIRECT:
                    return _DIRECT[function.path](self, inner)
        raise self.hostile("calls torch._tensor._rebuild_from_type_v2 for no tensor")

    def size(self, args: tuple[object, ...]) -> tuple[object, ...]:
        match args:
            case (tuple() | list() as sizes,) if len(sizes) <= MAX_DIMS:
                return tuple(sizes)
        raise self.damaged("a torch.Size of something else than sizes")


_Rebuild = Callable[[_Machine, tuple[object, ...]], object]
_DIRECT: Final[dict[str, Callable[[_Machine, tuple[object, ...]], View | BadTensor]]] = {
    "torch._utils._rebuild_tensor": lambda machine, args: machine.tensor(args, least=4),
    "torch._utils._rebuild_tensor_v2": lambda machine, args: machine.tensor(args, least=6),
    "torch._utils._rebuild_tensor_v3": lambda machine, args: machine.tensor(args, least=7, dtype_at=6),
    "torch._utils._rebuild_parameter": _Machine.parameter,
    "torch._utils._rebuild_parameter_with_state": _Machine.parameter,
}
_REBUILD: Final[dict[str, _Rebuild]] = {
    **_DIRECT,
    "torch._tensor._rebuild_from_type": _Machine.typed,
    "torch._tensor._rebuild_from_type_v2": _Machine.typed,
    "torch.Size": _Machine.size,
}
