"""Parts of parameters: cut over ranks and fused, split and joined, nothing is lost or moved."""

import pytest
import torch
from safetensors.torch import save_file

from rlsys.engines.megatron.hf_folder import SafetensorsReader
from rlsys.model.families.base import WeightRow

ROWS = {"q": 16, "k": 8, "v": 8}
QKV = WeightRow(
    ("linear_qkv.weight",),
    tuple(ROWS),
    tuple((rows, 3) for rows in ROWS.values()),
    tp_axis=0,
    query_groups=4,
)
GATE_UP = WeightRow(("linear_fc1.weight",), ("gate", "up"), ((8, 3), (8, 3)), tp_axis=0)
DOWN = WeightRow(("linear_fc2.weight",), ("down",), ((3, 8),), tp_axis=1)
TABLE = {
    "q, k and v": QKV,
    "qkv": QKV.in_one_tensor("qkv"),
    "gate and up": GATE_UP,
    "gate_up": GATE_UP.in_one_tensor("gate_up"),
    "down": DOWN,
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", TABLE)
def test_what_ranks_read_is_what_they_export(tmp_path, name, ranks):
    row = TABLE[name]
    tensors = {
        hf: torch.randn(shape) for hf, shape in zip(row.hf_names, row.hf_shapes, strict=True)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        shards = [
            row.fuse([reader.part(part, row.tp_axis, rank, ranks) for part in row.parts], ranks)
            for rank in range(ranks)
        ]
    assert sum(shard.numel() for shard in shards) == row.num_params
    by_rank = [row.split(shard, ranks) for shard in shards]
    whole = [torch.cat(slices, dim=row.tp_axis) for slices in zip(*by_rank, strict=True)]
    joined = row.join(whole)
    for tensor, expected in zip(joined, tensors.values(), strict=True):
        assert torch.equal(tensor, expected)
    for part, expected in zip(row.cut(joined), whole, strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize(("one", "many"), [("qkv", "q, k and v"), ("gate_up", "gate and up")])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_has_the_same_parameter_however_the_checkpoint_keeps_it(one, many, ranks):
    parts = [torch.randn(part.shape) for part in TABLE[many].parts]
    for rank in range(ranks):
        slices = [part.chunk(ranks)[rank] for part in parts]
        in_one = [part.chunk(ranks)[rank] for part in TABLE[one].cut([torch.cat(parts)])]
        expected = TABLE[many].fuse(slices, ranks)
        assert torch.equal(TABLE[one].fuse(in_one, ranks), expected)
