import pytest

from jaxnets.interop import measure


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the products move, `clock["flops"]` operations a second."""
    clock = {"now": 0.0, "flops": 1e11, "sizes": []}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["now"])
    return clock


def product(clock):
    def make(size):
        def run():
            clock["now"] += 2 * size**3 / clock["flops"]
            clock["sizes"].append(size)

        return run

    return make


@pytest.mark.parametrize(
    ("flops", "device", "largest"),
    [(1e11, "cpu", 2048), (1e14, "gpu", 8192), (3e8, "cpu", 512), (1e5, "cpu", 256)],
)
def test_no_product_takes_minutes(clock, flops, device, largest):
    clock["flops"] = flops
    assert measure.product_flops(product(clock), device) == pytest.approx(flops)
    assert max(clock["sizes"]) == largest
