"""Where keys and values of all layers lie."""

from itertools import pairwise

import pytest
import torch

from loader.arena import ALIGN_BYTES
from loader.kv_layout import KvGroup, KvLayout
from service.engine.backends import TorchAttention
from service.engine.cpu.attention import NativeAttention
from service.engine.pool import LayerShape, allocate

CPU = torch.device("cpu")
LAYOUT = KvLayout(32, (KvGroup(None, (0, 2), 5), KvGroup(9, (1,), 3)))


def layers(dtype=torch.float32, devices=(CPU,) * 3):
    return {index: LayerShape(device, dtype, 4, 2, 64, None) for index, device in enumerate(devices)}


def pool(shapes=layers(), backend=TorchAttention):  # noqa: B008
    return allocate(LAYOUT, shapes, lambda _, layer, blocks: backend.shapes(layer, blocks, 32))


@pytest.mark.parametrize("backend", [TorchAttention, NativeAttention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_has_the_blocks_of_its_group_and_one_more(backend, dtype):
    stores = pool(layers(dtype), backend)
    per_block = 2 * 32 * 2 * 64 * dtype.itemsize
    taken = {index: store.keys.nbytes + store.values.nbytes for index, store in stores.items()}
    assert taken == {0: 6 * per_block, 1: 4 * per_block, 2: 6 * per_block}
    assert [(x.group, x.window, x.block_tokens) for x in (stores[0], stores[1])] == [
        (0, None, 32),
        (1, 9, 32),
    ]


def test_keys_and_values_are_parts_of_one_buffer_and_do_not_overlap():
    stores = pool()
    tensors = [x for store in stores.values() for x in (store.keys, store.values)]
    (buffer,) = {x.untyped_storage().data_ptr() for x in tensors}
    spans = sorted((x.data_ptr() - buffer, x.nbytes) for x in tensors)
    assert all(at + size <= after for (at, size), (after, _) in pairwise(spans))
    wanted = sum(x.nbytes for x in tensors)
    assert tensors[0].untyped_storage().nbytes() <= wanted + len(tensors) * ALIGN_BYTES


def test_layers_on_two_devices_have_a_buffer_on_each():
    stores = pool(layers(devices=(CPU, torch.device("meta"), CPU)))
    assert [stores[index].keys.device.type for index in range(3)] == ["cpu", "meta", "cpu"]
    assert stores[0].keys.untyped_storage().nbytes() == 2 * 2 * stores[0].keys.nbytes


def test_the_pool_is_zeros_so_that_nothing_a_mask_hides_is_a_nan():
    assert all(x.count_nonzero() == 0 for store in pool().values() for x in (store.keys, store.values))
