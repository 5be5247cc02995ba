import pytest

from jaxnets.interop import measure


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the products move: by a call's own time, and its operations."""
    clock = {"now": 0.0, "sizes": []}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["now"])
    return clock


def product(clock, flops, of_call=0.0):
    def make(size):
        def run():
            clock["now"] += of_call + 2 * size**3 / flops
            clock["sizes"].append(size)

        return run

    return make


@pytest.mark.parametrize(
    ("flops", "device", "largest"),
    [(1e11, "cpu", 2048), (1e14, "gpu", 8192), (1.2e9, "cpu", 1024), (1e5, "cpu", 512)],
)
def test_no_product_takes_minutes(clock, flops, device, largest):
    assert measure.product_flops(product(clock, flops), device) == pytest.approx(flops)
    assert max(clock["sizes"]) == largest


def test_what_a_call_takes_by_itself_makes_no_product_smaller(clock):
    found = measure.product_flops(product(clock, 1e14, of_call=2e-4), "gpu")
    assert found == pytest.approx(1e14, rel=0.02)
    assert max(clock["sizes"]) == 8192
