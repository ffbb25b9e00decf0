"""loader/shards.py: what safetensors' own reader gives, in memory that was there before."""

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from loader import probe
from loader.errors import TruncatedShard
from loader.files import read_header
from loader.shards import STAGING_BYTES, ShardReader, torch_dtype

FILE = "model.safetensors"
NAMES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")
CASTS = [
    ("F32", torch.bfloat16), ("F32", torch.float16), ("BF16", torch.float32), ("F16", torch.float32),
    ("F64", torch.float32), ("F8_E4M3", torch.bfloat16), ("F8_E5M2", torch.float32),
    ("BF16", torch.float16),
]  # fmt: skip


@pytest.fixture
def reader(tmp_path):
    opened = ShardReader(tmp_path)
    yield opened
    opened.close()


def saved(folder, tensors, file=FILE):
    """name -> TensorInfo of a new shard."""
    save_file(tensors, folder / file)
    return {info.name: info for info in read_header(folder / file)}


def random_bits(dtype, *shape):
    """Every value there is, NaN and infinities with them."""
    generator = torch.Generator().manual_seed(5)
    if dtype is torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def values(dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(dtype)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def open_files(folder):
    return sorted(file.path for file in psutil.Process().open_files() if file.path.startswith(str(folder)))


# Values


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_is_read_bit_by_bit_as_safetensors_reads_it(tmp_path, reader, name):
    dtype = torch_dtype(name)
    infos = saved(tmp_path, {"a": random_bits(dtype, 5, 7), "b": random_bits(dtype, 3), "c": values(dtype)})
    expected = load_file(tmp_path / FILE)
    for key, info in infos.items():
        out = torch.empty(info.shape, dtype=dtype)
        reader.read_into(out, info)
        assert info.dtype == name
        assert expected[key].dtype == dtype
        assert torch.equal(bits(out), bits(expected[key])), key


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "F8_E8M0", "C64", "no dtype"])
def test_a_dtype_that_no_model_is_loaded_in_is_a_key_error(name):
    with pytest.raises(KeyError):
        torch_dtype(name)


@pytest.mark.parametrize(("name", "wanted"), CASTS)
def test_a_cast_is_torchs_own_whatever_the_pieces(tmp_path, reader, monkeypatch, name, wanted):
    monkeypatch.setattr("loader.shards.STAGING_BYTES", 100)
    infos = saved(tmp_path, {"before": values(torch.float32, 9), "w": values(torch_dtype(name), 77, 13)})
    out = torch.empty(77, 13, dtype=wanted)
    reader.read_into(out, infos["w"])
    assert torch.equal(out, load_file(tmp_path / FILE)["w"].to(wanted))


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "place",
    [
        lambda whole: whole[1],
        lambda whole: whole[1, 2:6],
        lambda whole: whole[:, :, 3],
        lambda whole: whole[0, :, 2:5],
        lambda whole: whole[2].t(),
        lambda whole: whole[0, ::2, ::3],
    ],
    ids=["a row", "rows", "a column of each", "columns", "transposed", "steps"],
)
def test_a_slice_is_filled_and_nothing_around_it(tmp_path, reader, place, wanted):
    expected = torch.full((3, 8, 10), 7.0, dtype=wanted)
    out = expected.clone()
    tensor = values(torch.float32, *place(out).shape)
    reader.read_into(place(out), saved(tmp_path, {"w": tensor})["w"])
    place(expected).copy_(tensor)
    assert torch.equal(out, expected)


def test_tensors_are_read_in_any_order_and_as_often_as_wanted(tmp_path, reader):
    tensors = {f"t{i}": values(torch.bfloat16, 3, i + 1) for i in range(4)}
    infos = saved(tmp_path, tensors)
    for name in ("t2", "t0", "t3", "t2", "t1"):
        out = torch.empty_like(tensors[name])
        reader.read_into(out, infos[name])
        assert torch.equal(out, tensors[name]), name


def test_tensors_without_elements_are_read_from_nowhere(tmp_path, reader):
    infos = saved(
        tmp_path, {"none": torch.empty(0, 4), "some": values(torch.float32, 2), "row": torch.empty(0)}
    )
    (tmp_path / FILE).unlink()
    for name in ("none", "row"):
        reader.read_into(torch.empty(infos[name].shape), infos[name])
        reader.read_into(torch.empty(infos[name].shape, dtype=torch.bfloat16), infos[name])
    with pytest.raises(FileNotFoundError):
        reader.read_into(torch.empty(2), infos["some"])


def test_a_cast_takes_no_memory_but_its_destination_and_the_staging(tmp_path, reader):
    infos = saved(tmp_path, {"w": torch.ones(6 * STAGING_BYTES // 4)})
    out = torch.zeros(6 * STAGING_BYTES // 4, dtype=torch.bfloat16)
    probe.reset_peak()
    before = probe.resident_bytes()
    reader.read_into(out, infos["w"])
    assert probe.peak_resident_bytes() - before < 2 * STAGING_BYTES
    assert bool((out == 1).all())


# Files


@pytest.mark.parametrize("missing", [1, 40, 41, 200])
@pytest.mark.parametrize(
    "out",
    [torch.empty(8, 5), torch.empty(8, 5, dtype=torch.float16), torch.empty(5, 8).t()],
    ids=["straight", "cast", "strided"],
)
def test_a_file_that_was_cut_since_it_was_planned_is_told_with_both_sizes(tmp_path, reader, out, missing):
    info = saved(tmp_path, {"a": values(torch.float32, 10), "b": values(torch.float32, 8, 5)})["b"]
    size = info.end - missing
    with (tmp_path / FILE).open("r+b") as file:
        file.truncate(size)
    with pytest.raises(TruncatedShard) as caught:
        reader.read_into(out, info)
    assert (caught.value.expected_bytes, caught.value.actual_bytes) == (info.end, size)
    assert str(tmp_path / FILE) in str(caught.value)
    assert f"{-missing:+,}" in str(caught.value)


def test_each_shard_is_opened_once_and_closed_at_the_end(tmp_path, reader):
    first = saved(tmp_path, {"a": values(torch.float32, 3), "b": values(torch.float32, 3)}, "one.safetensors")
    second = saved(tmp_path, {"c": values(torch.float32, 3)}, "two.safetensors")
    assert open_files(tmp_path) == []
    for info in (*first.values(), *second.values(), *first.values()):
        reader.read_into(torch.empty(3), info)
    assert open_files(tmp_path) == [str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")]
    reader.close()
    reader.close()
    assert open_files(tmp_path) == []


def test_a_file_is_not_mapped_into_memory(tmp_path, reader):
    info = saved(tmp_path, {"a": values(torch.float32, 300)})["a"]
    reader.read_into(torch.empty(300), info)
    assert not [m.path for m in psutil.Process().memory_maps() if m.path.startswith(str(tmp_path))]
