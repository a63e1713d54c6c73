"""Compares designs of a weight sync on CPU, from TP 2 to TP 2. Prints JSON.

    python benchmarks/weight_sync_designs.py                    # SmolLM2-135M's shape, bfloat16
    python benchmarks/weight_sync_designs.py --shape tiny --repeats 3

Four processes, two that have the halves of a random model and two that want them, move the same
bytes over gloo on this machine by each design in turn. No code of other projects runs here: these
are their designs, written down as plainly as they can be.

    rlsys      WeightSender and WeightReceiver: each policy rank sends its half to the worker of the
               same number, packed in buckets, with checksums
    unchecked  the same without checksums
    broadcast  rank 0 gathers every tensor and broadcasts it, packed; workers keep their half
               (vLLM's nccl)
    m2n        each tensor by itself, from the rank that has a half to the worker that wants it;
               nothing is gathered (vLLM's nccl_m2n where it finds the parameter)
    sparse P%  rank 0 broadcasts for each tensor which of its numbers changed, and their values
               (vLLM's sparse_nccl). Each rank first compares its half with a copy of what it
               sent before, and rank 0 gathers what they found.

`bfloat16_changed` is the share of bfloat16 weights that a step of AdamW changes: float32 weights of
a normal distribution, std 0.02, moved by the learning rate each, either way, and rounded.
Ratios above 1 say that rlsys is faster.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe_machine
from random_model import SHAPES, hf_config
from transformers import AutoModelForCausalLM

from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import TensorMeta, TensorSlice
from rlsys.weight_sync.receiver import WeightReceiver
from rlsys.weight_sync.sender import WeightSender
from rlsys.weight_sync.transport import LOOPBACK, serve_store

POLICY, WORKERS = (0, 1), (2, 3)
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")
CPU = torch.device("cpu")
TIMEOUT_S = 120.0
LEARNING_RATES = (1e-6, 1e-5, 1e-4)


def main():
    arguments = parse_arguments()
    machine = describe_machine()
    stores = [serve_store(LOOPBACK, TIMEOUT_S) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        ports = [store.port for store in stores]
        mp.spawn(run_rank, args=(folder, ports, arguments), nprocs=4)
        result = json.loads((Path(folder) / "result.json").read_text())
    print(json.dumps({"machine": machine, **result, "bfloat16_changed": changed()}, indent=2))


def changed():
    """Learning rate -> share of bfloat16 weights that a step changes."""
    weights = torch.randn(10**6, generator=torch.Generator().manual_seed(0)) * 0.02
    signs = torch.where(torch.arange(10**6) % 2 == 0, 1.0, -1.0)
    return {
        f"{lr:g}": ((weights + lr * signs).bfloat16() != weights.bfloat16()).float().mean().item()
        for lr in LEARNING_RATES
    }


class Half:
    """The part of each tensor that a rank of either side has: cut as megatron-core and vLLM do."""

    def __init__(self, shape, index):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config(SHAPES[shape]))
        self.index = index
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        self.drawn = dict(self.draw())
        """What a sender has, and a worker should get."""
        self.tensors = {name: tensor.clone() for name, tensor in self.drawn.items()}

    def meta(self, name):
        return TensorMeta(name, "bfloat16", self.shapes[name])

    def slice(self, name):
        shape = self.shapes[name]
        if len(shape) == 1:  # norms are whole on every rank
            return TensorSlice.whole(self.meta(name))
        axis = int(name.endswith(ROW_PARALLEL))
        part = tuple(n // 2 if i == axis else n for i, n in enumerate(shape))
        starts = tuple(self.index * n if i == axis else 0 for i, n in enumerate(part))
        return TensorSlice(self.meta(name), starts, part)

    def own_part(self, name, whole):
        return self.slice(name).within(whole, TensorSlice.whole(self.meta(name)))

    def draw(self):
        """The parts of tensors that are the same on all ranks."""
        for number, (name, shape) in enumerate(self.shapes.items()):
            generator = torch.Generator().manual_seed(number)
            whole = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            yield name, self.own_part(name, whole).clone()

    def restore(self):
        for name, tensor in self.tensors.items():
            tensor.copy_(self.drawn[name])

    def clear(self):
        for tensor in self.tensors.values():
            tensor.zero_()


def run_rank(rank, folder, ports, arguments):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    half = Half(arguments.shape, rank % 2)
    designs = {
        "rlsys": Rlsys(half, rank, ports[:2], arguments, verify=True),
        "unchecked": Rlsys(half, rank, ports[2:], arguments, verify=False),
        "broadcast": Broadcast(half, rank, arguments),
        "m2n": M2n(half, rank),
    }
    shares = {f"sparse {share:g}%": share / 100 for share in arguments.shares}
    sparse = Sparse(half, rank)
    seconds = {name: [] for name in [*designs, *shares]}
    for repeat in range(arguments.repeats + 1):
        for name in designs:
            half.restore() if rank in POLICY else half.clear()
            seconds[name].append(timed(lambda name=name, repeat=repeat: designs[name].sync(repeat)))
            if repeat == 0:
                check(half, name)
        for name, share in shares.items():
            sparse.change(share)
            seconds[name].append(timed(sparse.sync))
            if repeat == 0:
                sparse.check(name)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(summary(half, seconds, arguments)))
    dist.barrier()


def summary(half, seconds, arguments):
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    nbytes = sum(half.meta(name).nbytes for name in half.shapes)
    return {
        "shape": arguments.shape,
        "megabytes": nbytes / 1e6,
        "bucket_mb": arguments.bucket_mb,
        "repeats": arguments.repeats,
        "median_s": medians,
        "over_rlsys": {name: value / medians["rlsys"] for name, value in medians.items()},
        "all_s": {name: values[1:] for name, values in seconds.items()},
    }


def timed(sync):
    dist.barrier()
    start = time.perf_counter()
    sync()
    dist.barrier()
    return time.perf_counter() - start


def check(half, name):
    """Every worker has the bits that it should have."""
    wrong = [key for key, tensor in half.tensors.items() if not tensor.equal(half.drawn[key])]
    if wrong:
        sys.exit(f"{name}: a rank has other weights: {wrong[:3]}")


class Rlsys:
    def __init__(self, half, rank, ports, arguments, *, verify):
        slices = tuple(half.slice(name) for name in half.shapes)
        number = rank % 2
        connection = Connection(
            slices=slices,
            sender=number,
            transport="gloo",
            address=LOOPBACK,
            port=ports[number],
            world_size=2,
            bucket_bytes=arguments.bucket_mb * 2**20,
            verify=verify,
            in_place=True,
            timeout_s=TIMEOUT_S,
        )
        self.tensors = {half.slice(name).meta.name: half.tensors[name] for name in half.shapes}
        self.sends = rank in POLICY
        self.end = (
            WeightSender(connection, CPU) if self.sends else WeightReceiver(connection, CPU, rank=1)
        )

    def sync(self, version):
        if self.sends:
            self.end.send(self.fill, version)
            return
        for bucket, buffer in self.end.receive(version, keep=False):
            for name, view in bucket.views(buffer):
                self.tensors[name].copy_(view)
        self.end.check()

    def fill(self, bucket, buffer):
        for name, view in bucket.views(buffer):
            view.copy_(self.tensors[name])


class Broadcast:
    def __init__(self, half, rank, arguments):
        self.half, self.rank = half, rank
        self.policy, self.receivers = dist.new_group(POLICY), dist.new_group([0, *WORKERS])
        connection = [TensorSlice.whole(half.meta(name)) for name in half.shapes]
        plan = Connection(
            tuple(connection), 0, "gloo", "", 0, 3, arguments.bucket_mb * 2**20, False, True, 1.0
        )
        self.buckets = plan.buckets()
        self.memory = torch.zeros(max(b.nbytes for b in self.buckets), dtype=torch.uint8)

    def sync(self, version):
        for bucket in self.buckets:
            buffer = self.memory[: bucket.nbytes]
            if self.rank in POLICY:
                for name, whole in bucket.views(buffer):
                    self.gather(name, whole)
            if self.rank != 1:
                dist.broadcast(buffer, 0, group=self.receivers)
            if self.rank in WORKERS:
                for name, whole in bucket.views(buffer):
                    self.half.tensors[name].copy_(self.half.own_part(name, whole))

    def gather(self, name, whole):
        own = self.half.tensors[name]
        if own.dim() == 1:
            whole.copy_(own)
            return
        parts = [torch.empty_like(own) for _ in POLICY] if self.rank == 0 else None
        dist.gather(own, parts, group=self.policy)
        if parts is not None:
            torch.cat(parts, dim=int(name.endswith(ROW_PARALLEL)), out=whole)


class M2n:
    def __init__(self, half, rank):
        self.half, self.rank = half, rank

    def sync(self, version):
        peer = self.rank ^ 2
        move = dist.send if self.rank in POLICY else dist.recv
        for tensor in self.half.tensors.values():
            move(tensor, peer)


class Sparse:
    """Rank 0 and 1 keep a copy of what they sent; `half` of a worker starts equal to it."""

    def __init__(self, half, rank):
        self.half, self.rank = half, rank
        self.policy, self.receivers = dist.new_group(POLICY), dist.new_group([0, *WORKERS])
        self.seed = 0

    def change(self, share):
        """Give a share of the numbers of a policy rank other values; workers have the old ones."""
        self.half.restore()
        self.sent = {name: tensor.clone() for name, tensor in self.half.drawn.items()}
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        if self.rank in POLICY:
            for tensor in self.half.tensors.values():
                count = round(share * tensor.numel())
                chosen = torch.randperm(tensor.numel(), generator=generator)[:count]
                tensor.view(-1)[chosen] += 1.0

    def sync(self):
        for name in self.half.shapes:
            counts, patch = [0, 0], None
            if self.rank in POLICY:
                patch, counts = self.gather(*self.find(name))
            if self.rank != 1:
                self.send(name, patch, counts)

    def find(self, name):
        """Places of a rank's changes in the whole tensor, and the new values."""
        new, old = self.half.tensors[name], self.sent[name]
        places = (new != old).view(-1).nonzero().view(-1)
        if self.rank == 1 and self.half.slice(name).is_whole:  # rank 0 has them, too
            places = places[:0]
        values = new.view(-1)[places]
        old.copy_(new)
        return self.whole_places(name, places).int(), values

    def whole_places(self, name, places):
        piece = self.half.slice(name)
        if piece.is_whole:
            return places
        columns = piece.shape[1]
        rows, column = places // columns + piece.starts[0], places % columns + piece.starts[1]
        return rows * self.half.shapes[name][1] + column

    def gather(self, places, values):
        """On rank 0: what both ranks found."""
        own = torch.tensor([len(places)])
        counts = [torch.zeros(1, dtype=torch.int64) for _ in POLICY]
        dist.all_gather(counts, own, group=self.policy)
        if self.rank == 1:
            dist.send(places, 0)
            dist.send(values, 0)
            return None, counts
        others = int(counts[1])
        other_places = torch.empty(others, dtype=torch.int32)
        other_values = torch.empty(others, dtype=torch.bfloat16)
        dist.recv(other_places, 1)
        dist.recv(other_values, 1)
        return (torch.cat([places, other_places]), torch.cat([values, other_values])), counts

    def send(self, name, patch, counts):
        count = torch.tensor([sum(map(int, counts))])
        dist.broadcast(count, 0, group=self.receivers)
        if patch is None:
            number = int(count)
            patch = torch.empty(number, dtype=torch.int32), torch.empty(number).bfloat16()
        for tensor in patch:
            dist.broadcast(tensor, 0, group=self.receivers)
        if self.rank in WORKERS:
            self.apply(name, *patch)

    def apply(self, name, places, values):
        """Keep what is in this worker's half."""
        piece, target = self.half.slice(name), self.half.tensors[name]
        places = places.long()
        if not piece.is_whole:
            columns = self.half.shapes[name][1]
            row, column = places // columns - piece.starts[0], places % columns - piece.starts[1]
            inside = (row >= 0) & (row < piece.shape[0]) & (column >= 0) & (column < piece.shape[1])
            places, values = (row * piece.shape[1] + column)[inside], values[inside]
        target.view(-1)[places] = values

    def check(self, name):
        sums = torch.stack([t.double().sum() for t in self.half.tensors.values()])
        if self.rank in POLICY:
            dist.send(sums, self.rank + 2)
        else:
            expected = torch.empty_like(sums)
            dist.recv(expected, self.rank - 2)
            if not torch.equal(sums, expected):
                sys.exit(f"{name}: rank {self.rank} has other weights")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shares", type=float, nargs="+", default=[2, 10, 50], help="percent")
    return parser.parse_args()


if __name__ == "__main__":
    main()
