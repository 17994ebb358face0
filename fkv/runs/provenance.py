"""Digests of what results depend on besides the config: weights, traces, questions, code.

`rundir.open_run` records them, and refuses to resume a run if they have changed.
"""

import dataclasses
import dis
import hashlib
import importlib.util
import json
import re
import struct
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fkv.data.traces import Traces
from fkv.models import gguf, loading
from fkv.policies.base import Policy

WHOLE = 2**28  # bytes; smaller files are read whole
_BLOCKS, _BLOCK = 16, 4096  # per tensor of a larger file
_TOKENIZER = re.compile(
    r"(generation_|tokenizer_|)config\.json|(tokenizer|vocab|special_tokens_map|added_tokens)\.json"
    r"|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(json|jinja)"
)


def of_arrays(tree: Any) -> str:
    """Digest of the arrays of a pytree, in its order."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def of_traces(found: Traces) -> str:
    """Digest of the tokens and prompt lengths of traces, whatever their padding."""
    sha = hashlib.sha256()
    for token, length, prompt in zip(found.token_nt, found.length_n, found.prompt_n, strict=True):
        sha.update(struct.pack("<qq", length, prompt))
        sha.update(np.ascontiguousarray(token[:length], "<i4"))
    return sha.hexdigest()


def of_text(text: str) -> str:
    """A short digest."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_questions(questions: Iterable[tuple]) -> list[str]:
    """Digests of questions, one each: of the prompt's ids and whatever else belongs to it."""
    found = []
    for prompt, *rest in questions:
        found.append(of_text(json.dumps([np.asarray(prompt), *rest], default=np.ndarray.tolist)))
    return found


def of_weights(place: Path) -> str:
    """Digest of a checkpoint's `config.json` and tensors, or of a GGUF file.

    From files above 256 MiB it reads the header and 16 evenly spaced blocks of 4 KiB per tensor:
    20 MB of the 16 GB of an 8 B model.
    """
    sha = hashlib.sha256()
    paths = [place]
    if place.is_dir():
        sha.update((place / "config.json").read_bytes())
        names = set(loading.files_of_tensors(place)[0].values())
        paths = [place / name for name in sorted(names)]
    for path in paths:
        sha.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            if path.stat().st_size <= WHOLE:
                sha.update(hashlib.file_digest(file, "sha256").digest())
                continue
            header, places = _layout(path)
            sha.update(file.read(header))
            for first, end in places:
                last = max(first, end - _BLOCK)
                for start in sorted({*np.linspace(first, last, _BLOCKS, dtype=np.int64).tolist()}):
                    file.seek(start)
                    sha.update(file.read(min(_BLOCK, end - start)))
    return sha.hexdigest()


def _layout(path: Path) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of the header of a file, and of each tensor the first and the end, by names."""
    if path.suffix != ".safetensors":
        header = gguf.header(path)
        return header.size, [(t.start, t.start + t.size) for _, t in sorted(header.tensors.items())]
    with path.open("rb") as file:
        size = file.read(8)
        tensors = json.loads(file.read(*struct.unpack("<Q", size)))
    before = 8 + struct.unpack("<Q", size)[0]
    tensors.pop("__metadata__", None)
    places = [tensors[name]["data_offsets"] for name in sorted(tensors)]
    return before, [(before + first, before + end) for first, end in places]


def of_tokenizer(directory: Path) -> str:
    """Digest of the files, or of a GGUF file's metadata, that define tokenization and stops."""
    if directory.is_file():
        metadata = gguf.header(directory).metadata
        ours = {key: x for key, x in metadata.items() if key.startswith("tokenizer.")}
        return hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()
    sha = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file() and _TOKENIZER.fullmatch(path.name):
            sha.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode())
    return sha.hexdigest()


def of_settings(policy: Policy) -> str:
    """Digest of the name of a policy's class and the values of its fields."""
    return _Digest(None).of(policy)


def of_policy(policy: Policy) -> str:
    """Digest of a policy's settings, the code of its class and all code that it calls.

    Code means bytecode: comments, docstrings and layout do not count, code in notebooks does. Of
    libraries, and of fkv outside `fkv.policies`, only names count.
    """
    fields = [getattr(policy, field.name) for field in dataclasses.fields(policy)]
    inner = jax.tree.leaves(fields, is_leaf=lambda x: isinstance(x, Policy))
    classes = {cls for x in (policy, *inner) if isinstance(x, Policy) for cls in type(x).__mro__}
    ours = {cls.__module__.partition(".")[0] for cls in classes}
    return _Digest(ours - {"fkv", *sys.stdlib_module_names}).of(policy)


_PLAIN = (bool, int, float, complex, str, bytes)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_NAMED = {*dis.hasconst, *dis.hasname}  # opcodes whose argument is an object, not a number
# What library wrappers hold: jax.jit, functools.partial and cached_property, property ...
_HELD = ("__wrapped__", "__func__", "fget", "fset", "func", "args", "keywords")
_CODE = (types.FunctionType, classmethod, staticmethod, property)


def _entries(x: Iterable) -> list:
    """The entries of a container, in the same order in every process."""
    if isinstance(x, Mapping):
        return [*x.items()]
    return sorted(x, key=repr) if isinstance(x, set | frozenset) else [*x]


class _Digest:
    """Walks through an object and the code reachable from it.

    The code of the top-level modules `ours` is followed even if they are installed as libraries;
    with None no code is.
    """

    def __init__(self, ours: set[str] | None):
        self._ours, self._sha = ours, hashlib.sha256()
        self._seen, self._searched = {}, set()

    def of(self, x: Any) -> str:
        self._walk(x)
        return self._sha.hexdigest()

    def _say(self, *words: Any) -> None:
        self._sha.update(repr(words).encode())

    def _follows(self, module: str | None) -> bool:
        if self._ours is None:
            return False
        top = (module or "").partition(".")[0]
        if top in self._ours or (module or "").startswith("fkv.policies"):
            return True
        if top == "fkv" or top in sys.stdlib_module_names:
            return False
        try:
            spec = importlib.util.find_spec(module if module in sys.modules else top)
            return not (spec.origin or "").startswith(_LIBRARIES)
        except (AttributeError, ValueError):  # code without a file
            return True

    def _walk(self, *objects: Any) -> None:
        for x in objects:
            if x is None or x is ... or type(x) in _PLAIN:
                self._say(type(x).__name__, x)
            elif type(x) in (tuple, frozenset):  # Python may or may not intern equal ones
                self._say(type(x).__name__, len(x))
                self._walk(*_entries(x))
            elif id(x) in self._seen:
                self._say("again", self._seen[id(x)][0])
            else:
                self._seen[id(x)] = len(self._seen), x  # kept alive, so that its id stays unique
                self._object(x)

    def _object(self, x: Any) -> None:
        if isinstance(x, np.ndarray | np.generic | jax.Array):
            x = np.asarray(x)
            self._say(str(x.dtype), x.shape, x.tobytes())
            return
        self._walk(type(x))
        follows = self._follows(type(x).__module__)
        if isinstance(x, types.ModuleType):
            self._say(x.__name__)
        elif isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, type):
            self._class(x)
        elif dataclasses.is_dataclass(x):
            self._walk({f.name: getattr(x, f.name) for f in dataclasses.fields(x)})
        elif not follows and (held := [getattr(x, n) for n in _HELD if hasattr(x, n)]):
            self._walk(*held)
        elif isinstance(x, list | tuple | set | frozenset | Mapping):
            self._walk(len(x), *_entries(x))
        else:
            self._walk(*(kind.__repr__(x) for kind in _PLAIN if isinstance(x, kind)))
            self._walk(x.__getstate__() if follows else re.sub(r" at 0x[0-9a-f]+", "", repr(x)))

    def _class(self, x: type) -> None:
        self._say(x.__module__, x.__qualname__)
        if self._follows(x.__module__):
            self._walk(*x.__bases__)
            for name, value in sorted(vars(x).items()):
                described = name.startswith("__") and not isinstance(value, _CODE)
                if not described and not name.startswith("__annotate") and name != "kind":
                    self._walk(name, value)

    def _function(self, x: types.FunctionType) -> None:
        # By globals, as decorators copy the module name of the function they wrap.
        module = x.__globals__.get("__name__")
        self._say(module, x.__name__)
        if self._ours is None:
            return
        follows = self._follows(module)
        for cell in x.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # still empty
                continue
            # Of library closures, such as jax.vmap's, only the arguments.
            if follows or isinstance(value, (*_PLAIN, tuple, types.FunctionType)):
                self._walk(value)
        self._walk(getattr(x, "__wrapped__", None), getattr(x, "registry", None))  # singledispatch
        if follows:
            names, imports = self._code(x.__code__)
            self._walk(x.__defaults__, x.__kwdefaults__)
            self._look_up(x.__globals__, names)
            for name in sorted(imports):
                try:
                    name = importlib.util.resolve_name(name, x.__globals__.get("__package__"))
                    module = importlib.import_module(name) if self._follows(name) else None
                except Exception:  # the policy will raise the same
                    continue
                self._look_up(module or {}, names)

    def _code(self, x: types.CodeType) -> tuple[set[str], set[str]]:
        """Walks through code; returns the names it looks up and the modules it imports."""
        arguments = x.co_varnames[: x.co_argcount + x.co_kwonlyargcount]
        self._say(x.co_argcount, x.co_posonlyargcount, arguments, x.co_flags, x.co_exceptiontable)
        names, imports, steps = set(x.co_names), set(), list(dis.get_instructions(x))
        for i, step in enumerate(steps):  # no step loads the docstring
            value = step.argval if step.opcode in _NAMED else step.arg
            self._walk(step.opname, None if isinstance(value, types.CodeType) else value)
            if isinstance(value, types.CodeType):
                more, modules = self._code(value)
                names, imports = names | more, imports | modules
            elif step.opname == "IMPORT_NAME":
                imports.add("." * steps[i - 2].argval + value)
        return names, imports

    def _look_up(self, scope: Mapping[str, Any] | types.ModuleType, names: set[str]) -> None:
        """Walks through the objects behind names, those in referenced modules, too."""
        if isinstance(scope, types.ModuleType):
            key = scope.__name__, frozenset(names)
            if key in self._searched or not self._follows(scope.__name__):
                return
            self._searched.add(key)
            scope = vars(scope)
        for name in sorted(names & scope.keys() - {"_REGISTRY"}):  # not other policies
            self._walk(name, scope[name])
            if isinstance(scope[name], types.ModuleType):
                self._look_up(scope[name], names)
