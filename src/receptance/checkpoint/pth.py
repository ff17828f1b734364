"""PyTorch `.pth` files, read without executing their pickle.

A `.pth` file is a zip archive: `<root>/data.pkl` names the tensors, `<root>/data/<key>` hold their bytes. A pickle is a
program; `interpret` runs only the few instructions and the few names that a dict of tensors needs, builds plain Python
data from them and refuses everything else. Nothing is ever imported or called because a file says so.
"""

import io
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from receptance.errors import CheckpointError

from .source import ITEM_SIZE, MappedFile, Record, StoredTensor, TensorSource, check_total, show

if TYPE_CHECKING:
    import torch

MAX_DIRECTORY = 2 << 20  # bytes of zip directory read at once; a model of 2,000 tensors needs a tenth of it
MAX_PICKLE = 16 << 20
MAX_INSTRUCTIONS = 240_000  # a model of 2,000 tensors needs 80,000; this many take half a second

STORAGES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch BFloat16Storage": "bfloat16",
    "torch HalfStorage": "float16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}
FUNCTIONS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
T = TypeVar("T")

WRAPPERS = ("state_dict", "model", "module")


class Refused(Exception):
    """The pickle does something a dict of tensors does not need."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle would import; here it stays a name."""

    name: str


@dataclass(frozen=True)
class Storage:
    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class TensorPlan:
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def open_pth(file: MappedFile) -> TensorSource:
    records = zip_records(file)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise file.error("is a zip archive but no PyTorch checkpoint: it has no single <root>/data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in records:
        raise file.error("is a TorchScript program, not a checkpoint; save the model's state_dict() instead")
    if (order := records.get(f"{root}byteorder")) is not None and content(order) != b"little":
        raise file.error(f"byte order is {show(content(order)[:16].decode('latin-1'))}, only 'little' is supported")

    program = records[pickles[0]]
    if program.size > MAX_PICKLE:
        raise file.error(f"its pickle has {program.size} bytes, more than {MAX_PICKLE}: this is no plain checkpoint")
    source = TensorSource(file.path, {}, records=[record for record in records.values() if record.crc32])
    # the pickle before the tensors: a damaged name would only confuse the messages that follow
    TensorSource(file.path, {}, records=[record for record in source.records if record is program]).verify()

    plans = tensor_dict(file, run(file, content(program)))
    uses: dict[str, int] = {}
    for plan in plans.values():
        uses[plan.storage.key] = uses.get(plan.storage.key, 0) + 1
    for name, plan in plans.items():
        record = records.get(f"{root}data/{plan.storage.key}")
        item = ITEM_SIZE[plan.storage.dtype]
        if record is None:
            raise file.error(f"tensor {show(name)}: its bytes, record data/{show(plan.storage.key)}, are missing")
        if record.size != plan.storage.numel * item:
            raise file.error(
                f"tensor {show(name)}: its record has {record.size} bytes, expected {plan.storage.numel} x {item}"
            )
        start = record.offset
        is_shared = uses[plan.storage.key] > 1
        tensor = StoredTensor(
            file, plan.storage.dtype, plan.shape, start + plan.offset * item, plan.stride, is_shared=is_shared
        )
        tensor.check(name, start, start + record.size)
        if plan.stride == contiguous_stride(plan.shape):
            tensor = StoredTensor(file, tensor.dtype, tensor.shape, tensor.offset, is_shared=is_shared)
        source.tensors[name] = tensor
    return check_total(source)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))


def content(record: Record) -> bytes:
    return record.file.data[record.offset : record.offset + record.size]


# The archive ---------------------------------------------------------------------------------------------------------


class BoundedReader(io.BytesIO):
    """What zipfile reads from: the mapped file, but never much of it at once."""

    def __init__(self, file: MappedFile) -> None:
        super().__init__()
        self.file, self.position = file, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self.position, self.file.size)[whence]
        if position < 0:
            raise OSError("seek before the start")
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = max(0, self.file.size - self.position)
        if size > MAX_DIRECTORY:
            raise self.file.error(f"its zip directory claims {size} bytes, more than {MAX_DIRECTORY}; refusing it")
        data = self.file.data[self.position : self.position + size]
        self.position += len(data)
        return data


def zip_records(file: MappedFile) -> dict[str, Record]:
    """Where each record of the archive lies. Only stored (uncompressed), unencrypted records can be mapped."""
    try:
        with zipfile.ZipFile(BoundedReader(file)) as archive:
            entries = archive.infolist()
    except CheckpointError:
        raise
    except Exception as error:  # on damaged directories zipfile raises half a dozen types
        raise file.error(f"its zip directory is damaged ({error}); the file may be cut short, get it again") from error

    records: dict[str, Record] = {}
    for entry in entries:
        where = f"record {show(entry.filename)}"
        if entry.filename in records:
            raise file.error(f"{where} occurs twice")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise file.error(f"{where} is compressed; PyTorch never does that, refusing to unpack it")
        if entry.flag_bits & 0x1:
            raise file.error(f"{where} is encrypted")
        start = entry.header_offset
        header = file.data[max(start, 0) : max(start, 0) + 30]
        if start < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise file.error(f"{where} does not begin where the zip directory says; the file is damaged")
        start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if start + entry.file_size > file.size:
            raise file.error(f"{where} reaches beyond the end of the file; the file is cut short, get it again")
        records[entry.filename] = Record(file, entry.filename, start, entry.file_size, entry.CRC)

    by_position = sorted((record for record in records.values() if record.size), key=lambda record: record.offset)
    for first, second in pairwise(by_position):
        if first.offset + first.size > second.offset:
            raise file.error(f"records {show(first.name)} and {show(second.name)} overlap; refusing the file")
    return records


# The pickle ----------------------------------------------------------------------------------------------------------


def tensor_dict(file: MappedFile, result: object) -> dict[str, TensorPlan]:
    """The flat dict of tensors, also when it lies one level deep under one of WRAPPERS."""
    if not isinstance(result, dict):
        raise file.error(f"holds a {type(result).__name__}, expected a dict of tensors; save the model's state_dict()")
    entries: dict[object, object] = result
    if not any(isinstance(value, TensorPlan) for value in entries.values()):
        inner = [value for key in WRAPPERS if isinstance(value := entries.get(key), dict)]
        if len(inner) != 1:
            raise file.error(
                f"holds no tensors; its entries are {', '.join(map(show, list(entries)[:5])) or 'none'}. "
                "Expected a dict of tensors, or one under 'state_dict', 'model' or 'module'"
            )
        entries = inner[0]
    plans = {}
    for name, value in entries.items():
        if not isinstance(name, str) or not isinstance(value, TensorPlan):
            raise file.error(f"entry {show(name)} is a {type(value).__name__}, expected a tensor; save a state_dict()")
        plans[name] = value
    return plans


def run(file: MappedFile, program: bytes) -> object:
    try:
        return interpret(program)
    except Refused as error:
        raise file.error(
            f"its pickle {error}; refusing to run code from a file. If you trust its origin, "
            "load it with torch yourself and save its state_dict() again"
        ) from None
    # what a damaged program leads to: an empty stack, an absent memo entry, an argument of the wrong type;
    # and where warnings are errors, an odd escape in a string
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, EOFError, Warning) as error:
        raise file.error(
            f"its pickle is damaged ({type(error).__name__}: {str(error)[:100]}); get the file again"
        ) from None


def interpret(program: bytes) -> object:
    """Evaluate a pickle program that builds a dict of tensors; every tensor becomes a TensorPlan.

    Containers are shared, never copied, so that a program of n instructions builds at most n objects, and only strings
    and integers become dict keys, so that nothing nested is ever hashed or printed.
    """
    stack: list[object] = []
    below: list[list[object]] = []  # the stacks set aside by MARK
    memo: dict[int, object] = {}

    def since_mark() -> list[object]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    for count, (opcode, arg, _) in enumerate(pickletools.genops(program)):
        if count >= MAX_INSTRUCTIONS:
            raise Refused(f"has more than {MAX_INSTRUCTIONS} instructions")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                if below or len(stack) != 1:
                    raise ValueError("values left over")
                return stack[0]
            case "MARK":
                below.append(stack)
                stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "LONG1":
                if not 0 <= expect(arg, int) < 1 << 63:
                    raise ValueError("an absurd integer")
                stack.append(arg)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                if len(stack) < n:
                    raise IndexError("stack is empty")
                stack[-n:] = [tuple(stack[-n:])]
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode.name == "APPEND" else since_mark()
                expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                if opcode.name == "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    items = [key, value]
                else:
                    items = since_mark()
                fill(expect(stack[-1], dict), items)
            case "BINPUT" | "LONG_BINPUT":
                memo[expect(arg, int)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[expect(arg, int)])
            case "GLOBAL":
                stack.append(known_global(expect(arg, str)))
            case "STACK_GLOBAL":
                name, module = expect(stack.pop(), str), expect(stack.pop(), str)
                stack.append(known_global(f"{module} {name}"))
            case "REDUCE":
                args, function = expect(stack.pop(), tuple), expect(stack.pop(), Global)
                stack.append(rebuild(function.name, args))
            case "BUILD":
                # state_dict() hangs its `_metadata` on the OrderedDict; it says nothing about tensors
                expect(stack.pop(), dict)
                expect(stack[-1], OrderedDict)
            case "BINPERSID":
                stack.append(storage(expect(stack.pop(), tuple)))
            case name:
                raise Refused(f"uses the instruction {name}")
    raise ValueError("no STOP")


def expect(value: object, kind: type[T]) -> T:
    """`value`, which must be of exactly this kind (a bool is no int here)."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{type(value).__name__} where a {kind.__name__} belongs")
    return value


def fill(target: dict[object, object], items: list[object]) -> None:
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2]):
        if type(key) not in (str, int):
            raise TypeError(f"{type(key).__name__} as a dict key")
        if key in target:
            raise ValueError(f"the entry {show(key)} occurs twice")
        target[key] = value


def known_global(name: str) -> Global:
    if name not in FUNCTIONS and name not in STORAGES:
        raise Refused(f"asks for {show(name.replace(' ', '.', 1))}, which no plain checkpoint needs")
    return Global(name)


def storage(args: tuple[object, ...]) -> Storage:
    tag, kind, key, _location, numel = args
    if tag != "storage":
        raise ValueError("an unknown kind of reference")
    return Storage(STORAGES[expect(kind, Global).name], expect(key, str), expect(numel, int))


def rebuild(function: str, args: tuple[object, ...]) -> object:
    """What the known functions would return, as plain data."""
    if function == "collections OrderedDict" and not args:
        return OrderedDict()
    if function == "torch._utils _rebuild_parameter":
        return expect(args[0], TensorPlan)
    if function == "torch._utils _rebuild_tensor_v2":
        stored, offset, shape, stride, _requires_grad, _hooks, *flags = args
        if any(flags):  # conjugate or negative views
            raise ValueError("a tensor with flags")
        plan = TensorPlan(
            expect(stored, Storage),
            expect(offset, int),
            tuple(expect(size, int) for size in expect(shape, tuple)),
            tuple(expect(step, int) for step in expect(stride, tuple)),
        )
        if plan.offset < 0:
            raise ValueError("a negative offset")
        return plan
    raise ValueError(f"an unexpected use of {function}")


# Writing -------------------------------------------------------------------------------------------------------------


def write_pth(file: BinaryIO, tensors: "Mapping[str, torch.Tensor]") -> None:
    """A flat dict as torch.save writes it. Each tensor gets its own storage: a view would drag its whole base along."""
    import torch

    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        is_alone = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.data_ptr() not in seen
        plain[name] = tensor if is_alone else tensor.clone()
        seen.add(plain[name].data_ptr())
    torch.save(plain, file)
