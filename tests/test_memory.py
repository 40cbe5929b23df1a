"""The size of a model and the memory that is free, by numbers that can be checked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline import memory
from sightline.errors import ModelError
from sightline.memory import GIB, check_fits, free_memory, model_bytes

DTYPES = st.sampled_from(["auto", "float32", "bfloat16", "float16"])
COUNTS = st.dictionaries(st.sampled_from(["F64", "F32", "BF16", "F16", "F8_E4M3", "I64", "U8"]), st.integers(0, 10**12))


@pytest.mark.parametrize(
    ("parameters", "dtype", "quantization", "size"),
    [
        ({"BF16": 10}, "auto", None, 20),
        ({"BF16": 10}, "float32", None, 40),
        ({"F32": 10}, "bfloat16", None, 20),
        ({"F64": 10}, "auto", None, 80),
        ({"F8_E4M3": 10, "I64": 1}, "float16", None, 18),
        ({"BOOL": 10}, "auto", None, 10),
        ({"BF16": 10}, "auto", "4bit", 6),
        ({"F32": 10}, "float32", "8bit", 11),
    ],
)
def test_bytes_of_weights(parameters, dtype, quantization, size):
    assert model_bytes(parameters, dtype, quantization) == pytest.approx(size)


@given(COUNTS, DTYPES)
def test_bytes_add_up_over_dtypes(parameters, dtype):
    parts = sum(model_bytes({stored: count}, dtype) for stored, count in parameters.items())
    assert model_bytes(parameters, dtype) == pytest.approx(parts)


@given(COUNTS)
def test_quantising_is_smaller(parameters):
    full = {stored: count for stored, count in parameters.items() if stored in ("F32", "BF16", "F16")}
    sizes = [model_bytes(full, "float32"), model_bytes(full, "bfloat16")]
    sizes += [model_bytes(full, "auto", quantization) for quantization in ("8bit", "4bit")]
    assert sizes == sorted(sizes, reverse=True)


def test_free_memory_of_this_machine():
    assert 2**20 < free_memory("cpu") < 2**50


def test_meminfo(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       100 kB\nMemFree:         20 kB\nMemAvailable:    64 kB\n")
    assert memory._available(str(path)) == 64 * 1024


def test_control_group(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 150\n")
    assert memory._container(str(tmp_path)) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container(str(tmp_path)) is None
    assert memory._container(str(tmp_path / "none")) is None


def test_the_tighter_bound_counts(monkeypatch):
    monkeypatch.setattr(memory, "_available", lambda: 500)
    monkeypatch.setattr(memory, "_container", lambda: 300)
    assert free_memory() == 300
    monkeypatch.setattr(memory, "_container", lambda: None)
    assert free_memory() == 500
    monkeypatch.setattr(memory, "_available", lambda: None)
    assert free_memory() is None


@pytest.mark.parametrize(
    ("dtype", "quantization", "mends"),
    [
        ("float32", None, "dtype='bfloat16', quantization='4bit', device_map='auto' or a smaller model"),
        ("bfloat16", None, "quantization='4bit', device_map='auto' or a smaller model"),
        ("auto", "4bit", "device_map='auto' or a smaller model"),
    ],
)
def test_too_large_names_both_sizes_and_the_mend(monkeypatch, dtype, quantization, mends):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * GIB)
    size = 1.1 * model_bytes({"BF16": 7 * 10**9}, dtype, quantization) / GIB
    with pytest.raises(ModelError) as caught:
        check_fits("big", {"BF16": 7 * 10**9}, dtype, quantization, "cpu")
    said = str(caught.value)
    assert f"'big' needs {size:.1f} GiB" in said
    assert "cpu has 2.0 GiB free" in said
    assert said.endswith(f"choose {mends}")


def test_what_fits_or_is_unknown_passes(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1100)
    check_fits("small", {"F32": 250}, "auto", None, "cpu")
    with pytest.raises(ModelError):
        check_fits("small", {"F32": 251}, "auto", None, "cpu")
    check_fits("small", None, "auto", None, "cpu")
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    check_fits("small", {"F32": 10**12}, "auto", None, "cpu")
