import importlib.util
import itertools
import types

import fsspec.config
import pytest

from jaxnets.remote import as_path
from tests.remote.object_store import Store, serving

if importlib.util.find_spec("gcsfs") is None:  # not imported here: it reads the environment set below
    collect_ignore_glob = ["test_*.py"]

_number = itertools.count()


@pytest.fixture(scope="session")
def server():
    """One store for all, since clients remember where it is."""
    store = Store()
    with serving(store) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        # What gcsfs asks a service beside the store, with credentials that nobody has here.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        # Or both clients look for credentials, in vain and again and again.
        patch.setenv("FSSPEC_GCS_TOKEN", "anon")
        patch.setitem(fsspec.config.conf.setdefault("gcs", {}), "token", "anon")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        yield store


@pytest.fixture
def store(server, monkeypatch):
    """The store, with nothing to go wrong yet, and hardly a wait before another try."""
    import gcsfs.retry

    monkeypatch.setattr(gcsfs.retry, "random", types.SimpleNamespace(random=lambda: -1.0))
    server.fault, server.page, server.clock = lambda method, name: None, 1000, 0.0
    server.requests.clear()
    yield server
    server.fault = lambda method, name: None


@pytest.fixture
def bucket(store):
    """The name of an empty bucket."""
    name = f"bucket-{next(_number)}"
    store.objects[name] = {}
    return name


@pytest.fixture
def folder(bucket):
    return as_path(f"gs://{bucket}/a/run")
