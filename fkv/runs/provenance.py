"""Digests of what results depend on and no config holds: weights, traces, questions, code.

`rundir.open_run` records them, and refuses to go on where they have changed.
"""

import dataclasses
import dis
import functools
import hashlib
import importlib.util
import inspect
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
from fkv.models import loading
from fkv.policies.base import Policy

WHOLE = 2**28  # bytes; files up to here are read whole
_BLOCKS, _BLOCK = 16, 4096  # of each tensor of a larger file
_TOKENIZER = re.compile(
    r"(generation_|tokenizer_|)config\.json|(tokenizer|vocab|special_tokens_map|added_tokens)\.json"
    r"|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(json|jinja)"
)


def of_arrays(tree: Any) -> str:
    """Of the values of a pytree's arrays, in its order."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def of_traces(found: Traces) -> str:
    """Of the tokens and prompt lengths of traces; not of how they are padded."""
    sha = hashlib.sha256()
    for token, length, prompt in zip(found.token_nt, found.length_n, found.prompt_n, strict=True):
        sha.update(struct.pack("<qq", length, prompt))
        sha.update(np.ascontiguousarray(token[:length], "<i4"))
    return sha.hexdigest()


def of_questions(questions: Iterable[tuple]) -> list[str]:
    """One for each, of its prompt's ids and whatever else belongs to it."""
    found = []
    for prompt, *rest in questions:
        rest = [x.tolist() if isinstance(x, np.ndarray) else x for x in rest]
        text = json.dumps([np.asarray(prompt).tolist(), *rest])
        found.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    return found


def of_weights(directory: Path) -> str:
    """Of a checkpoint's `config.json` and tensors.

    Files of more than 256 MiB are read in part: their headers, and of each tensor 16 blocks of
    4 KiB, spread over it evenly; 20 MB of an 8-billion model's 16 GB.
    """
    sha = hashlib.sha256((directory / "config.json").read_bytes())
    for name in sorted(set(loading.files_of_tensors(directory)[0].values())):
        path = directory / name
        sha.update(f"{name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            if path.stat().st_size <= WHOLE:
                sha.update(hashlib.file_digest(file, "sha256").digest())
                continue
            size = file.read(8)
            header = file.read(*struct.unpack("<Q", size))
            sha.update(size + header)
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            for name in sorted(tensors):
                first, end = tensors[name]["data_offsets"]
                last = max(first, end - _BLOCK)
                for start in sorted({*np.linspace(first, last, _BLOCKS, dtype=np.int64).tolist()}):
                    file.seek(8 + len(header) + start)
                    sha.update(file.read(min(_BLOCK, end - start)))
    return sha.hexdigest()


def of_tokenizer(directory: Path) -> str:
    """Of the files that say how text becomes tokens, and which tokens end an answer."""
    sha = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file() and _TOKENIZER.fullmatch(path.name):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            sha.update(f"{path.name} {content} ".encode())
    return sha.hexdigest()


def of_settings(policy: Policy) -> str:
    """Of the name of a policy's class, and of the values of its fields."""
    return _Code(None).digest(policy)


def of_policy(policy: Policy) -> str:
    """Of a policy's settings, and of the code of its class and of what that calls.

    Code of libraries, and fkv's own outside `fkv.policies`, counts by name alone. Wherever code
    was defined, in a file or a notebook, it is what Python runs: comments don't count, nor what
    docstrings say.
    """
    ours = {cls.__module__.partition(".")[0] for cls in type(policy).__mro__}
    return _Code(ours - {"fkv", *sys.stdlib_module_names}).digest(policy)


_PLAIN = (bool, int, float, complex, str, bytes)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_OF_NO_ACCOUNT = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__",
    "__static_attributes__", "__dataclass_params__", "__dataclass_fields__", "__hash__",
    "__orig_bases__", "__parameters__", "kind",
}  # fmt: skip


class _Code:
    """Walks through an object and the code that it leads to.

    Attributes:
      ours: top-level modules that are followed wherever they are installed; None to follow none.
    """

    def __init__(self, ours: set[str] | None):
        self.ours, self._sha = ours, hashlib.sha256()
        self._seen, self._looked_up = {}, set()

    def digest(self, x: Any) -> str:
        self._walk(x)
        return self._sha.hexdigest()

    def _say(self, *words: Any) -> None:
        self._sha.update(repr(words).encode())

    def _followed(self, module: str | None) -> bool:
        if self.ours is None:
            return False
        top, file = (module or "").partition(".")[0], None
        if top in self.ours or (module or "").startswith("fkv.policies"):
            return True
        if top == "fkv" or top in sys.stdlib_module_names:
            return False
        if module in sys.modules:
            file = getattr(sys.modules[module], "__file__", None)
        return not (file or "").startswith(_LIBRARIES)

    def _walk(self, x: Any) -> None:
        if x is None or x is ... or type(x) in _PLAIN:
            self._say(type(x).__name__, x)
            return
        if type(x) in (tuple, frozenset):  # whether two equal ones are the same is Python's affair
            self._say(type(x).__name__, len(x))
            self._all(x if isinstance(x, tuple) else sorted(x, key=repr))
            return
        if id(x) in self._seen:
            self._say("again", self._seen[id(x)][0])
            return
        self._seen[id(x)] = len(self._seen), x  # held, so that no other gets its id
        if isinstance(x, np.ndarray | np.generic | jax.Array):
            x = np.asarray(x)
            self._say(str(x.dtype), x.shape, x.tobytes())
        elif isinstance(x, types.ModuleType):
            self._say("module", x.__name__)
        elif isinstance(x, types.CodeType):
            arguments = x.co_varnames[: x.co_argcount + x.co_kwonlyargcount]
            self._say(x.co_argcount, x.co_posonlyargcount, arguments, x.co_flags)
            self._say(x.co_code, x.co_names, x.co_exceptiontable)
            self._all(x.co_consts[1:] if _has_docstring(x) else x.co_consts)
        elif isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, type):
            self._class(x)
        elif hasattr(x, "__wrapped__"):  # by jax.jit or functools.cache
            self._walk(x.__wrapped__)
        elif isinstance(x, functools.partial):
            self._all((x.func, x.args, x.keywords))
        elif isinstance(x, property):
            self._all((x.fget, x.fset))
        elif isinstance(x, functools.cached_property):
            self._walk(x.func)
        elif isinstance(x, staticmethod | classmethod | types.MethodType):
            self._walk(x.__func__)
        elif isinstance(x, tuple | list | set | frozenset | Mapping):
            self._walk(type(x))
            self._say(len(x))
            if isinstance(x, Mapping):
                x = list(x.items())
            self._all(sorted(x, key=repr) if isinstance(x, set | frozenset) else x)
        else:
            self._instance(x)

    def _all(self, several: Iterable) -> None:
        for x in several:
            self._walk(x)

    def _function(self, x: types.FunctionType) -> None:
        # A decorator gives what it makes the name of what it was given, and the module.
        module = x.__globals__.get("__name__")
        self._say("function", module, x.__name__)
        if self.ours is None:
            return
        for cell in x.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # still empty
                self._say("empty")
                continue
            # Of what libraries make, such as jax.vmap, what they were given.
            if self._followed(module) or isinstance(value, (*_PLAIN, tuple, types.FunctionType)):
                self._walk(value)
        if hasattr(x, "__wrapped__"):
            self._walk(x.__wrapped__)
            if isinstance(registry := getattr(x, "registry", None), Mapping):  # singledispatch
                self._walk(registry)
        if not self._followed(module):
            return
        self._all((x.__code__, x.__defaults__, x.__kwdefaults__))
        names = sorted(_names(x.__code__))
        self._names(x.__globals__, names)
        for up, name in sorted(_imports(x.__code__)):
            module = self._imported("." * up + name, x.__globals__.get("__package__"))
            if module is not None:
                self._module(module, names)

    def _imported(self, name: str, package: str | None) -> types.ModuleType | None:
        """A module that code imports where it runs; None for those of libraries."""
        try:
            name = importlib.util.resolve_name(name, package)
            top = importlib.util.find_spec(name.partition(".")[0])
            if top is None or not self._followed(name) or (top.origin or "").startswith(_LIBRARIES):
                return None
            return importlib.import_module(name)
        except Exception:  # the policy will say so
            return None

    def _names(self, scope: Mapping[str, Any], names: list[str]) -> None:
        """What these names stand for; those of modules that are followed, likewise."""
        for name in names:
            if name not in scope or name == "_REGISTRY":  # other policies are no part of one
                continue
            self._say(name)
            self._walk(scope[name])
            if isinstance(scope[name], types.ModuleType):
                self._module(scope[name], names)

    def _module(self, module: types.ModuleType, names: list[str]) -> None:
        key = module.__name__, tuple(names)
        if key not in self._looked_up and self._followed(module.__name__):
            self._looked_up.add(key)
            self._names(vars(module), names)

    def _class(self, x: type) -> None:
        self._say("class", x.__module__, x.__qualname__)
        if not self._followed(x.__module__):
            return
        self._all(x.__bases__)
        for name, value in sorted(vars(x).items()):
            if name not in _OF_NO_ACCOUNT:
                self._say(name)
                self._walk(value)

    def _instance(self, x: Any) -> None:
        self._walk(type(x))
        for kind in _PLAIN:
            if isinstance(x, kind):
                self._say(kind.__repr__(x))
        if dataclasses.is_dataclass(x):
            self._walk({f.name: getattr(x, f.name) for f in dataclasses.fields(x)})
        elif self._followed(type(x).__module__) and hasattr(x, "__dict__"):
            self._walk(vars(x))
        elif self._followed(type(x).__module__):
            slots = [name for cls in type(x).__mro__ for name in vars(cls).get("__slots__", ())]
            self._walk({name: getattr(x, name, None) for name in slots})
        else:
            self._say(re.sub(r" at 0x[0-9a-f]+", "", repr(x)))


def _has_docstring(code: types.CodeType) -> bool:
    """Whether the first constant is what a function says of itself."""
    if sys.version_info >= (3, 13):
        return bool(code.co_flags & 0x4000000)  # inspect.CO_HAS_DOCSTRING
    # Neither the body of a class nor a lambda or a comprehension has one.
    function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
    return bool(function) and isinstance(code.co_consts[0], str)


def _names(code: types.CodeType) -> set[str]:
    """Names that code looks up, that within it included."""
    inner = [_names(x) for x in code.co_consts if isinstance(x, types.CodeType)]
    return set(code.co_names).union(*inner)


def _imports(code: types.CodeType) -> set[tuple[int, str]]:
    """What code imports where it runs, (how many packages up, name), that within it included."""
    steps, found = list(dis.get_instructions(code)), set()
    for i, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            found.add((steps[i - 2].argval, step.argval))
    return found.union(*(_imports(x) for x in code.co_consts if isinstance(x, types.CodeType)))
