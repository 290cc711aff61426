"""What a training step costs by calculation: FLOPs, bytes, messages and the bounds they set, from config and data sheets.

Everything is a count, or a bound that follows from one; nothing is measured, and no GPU is needed. Times are those of a device
that computes at its peak, or moves memory at its bandwidth, in each part of the step.
"""

from typing import NamedTuple

from fastdit import muon
from fastdit.config import Config
from fastdit.embeddings import num_frequencies, out_channels
from fastdit.planning.flops import macs_per_image
from fastdit.planning.gpus import GPU
from fastdit.planning.memory import narrow_gradients, one_pass, sizes
from fastdit.posthoc import EVERY
from fastdit.runtime.hardware import compute_dtype, precision
from fastdit.tokendrop import ends


class Cluster(NamedTuple):
    """Where the run would be. `network` is GB/s between nodes, each direction, for each GPU."""

    gpu: GPU
    gpus: int  # in all
    nodes: int
    network: float

    @property
    def local(self) -> int:
        return self.gpus // self.nodes


# --- one step: arithmetic and bytes, part by part ---


class Part(NamedTuple):
    """One part of a rank's step: FLOPs, bytes through device memory, and the least time either takes, in seconds."""

    name: str
    flops: float
    bytes: float
    compute_s: float
    memory_s: float

    @property
    def bound_s(self) -> float:
        return max(self.compute_s, self.memory_s)


def parts(config: Config, cluster: Cluster, dropped: bool = False) -> list[Part]:
    """A rank's optimizer step: what it computes, and what it moves with every tensor read once and written once.

    FLOPs are those of matrix products, attention and convolution, forward and backward. Fused ops move what KERNELS.md calls
    their floor: 4 and 6 bytes per bf16 element for a norm or an activation, 8 and 12 for a gated residual with its norm.
    dropped: of a step of token drop, whose middle blocks see one token in four.
    """
    m, p = config.model, config.parallel
    D, L, F, item = m.width, m.depth, m.mlp_ratio * m.width, compute_dtype(p.precision).itemsize
    micro, B, T = config.train.grad_accum, config.train.batch, m.num_tokens
    macs = {name: 2.0 * B * micro * count for name, count in macs_per_image(m, dropped).items()}  # FLOPs of one forward
    again = 1 if p.checkpoint_activations else 0  # forwards of the blocks in the backward

    block = B * T * (1 - 3 / 4 * (L - 2 * ends(L)) / L) if dropped else B * T  # tokens that a block sees, on average
    fused = B * T + (B * T / 4 if dropped else B * T)

    def product(rows: float, inputs: int, outputs: int) -> float:  # bytes of one matrix product
        return item * (rows * inputs + inputs * outputs + rows * outputs)

    patch, out, S = m.channels * m.patch_size, m.patch_size * out_channels(m), item // 2
    forward = {  # bytes of one forward; norms' and activations' backward is half as much again, the others' twice as much
        "embed": product(B * T, patch, D)
        + product(B, num_frequencies(m), D)
        + product(B, D, D)
        + product(B, m.condition, D) * (m.condition > 0),
        "modulation": product(B, D, (6 * L + 2) * D),
        "qkv and proj": L * (product(block, D, 3 * D) + product(block, D, D)),
        "attention": L * 4 * block * D * item,
        "mlp": L * (product(block, D, F) + product(block, F, D)),
        "GELU and convolution": L * 4 * S * block * F,
        "norms and residuals": (4 * B * T + 2 * L * 8 * block) * S * D,
        **({"fusion": product(fused, D, D)} if m.token_drop else {}),
        "final": product(B * T, D, out),
    }
    # PyTorch's attention makes three gradients, of q, k and v, and one copy makes them one; flash-attn writes them as one.
    stacked = 0.0 if config.attention == "flash" else 6 / 4
    backward = {"GELU and convolution": 1.5, "norms and residuals": 1.5, "attention": 2.0 + stacked}
    flops = {"GELU and convolution": macs.pop("convolution"), **macs}
    outside = ("embed", "modulation", "fusion", "final")
    cost = {
        name: (
            flops.get(name, 0.0) * (3 + again * (name not in outside)),
            micro * moved * (1 + backward.get(name, 2.0) + again * (name not in outside)),
        )
        for name, moved in forward.items()
    }
    # The sums that are the biases' gradients, of qkv and of a plain MLP's fc1. The others come out of fused ops.
    cost["bias gradients"] = (0.0, micro * L * (3 * D + (0 if m.conv_kernel else F)) * block * item)
    cost["casts and copies"] = (0.0, copied(config, cluster))
    cost["optimizer and EMA"] = (0.0, optimizer_bytes(config, cluster))
    if config.train.optimizer == "muon":
        cost["Newton–Schulz"] = newton_schulz(config, cluster)
    gpu = cluster.gpu
    rate = gpu.flops if precision(p.precision) == "bf16" else gpu.flops / 2  # TF32 runs at half the rate of bf16
    return [Part(name, f, b, f / rate, b / (gpu.memory_gb_per_s * 1e9)) for name, (f, b) in cost.items()]


def newton_schulz(config: Config, cluster: Cluster) -> tuple[float, float]:
    """FLOPs and bytes of a step on the rank that makes the most matrices orthogonal, each rank of one copy some of them.

    A step of the iteration reads and writes the matrix three times and its square of rows five times, in 16 bits.
    """
    m, ranks = config.model, config.parallel.shard or cluster.local
    D, F, L = m.width, m.mlp_ratio * m.width, m.depth
    shapes = dict(zip(muon.MATRICES, [(3 * D, D), (D, D), (F, D), (D, F)], strict=True))
    made = muon.spread([(f"blocks.{n}.{name}", *shape) for n in range(L) for name, shape in shapes.items()], ranks)
    flops, moved = [0.0] * ranks, [0.0] * ranks
    for part in made:
        short = min(part.rows, part.columns)
        flops[part.owner] += muon.flops(part.rows, part.columns)
        moved[part.owner] += muon.STEPS * 2 * (3 * part.rows * part.columns + 5 * short * short)
    return max(flops), max(moved)


def copied(config: Config, cluster: Cluster) -> float:
    """Bytes of a step's casts of weights and gradients between fp32 and what the network computes in.

    Several ranks: shards cast into the send buffer and out of the receive buffer, once or twice; gradients cast to fp32 for the
    reduction. One rank: gradients cast and added to fp32 sums, and new weights cast, unless the optimizer's kernel does that.
    """
    p, item = config.parallel, compute_dtype(config.parallel.precision).itemsize
    s = sizes(config.model, p.shard or cluster.local)
    if cluster.gpus > 1:
        gathers = 2 if p.reshard_after_forward else 1
        return gathers * ((4 + item) * s.shard + 2 * item * s.whole) + (item + 4) * s.whole
    if item == 4 or narrow_gradients(config, cluster.gpus):
        return 0.0
    summed = item + 4 + (config.train.grad_accum - 1) * (item + 8)
    return (summed + (4 + item) * (not one_pass(config))) * s.trained


def optimizer_bytes(config: Config, cluster: Cluster) -> float:
    """Bytes of a step's norm, AdamW and average.

    The norm reads gradients. Our kernel reads parameter, gradient, moments and average and writes all but the gradient, and on
    one rank the copies that the network computes with; PyTorch's AdamW reads four and writes four, the scaled gradient too, and
    its average reads two and writes one.
    """
    item = compute_dtype(config.parallel.precision).itemsize
    grad = item if narrow_gradients(config, cluster.gpus) else 4
    ours = 32 + grad + (item if item < 4 and cluster.gpus == 1 else 0)
    trained = sizes(config.model, config.parallel.shard or cluster.local).trained
    average = 24 / EVERY if config.train.ema == "posthoc" else 12
    return (grad + (ours if one_pass(config) else 32 + average)) * trained


# --- messages ---


class Message(NamedTuple):
    """A collective of one step: the bytes a rank sends, and the least time that takes."""

    name: str
    bytes: float
    seconds: float


def messages(config: Config, cluster: Cluster) -> list[Message]:
    """What the ranks send each other in one optimizer step (ZeRO, arXiv 1910.02054; HSDP where the shards are replicated).

    Rings: a rank sends (n - 1)/n of the whole. A link inside the node and, where a collective spans nodes, all of a node's
    network links together both have to carry their share; the slower counts.
    """
    p, local, nodes = config.parallel, cluster.local, cluster.nodes
    shard = p.shard or local
    item, s = compute_dtype(p.precision).itemsize, sizes(config.model, 1)
    link, network = cluster.gpu.link_gb_per_s * 1e9, cluster.network * 1e9

    def seconds(sent: float, total: float, ranks: int) -> float:
        spanned = -(-ranks // local) if ranks > local else 1
        across = total * (spanned - 1) / spanned / (local * network)
        return max(sent / link if local > 1 else 0.0, across)

    found = []
    if shard > 1:
        share = (shard - 1) / shard
        gathers = 2 if p.reshard_after_forward else 1
        sent = share * gathers * item * s.whole
        found.append(Message("all-gather of weights", sent, seconds(sent, gathers * item * s.whole, shard)))
        sent = share * 4 * s.whole
        found.append(Message("reduce-scatter of gradients", sent, seconds(sent, 4 * s.whole, shard)))
        if config.train.optimizer == "muon":  # its matrices' momentum to their owners and their updates back, in 16 bits
            sent = share * 2 * 2 * s.matrices / shard
            found.append(Message("all-to-all of Muon's updates, both ways", sent, seconds(sent, sent * shard, shard)))
    copies = cluster.gpus // shard
    if copies > 1:
        sent = 2 * (copies - 1) / copies * 4 * s.whole / shard
        inside = sent / link if shard < local else 0.0
        across = 2 * (nodes - 1) / nodes * 4 * s.whole / (local * network) if shard <= local else sent / network
        found.append(Message("all-reduce of shards' gradients", sent, max(inside, across)))
    return found


# --- the bound ---


class Bound(NamedTuple):
    """The least time a step can take, in seconds, and what sets it. Each of the three is a bound on its own."""

    compute_s: float  # every FLOP at the peak
    memory_s: float  # every byte at the memory's bandwidth
    network_s: float  # every message at the links' bandwidth, all behind computation
    device_s: float  # part after part, each at whichever of the two binds it
    images: int  # of the step, over all ranks

    @property
    def step_s(self) -> float:
        return max(self.device_s, self.network_s)

    @property
    def binds(self) -> str:
        if self.network_s > self.device_s:
            return "network"
        return "compute" if self.compute_s >= self.device_s / 2 else "memory"


def bound(config: Config, cluster: Cluster) -> Bound:
    """The step's bounds. Messages can overlap fully with computation; the parts of one device's step cannot overlap.

    With token drop, those of a step on average over the run.
    """
    whole = config.train.whole_share if config.model.token_drop else 1.0
    steps = [(whole, parts(config, cluster)), (1 - whole, parts(config, cluster, dropped=True))]
    return Bound(
        sum(share * part.compute_s for share, step in steps for part in step),
        sum(share * part.memory_s for share, step in steps for part in step),
        sum(message.seconds for message in messages(config, cluster)),
        sum(share * part.bound_s for share, step in steps for part in step),
        config.train.batch * config.train.grad_accum * cluster.gpus,
    )
