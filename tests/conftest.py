"""Strict numerics for every test, and the fixtures that several share."""

import gc
import os
import signal
from pathlib import Path

import jax
import pytest

# Compiling is what takes the time, so LLVM need not try hard; commands that tests start inherit it.
# XLA reads it when JAX first looks for devices, later than this.
# Both cores have tests to run, so code that is cut into pieces for other threads only takes longer.
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    # The same fusions by a way that takes half the time, which later versions have no more.
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK]).strip()

# An accidental [n] + [b, n] is a bug, and full precision makes tolerances mean the same anywhere.
# Commands inherit this, too, and so find their programs compiled already.
for name, value in (("numpy_rank_promotion", "raise"), ("default_matmul_precision", "highest")):
    jax.config.update(f"jax_{name}", value)
    os.environ[f"JAX_{name.upper()}"] = value


# Few tests, but long ones: left to the end, they would keep one core waiting for the other.
FIRST = (
    "test_variants.py", "test_kill.py", "test_several.py", "test_parallel.py", "test_colab.py",
    "test_real_models.py", "test_targets.py", "test_context.py",
)  # fmt: skip


def pytest_configure(config):
    # pytest-xdist would start with the files that have the most tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish():
    # What all these modules are made of stays, and tracing makes much that soon goes by itself.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """The folder of vectors made by the released PyTorch code."""
    path = Path(__file__).parents[2] / "shared" / "reference"
    if not path.is_dir():
        pytest.skip(f"no reference vectors at {path}")
    return path


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs compiled once a session: workers, and the commands that tests start, share some.

    Several sessions share those in `$JAX_COMPILATION_CACHE_DIR`.
    """
    base = tmp_path_factory.getbasetemp()
    path = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "jax")
    path = os.environ.get("JAX_COMPILATION_CACHE_DIR") or path
    settings = {"compilation_cache_dir": path, "persistent_cache_min_compile_time_secs": 0.0}
    for name, value in settings.items():
        jax.config.update(f"jax_{name}", value)
        os.environ[f"JAX_{name.upper()}"] = str(value)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees what a module compiled: a process may not map more than 65,530 pieces of memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def heeded_signals():
    """What starts the tests in the background may ignore Ctrl-C, and nohup SIGHUP."""
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL),
    ):  # fmt: skip
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def sigterm_in(monkeypatch):
    """A function that has SIGTERM come in a certain call of a function; undo it by `undo()`."""

    def unnoticed(*_):
        raise AssertionError("SIGTERM came, and nobody was listening")

    before = signal.signal(signal.SIGTERM, unnoticed)

    def install(module, name: str, call: int) -> None:
        real, calls = getattr(module, name), []

        def called(*args, **kwargs):
            calls.append(name)
            if len(calls) == call:
                signal.raise_signal(signal.SIGTERM)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, called)

    install.undo = monkeypatch.undo
    yield install
    signal.signal(signal.SIGTERM, before)
