"""Eight virtual CPU devices, strict JAX settings and reproducible property tests for the whole suite."""

import gc
import importlib
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax
import pytest
from absl import flags
from hypothesis import HealthCheck, settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A loaded machine must not turn into a failure; the same examples every time make one reproducible.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")

# Every compiled program takes some mappings of memory; Linux allows a process 65,530, and the compiler crashes beyond.
MAPPINGS = 16_000

# Few tests, of minutes: they go first, so that no worker is left alone with one of them at the end.
LONG = (
    "notebook_test",
    "resume_test",
    "faults_test",
    "train_processes_test",
    "archive_resume_test",
    "rl_processes_test",
    "elastic_test",
    "rl_run_test",
    "lora_run_test",
    "hf_run_test",
    "rl_explore_test",
)


def mappings():
    """Returns how many mappings of memory this process has; 0 where that is not told."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that are marked slow: `make test-all`")


def pytest_configure(config):
    """Keeps compiled programs on disk, for this process alone: tests build the same runs again and again."""
    config.addinivalue_line("markers", "slow: takes long, and a quicker test has most of what it shows")
    place = tempfile.TemporaryDirectory(prefix="jaxcl-compiled-")
    config.add_cleanup(place.cleanup)
    jax.config.update("jax_compilation_cache_dir", place.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    config.option.loadscopereorder = False  # of pytest-xdist: it would begin with the files of most tests


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leaves slow tests out unless they are asked for; orders the files: the long ones, then those of most tests."""
    if not config.getoption("--slow"):
        left_out = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONG, -count[item.path], str(item.path)))


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled(request):
    """Compiles with little optimisation, which saves most of the time, unless a module says QUICK = False."""
    quick = getattr(request.module, "QUICK", True)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    if mappings() > MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def recipe(monkeypatch):
    """Returns a module of a folder of experiments/, as its launcher sees it; forgets it and its flags afterwards."""
    root = Path(__file__).parent.parent
    known = set(sys.modules)

    def load(folder, name):
        monkeypatch.syspath_prepend(str(root))
        monkeypatch.syspath_prepend(str(root / "experiments" / folder))
        return importlib.import_module(name)

    yield load
    made = [sys.modules[name] for name in set(sys.modules) - known]
    made = [one for one in made if (root / "experiments") in Path(getattr(one, "__file__", None) or root).parents]
    for one in made:
        del sys.modules[one.__name__]
        for flag in flags.FLAGS.get_flags_for_module(one):
            delattr(flags.FLAGS, flag.name)
