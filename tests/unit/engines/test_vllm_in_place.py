"""The plan of copies into an engine's parameters: what it maps, and what it refuses."""

import pytest
import torch
from torch import nn

from rlsys.engines.vllm.in_place import CannotMap, InPlacePlan, PlanProof, missing_parameters
from rlsys.engines.vllm.latent import derive_again, loaded_parameters, unreachable_copy
from rlsys.engines.vllm.sleeping import KeptMemory
from rlsys.engines.vllm.weight_backend import (
    BucketWeightTransferEngine,
    WeightSyncWorkerExtension,
)
from rlsys.weight_sync.plan import TensorMeta, TensorSlice, plan_buckets

HIDDEN, ROWS, VOCAB, PADDED = 8, 4, 10, 12


class Loader(nn.Module):
    """Loads as a rank of a tensor-parallel engine does: fused rows, slices, a padded vocabulary."""

    def __init__(self, rank=0):
        super().__init__()
        self.rank = rank
        self.embed = nn.Parameter(torch.zeros(PADDED // 2, HIDDEN))
        self.qkv = nn.Parameter(torch.zeros(2 * ROWS // 2, HIDDEN))
        self.out = nn.Parameter(torch.zeros(HIDDEN, ROWS // 2))
        self.norm = nn.Parameter(torch.ones(HIDDEN))
        self.head = self.embed  # tied

    def load_weights(self, tensors):
        half = ROWS // 2
        for name, tensor in tensors:
            if name == "embed":
                part = tensor[self.rank * PADDED // 2 : (self.rank + 1) * PADDED // 2]
                self.embed[: len(part)].data.copy_(part)
                self.embed[len(part) :].data.fill_(0)
            elif name in ("q", "k"):
                start = 0 if name == "q" else half
                shard = tensor.narrow(0, self.rank * half, half)
                self.qkv.data.narrow(0, start, half).copy_(shard)
            elif name == "out":
                self.out.data.copy_(tensor.narrow(1, self.rank * half, half))
            else:
                self.norm.data.copy_(tensor)
        return {name for name, _ in self.named_parameters()}


def weights():
    return {
        "embed": torch.randn(VOCAB, HIDDEN),
        "q": torch.randn(ROWS, HIDDEN),
        "k": torch.randn(ROWS, HIDDEN),
        "out": torch.randn(HIDDEN, ROWS),
        "norm": torch.randn(HIDDEN),
    }


def metadata(tensors):
    return [
        TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def filled(bucket, tensors):
    """A buffer as it arrives."""
    buffer = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    for name, view in bucket.views(buffer):
        view.copy_(tensors[name])
    return buffer


def test_padding_that_a_sleeping_engine_lost_is_filled_again():
    tensors = weights()
    model, expected = Loader(1), Loader(1)
    plan = InPlacePlan(model, metadata(tensors))
    expected.load_weights(tensors.items())
    worker = WeightSyncWorkerExtension()
    worker.weight_transfer_engine = object.__new__(BucketWeightTransferEngine)
    worker.weight_transfer_engine._plan = plan
    worker.kept_memory = KeptMemory(None)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    worker.restore_memory("kv_cache")
    assert all(parameter.isnan().all() for parameter in model.parameters())
    worker.restore_memory("weights")
    for bucket in plan_buckets(metadata(tensors), 64):
        plan.load(bucket, filled(bucket, tensors))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


@pytest.mark.parametrize("rank", [0, 1])
def test_the_plan_puts_tensors_where_the_loader_puts_them(rank):
    tensors = weights()
    model, expected = Loader(rank), Loader(rank)
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan = InPlacePlan(model, metadata(tensors))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), "making a plan changes nothing"
    with torch.no_grad():
        for bucket in plan_buckets(metadata(tensors), 400):
            plan.load(bucket, filled(bucket, tensors))
        expected.load_weights(tensors.items())
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_needs_its_shard_and_nothing_else(rank):
    model, expected = Loader(rank), Loader(rank)
    plan = InPlacePlan(model, metadata(weights()))
    needed = plan.needed()
    half, start = ROWS // 2, rank * ROWS // 2
    vocab = ["embed[0:6, 0:8]", "embed[6:10, 0:8]"][rank]  # padded to 12
    rows = f"{start}:{start + half}, 0:{HIDDEN}"
    columns = f"0:{HIDDEN}, {start}:{start + half}"
    names = [piece.meta.name for piece in needed]
    assert names == [vocab, f"q[{rows}]", f"k[{rows}]", f"out[{columns}]", "norm"]
    plan.expect(needed)
    for _ in range(2):
        tensors = weights()
        parts = {
            piece.meta.name: piece.within(
                tensors[piece.tensor.name], TensorSlice.whole(piece.tensor)
            )
            for piece in needed
        }
        with torch.no_grad():
            for bucket in plan_buckets([piece.meta for piece in needed], 200):
                plan.load(bucket, filled(bucket, parts))
            expected.load_weights(tensors.items())
        for name, parameter in expected.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name


class Flattening(Loader):
    """Copies consecutive elements that are not a box of the tensor."""

    def load_weights(self, tensors):
        tensors = dict(tensors)
        super().load_weights((n, t) for n, t in tensors.items() if n != "out")
        self.out.data.view(-1).copy_(tensors["out"].view(-1)[: HIDDEN * ROWS // 2])


class Wrapping(Flattening):
    """Copies rows with the strides of the tensor that begin in the middle of one of its rows."""

    def load_weights(self, tensors):
        tensors = dict(tensors)
        Loader.load_weights(self, [(n, t) for n, t in tensors.items() if n != "out"])
        rows = tensors["out"].as_strided((HIDDEN // 2, ROWS), (ROWS, 1), ROWS // 2)
        self.out.data.view(HIDDEN // 2, ROWS).copy_(rows)


@pytest.mark.parametrize("kind", [Flattening, Wrapping])
def test_a_slice_that_is_not_a_box_needs_the_whole_tensor(kind):
    model, expected = kind(), kind()
    plan = InPlacePlan(model, metadata(weights()))
    needed = plan.needed()
    assert TensorSlice.whole(metadata(weights())[3]) in needed
    plan.expect(needed)
    tensors = weights()
    parts = {
        piece.meta.name: piece.within(tensors[piece.tensor.name], TensorSlice.whole(piece.tensor))
        for piece in needed
    }
    with torch.no_grad():
        for bucket in plan_buckets([piece.meta for piece in needed], 400):
            plan.load(bucket, filled(bucket, parts))
        expected.load_weights(tensors.items())
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_plan_is_used_again_with_other_weights_and_other_memory():
    model, expected = Loader(1), Loader(1)
    buckets = plan_buckets(metadata(weights()), 400)
    plan = InPlacePlan(model, metadata(weights()))
    memory = torch.zeros(2, max(bucket.nbytes for bucket in buckets), dtype=torch.uint8)
    for update in range(4):
        tensors = weights()
        if update == 2:
            memory = torch.zeros_like(memory)
        for bucket in buckets:
            buffer = memory[bucket.index % 2, : bucket.nbytes]
            plan.load(bucket, buffer.copy_(filled(bucket, tensors)))
        with torch.no_grad():
            expected.load_weights(tensors.items())
        for name, parameter in expected.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name


def test_a_plan_whose_parameters_have_moved_is_stale():
    model = Loader()
    plan = InPlacePlan(model, metadata(weights()))
    model.out.data.add_(1)
    assert not plan.is_stale
    model.out.data = model.out.data.clone()
    assert plan.is_stale


def proof_of(model, tensors):
    proof = PlanProof(InPlacePlan(model, metadata(tensors)))
    proof.note(tensors.items())
    with torch.no_grad():
        model.load_weights(tensors.items())
    return proof


def test_the_proof_holds_where_the_loader_only_copies():
    assert proof_of(Loader(), weights()).first_difference() is None


def test_the_proof_names_a_tensor_that_changes_after_loading():
    model = Loader()
    proof = proof_of(model, weights())
    model.out.data.mul_(2)  # as a conversion for the kernels would
    assert proof.first_difference() == "out"


class Transposing(Loader):
    def load_weights(self, tensors):
        self.out.data.copy_(dict(tensors)["out"].t().contiguous().t()[:, : ROWS // 2])


class Scaling(Loader):
    def load_weights(self, tensors):
        self.norm.data.copy_(dict(tensors)["norm"] + 1)


class Forgetful(Loader):
    def load_weights(self, tensors):
        return super().load_weights([(n, t) for n, t in tensors if n != "k"])


class Partial(Loader):
    def load_weights(self, tensors):
        super().load_weights((n, t) for n, t in tensors if n != "q")
        self.qkv.data[:1].copy_(dict(tensors)["q"][:1])


class Broadcasting(Loader):
    def load_weights(self, tensors):
        self.out.data.copy_(dict(tensors)["norm"][:, None])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Transposing, "out is filled with transformed weights"),
        (Scaling, "norm is filled with transformed weights"),
        (Forgetful, "k goes nowhere"),
        (Partial, "elements of qkv are filled"),
        (Broadcasting, "norm is spread over out"),
    ],
)
def test_a_load_that_is_not_a_copy_is_refused_by_name(kind, words):
    with pytest.raises(CannotMap, match=words):
        InPlacePlan(kind(), metadata(weights()))


def test_a_conversion_that_rounds_is_refused():
    model = Loader()
    model.norm.data = model.norm.data.bfloat16()
    with pytest.raises(CannotMap, match=r"norm is torch\.float32, norm is torch\.bfloat16"):
        InPlacePlan(model, metadata(weights()))


def test_a_conversion_that_keeps_every_number_is_a_copy():
    """vLLM has some routers of experts in fp32, whatever the model's type."""
    tensors = weights()
    tensors["norm"] = tensors["norm"].bfloat16()
    model = Loader()
    assert proof_of(model, tensors).first_difference() is None
    plan = InPlacePlan(model, metadata(tensors))
    tensors["norm"] = torch.randn(HIDDEN).bfloat16()
    for bucket in plan_buckets(metadata(tensors), 400):
        plan.load(bucket, filled(bucket, tensors))
    assert torch.equal(model.norm, tensors["norm"].float())


class Latent(nn.Module):
    """Latent attention as vLLM has it: decoding reads W_UK_T and W_UV, made from kv_b_proj."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.kv_b_proj = kind, nn.Linear(4, 6, bias=False)
        self.process_weights_after_loading(torch.float32)

    @torch.no_grad()
    def process_weights_after_loading(self, dtype):
        parts = {"W_UK_T": self.kv_b_proj.weight[:2], "W_UV": self.kv_b_proj.weight[2:].t()}
        for name, part in parts.items():
            if self.kind == "parameters" and name in self._parameters:
                getattr(self, name).copy_(part)
            elif self.kind == "parameters":
                setattr(self, name, nn.Parameter(part.clone(), requires_grad=False))
            else:
                setattr(self, name, part if self.kind == "views" else part.clone())

    def load_weights(self, tensors):
        self.kv_b_proj.weight.data.copy_(dict(tensors)["kv_b"])


@pytest.mark.parametrize("kind", ["parameters", "views"])
def test_what_latent_attention_makes_of_its_weights_follows_them(kind):
    model, tensors = Latent(kind), {"kv_b": torch.randn(6, 4)}
    assert unreachable_copy(model) is None
    assert [name for name, _ in loaded_parameters(model)] == ["kv_b_proj.weight"]
    places = model.W_UK_T.data_ptr(), model.W_UV.data_ptr()
    plan = InPlacePlan(model, metadata(tensors))
    (bucket,) = plan_buckets(metadata(tensors), 400)
    plan.load(bucket, filled(bucket, tensors))
    derive_again(model, torch.float32)
    assert torch.equal(model.W_UK_T, tensors["kv_b"][:2])
    assert torch.equal(model.W_UV, tensors["kv_b"][2:].t())
    assert places == (model.W_UK_T.data_ptr(), model.W_UV.data_ptr()), "CUDA graphs read there"


def test_latent_attention_that_reads_copies_is_not_changed_in_place():
    assert unreachable_copy(Latent("copies")) == "W_UK_T"


@pytest.mark.parametrize(
    "elsewhere",
    [torch.empty(0), torch.empty(HIDDEN, ROWS // 2, device="meta")],
    ids=["packed", "waiting for an update"],
)
def test_weights_kept_elsewhere_are_refused(elsewhere):
    model = Loader()
    model.out = nn.Parameter(elsewhere)
    with pytest.raises(CannotMap, match="out has no memory"):
        InPlacePlan(model, metadata(weights()))


EXPERTS = {f"layers.{n}.experts.routed_experts.w{k}_weight" for n in range(2) for k in (13, 2)}
DENSE = {"norm.weight", "layers.0.qkv_proj.weight"}


def test_parameters_that_were_not_loaded_are_named_in_order():
    assert missing_parameters(DENSE | EXPERTS, set()) == sorted(DENSE | EXPERTS)
    assert missing_parameters(DENSE | EXPERTS, DENSE | EXPERTS) == []
    assert missing_parameters(DENSE, {"norm.weight"}) == ["layers.0.qkv_proj.weight"]


def test_experts_count_under_the_names_that_vllm_0_26_gives_them():
    without_prefix = {name.replace("routed_experts.", "") for name in EXPERTS}
    assert missing_parameters(DENSE | EXPERTS, DENSE | without_prefix) == []
    (missing,) = without_prefix - set(sorted(without_prefix)[1:])
    expected = missing.replace("experts.", "experts.routed_experts.")
    assert missing_parameters(DENSE | EXPERTS, DENSE | without_prefix - {missing}) == [expected]
