"""The loss on 2 and 4 gloo processes against autograd of the formulas on one.

B sequences, T positions, D hidden size, V vocabulary; N packed tokens.
"""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from formulas import EVERY, batch_loss
from memory import peak_bytes
from numerics import REGIMES, regime_operands, relative_error
from ranks import PASSED, run_on_ranks, shard
from test_linear_unlearn_loss import COEFS, HEAD, OBJECTIVES, UPSTREAM, plain_loss, ragged
from test_objective_terms import batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from simnpo import SimNPO, linear_logps, linear_unlearn_loss
from simnpo.kernels.chunks import loss_memory_bytes
from simnpo.kernels.linear_logps import linear_logps_torch
from simnpo.kernels.row_pass import TORCH_BLOCK_BYTES
from simnpo.objectives import KTO, RowObjective

V_SIZES = {2: [40, 13], 4: [20, 1, 29, 3]}  # rows of the head on each rank, 53 in all
T_SIZES = {2: [4, 5], 4: [2, 1, 3, 3]}  # positions of a sequence on each rank, 9 in all
TOLERANCE = 1e-10  # float64; the promise is 1e-6


def leaves(tensors, wanted):
    return [x.detach().clone().requires_grad_(name in wanted) for name, x in zip("hwb", tensors)]


def exact_gradients(wanted, objective=OBJECTIVES[0], **head):
    """Loss and gradients of the ragged batch from all its logits, and the batch."""
    tensors, targets, retain_mask, ref_logps = ragged()
    h, w, b = leaves(tensors, wanted)
    loss = plain_loss(h, w, targets, objective, retain_mask, ref_logps, bias=b, **COEFS, **head)
    (loss * UPSTREAM).backward()
    return loss.detach(), [x.grad for x in (h, w, b)], (tensors, targets, retain_mask, ref_logps)


def assert_gradients(ours, exact, tolerance=TOLERANCE):
    for name, mine, whole in zip("hwb"[: len(exact)], ours, exact, strict=True):
        assert (mine is None) == (whole is None), name
        if mine is not None:
            assert relative_error(mine, whole) < tolerance, (name, relative_error(mine, whole))


def world_sum(tensor):
    if tensor is not None:
        dist.all_reduce(tensor)
    return tensor


def cases(**options):
    """Every objective once, and who takes a gradient and the chunks in all combinations."""
    for objective in OBJECTIVES:
        yield {"objective": objective, "wanted": "hwb", "chunk_tokens": 12}
    for wanted in ("hwb", "h", "w"):
        for chunk_tokens in (None, 1, 4):
            yield {"objective": OBJECTIVES[0], "wanted": wanted, "chunk_tokens": chunk_tokens}


# Checks, each on all ranks


def check_vocabulary_shards():
    sizes = V_SIZES[dist.get_world_size()]
    for case in cases():
        wanted, objective = case["wanted"], case["objective"]
        exact, grads, (tensors, targets, retain_mask, ref_logps) = exact_gradients(wanted, objective, **HEAD)
        h, w, b = leaves((tensors[0], shard(tensors[1], sizes), shard(tensors[2], sizes)), wanted)
        out = linear_unlearn_loss(
            h, w, targets, objective, retain_mask=retain_mask, ref_logps=ref_logps, bias=b,
            chunk_tokens=case["chunk_tokens"], vocab_group=dist.group.WORLD, **COEFS, **HEAD,
        )  # fmt: skip
        (out.loss * UPSTREAM).backward()
        assert abs(out.loss - exact) <= TOLERANCE * abs(exact), case
        own = [grads[0], *(None if g is None else shard(g, sizes) for g in grads[1:])]
        assert_gradients([x.grad for x in (h, w, b)], own)


def check_vocabulary_shards_of_token_logps():
    sizes = V_SIZES[dist.get_world_size()]
    for regime in (*REGIMES, "huge"):
        hidden, weight, targets = regime_operands("text" if regime == "huge" else regime, 23, 16, 53)
        if regime == "huge":
            # logits of thousands: what one rank adds up overflows in terms of another's largest
            hidden = hidden * 3000
        targets[5] = -100
        upstream = torch.randn(23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for wanted in ("hw", "h"):
            h, w = leaves((hidden, weight), wanted)
            logps = linear_logps_torch(h, w, targets)
            logps.backward(upstream)
            h_, w_ = leaves((hidden, shard(weight, sizes)), wanted)
            ours = linear_logps(h_, w_, targets, chunk_tokens=7, vocab_group=dist.group.WORLD)
            ours.backward(upstream)
            assert relative_error(ours, logps) < TOLERANCE, regime
            assert_gradients([h_.grad, w_.grad], [h.grad, None if w.grad is None else shard(w.grad, sizes)], 1e-9)


def check_vocabulary_shards_in_triton():
    sizes = V_SIZES[dist.get_world_size()]
    tensors, targets, retain_mask, _ = ragged()
    tensors = [x.float() for x in tensors]
    for wanted in ("hwb", "h"):
        results = []
        for impl in ("torch", "triton"):
            h, w, b = leaves((tensors[0], shard(tensors[1], sizes), shard(tensors[2], sizes)), wanted)
            out = linear_unlearn_loss(
                h, w, targets, SimNPO(), retain_mask=retain_mask, bias=b, chunk_tokens=12, impl=impl,
                vocab_group=dist.group.WORLD, **HEAD,
            )  # fmt: skip
            out.loss.backward()
            results.append([out.loss.detach(), *(x.grad for x in (h, w, b) if x.grad is not None)])
        for torch_, triton_ in zip(*results, strict=True):
            assert relative_error(triton_, torch_) < 1e-5


def check_vocabulary_shards_in_half_precision():
    """Products in bf16 over shards are as good as over the whole head."""
    sizes = V_SIZES[dist.get_world_size()]
    for regime in REGIMES:
        hidden, weight, targets = regime_operands(regime, 24, 16, 53)
        hidden, weight, targets = hidden.view(4, 6, 16), weight, targets.view(4, 6)

        def run(dtype, vocab_group=None, hidden=hidden, weight=weight, targets=targets):
            h, w = leaves((hidden.to(dtype), weight.to(dtype)), "hw")
            out = linear_unlearn_loss(h, w, targets, SimNPO(), vocab_group=vocab_group)
            out.loss.backward()
            return h.grad, w.grad

        exact = run(torch.float64)
        alone = run(torch.bfloat16)
        ours = run(torch.bfloat16, dist.group.WORLD, weight=shard(weight, sizes))
        errors = [relative_error(a, e) for a, e in zip(alone, exact)]
        assert relative_error(ours[0], exact[0]) < 2 * errors[0] + 8e-3, regime
        own = shard(exact[1], sizes)
        distance = (ours[1].double() - own).norm() / exact[1].norm()
        assert distance < 2 * errors[1] + 8e-3, regime


def check_split_sequences():
    rank, sizes = dist.get_rank(), T_SIZES[dist.get_world_size()]
    for case in cases():
        wanted, objective = case["wanted"], case["objective"]
        exact, grads, (tensors, targets, retain_mask, ref_logps) = exact_gradients(wanted, objective, **HEAD)
        whole = linear_unlearn_loss(
            tensors[0], tensors[1], targets, objective, retain_mask=retain_mask, ref_logps=ref_logps,
            bias=tensors[2], **COEFS, **HEAD,
        )  # fmt: skip
        for packed in (False, True):
            h, w, b = leaves((shard(tensors[0], sizes, 1), *tensors[1:]), wanted)
            own_targets, options = shard(targets, sizes, 1), {}
            x = h
            if packed:
                options["cu_seqlens"] = torch.arange(len(targets) + 1) * sizes[rank]
                x, own_targets = h.flatten(0, 1), own_targets.flatten()
            out = linear_unlearn_loss(
                x, w, own_targets, objective, retain_mask=retain_mask, ref_logps=ref_logps, bias=b,
                chunk_tokens=case["chunk_tokens"], sequence_group=dist.group.WORLD, **options, **COEFS, **HEAD,
            )  # fmt: skip
            (out.loss * UPSTREAM).backward()
            assert abs(out.loss - exact) <= TOLERANCE * abs(exact), case
            for name in ("forget_loss", "retain_loss", "logps", "num_tokens", "weights"):
                torch.testing.assert_close(getattr(out, name), getattr(whole, name), msg=name)
            own = [None if grads[0] is None else shard(grads[0], sizes, 1), *grads[1:]]
            assert_gradients([h.grad, world_sum(w.grad), world_sum(b.grad)], own)


def check_every_objective():
    """Its formula on all the logits, against shards of the vocabulary and slices of the sequences."""
    vocabulary, positions = V_SIZES[dist.get_world_size()], T_SIZES[dist.get_world_size()]
    for objective in EVERY:
        for wanted, chunk_tokens, weighted in (("hw", 5, False), ("hw", 40, True), ("h", 7, False)):
            tensors, targets, extras = batch(objective)
            if weighted and not isinstance(objective, KTO):
                extras["token_weights"] = torch.rand(targets.shape, dtype=torch.float64)
            h, w = leaves(tensors[:2], wanted)
            loss = batch_loss(objective, h @ w.T, targets, **extras, **COEFS)
            (loss * UPSTREAM).backward()
            exact = [h.grad, w.grad]

            if not isinstance(objective, RowObjective):
                h, w = leaves((tensors[0], shard(tensors[1], vocabulary)), wanted)
                out = linear_unlearn_loss(
                    h, w, targets, objective, chunk_tokens=chunk_tokens, vocab_group=dist.group.WORLD, **extras, **COEFS
                )  # fmt: skip
                (out.loss * UPSTREAM).backward()
                assert abs(out.loss - loss) <= TOLERANCE * abs(loss), objective
                own = [exact[0], None if exact[1] is None else shard(exact[1], vocabulary)]
                assert_gradients([h.grad, w.grad], own)

            for name in ("ref_token_logps", "token_weights"):
                if name in extras:
                    extras[name] = shard(extras[name], positions, 1)
            h, w = leaves((shard(tensors[0], positions, 1), tensors[1]), wanted)
            out = linear_unlearn_loss(
                h, w, shard(targets, positions, 1), objective, chunk_tokens=chunk_tokens,
                sequence_group=dist.group.WORLD, **extras, **COEFS,
            )  # fmt: skip
            (out.loss * UPSTREAM).backward()
            assert abs(out.loss - loss) <= TOLERANCE * abs(loss), objective
            assert_gradients([h.grad, world_sum(w.grad)], [shard(exact[0], positions, 1), exact[1]])


def check_a_rank_without_tokens():
    """All tokens on the last rank: the others take part with nothing."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for wanted in ("hw", "h"):
        exact, grads, (tensors, targets, retain_mask, _) = exact_gradients(wanted)
        have = targets if rank == world - 1 else torch.full_like(targets, -100)
        h, w = leaves(tensors[:2], wanted)
        out = linear_unlearn_loss(
            h, w, have, OBJECTIVES[0], retain_mask=retain_mask, bias=tensors[2], chunk_tokens=4,
            sequence_group=dist.group.WORLD, **COEFS,
        )  # fmt: skip
        (out.loss * UPSTREAM).backward()
        assert abs(out.loss - exact) <= TOLERANCE * abs(exact)
        assert_gradients([world_sum(h.grad), world_sum(w.grad)], grads[:2])
    nothing = torch.full_like(targets, -100)
    out = linear_unlearn_loss(*tensors[:2], nothing, OBJECTIVES[0], sequence_group=dist.group.WORLD)
    assert out.loss == 0


def check_both_at_once():
    """Two by two: the vocabulary over one mesh dimension, the sequences over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    part, columns = T_SIZES[2], V_SIZES[2]
    for wanted in ("hwb", "h"):
        for chunk_tokens in (3, 12):
            exact, grads, (tensors, targets, retain_mask, _) = exact_gradients(wanted, **HEAD)
            cp, tp = mesh.get_local_rank("cp"), mesh.get_local_rank("tp")
            own = (shard(tensors[0], part, 1, cp), *(shard(x, columns, 0, tp) for x in tensors[1:]))
            h, w, b = leaves(own, wanted)
            out = linear_unlearn_loss(
                h, w, shard(targets, part, 1, cp), OBJECTIVES[0], retain_mask=retain_mask, bias=b,
                chunk_tokens=chunk_tokens + dist.get_rank(), vocab_group=mesh.get_group("tp"),
                sequence_group=mesh.get_group("cp"), **COEFS, **HEAD,
            )  # fmt: skip
            (out.loss * UPSTREAM).backward()
            assert abs(out.loss - exact) <= TOLERANCE * abs(exact)
            for gradient in (w.grad, b.grad):
                if gradient is not None:
                    dist.all_reduce(gradient, group=mesh.get_group("cp"))
            expected = [shard(grads[0], part, 1, cp)]
            expected += [None if g is None else shard(g, columns, 0, tp) for g in grads[1:]]
            assert_gradients([x.grad for x in (h, w, b)], expected)


def check_dtensor_heads():
    """A DTensor needs no groups beside it, and its gradient is placed as it is."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    exact, grads, (tensors, targets, retain_mask, _) = exact_gradients("hwb")
    for placement in (Shard(0), Replicate()):
        w, b = (torch.nn.Parameter(distribute_tensor(x, mesh, [placement])) for x in tensors[1:])
        h = tensors[0].clone().requires_grad_()
        out = linear_unlearn_loss(h, w, targets, OBJECTIVES[0], retain_mask=retain_mask, bias=b, **COEFS)
        (out.loss * UPSTREAM).backward()
        assert abs(out.loss - exact) <= TOLERANCE * abs(exact)
        assert isinstance(w.grad, DTensor)
        assert w.grad.placements == b.grad.placements == (placement,)
        assert_gradients([h.grad, w.grad.full_tensor(), b.grad.full_tensor()], grads)
        logps = linear_logps(tensors[0], w, targets, bias=b)
        torch.testing.assert_close(logps, linear_logps_torch(tensors[0], tensors[1], targets, bias=tensors[2]))

    # whole heads and split sequences on one mesh: the parts of dW are added up on their way to the parameter
    sizes = T_SIZES[world]
    w = torch.nn.Parameter(distribute_tensor(tensors[1], mesh, [Replicate()]))
    b = torch.nn.Parameter(distribute_tensor(tensors[2], mesh, [Replicate()]))
    out = linear_unlearn_loss(
        shard(tensors[0], sizes, 1), w, shard(targets, sizes, 1), OBJECTIVES[0], retain_mask=retain_mask, bias=b,
        sequence_group=mesh.get_group(), **COEFS,
    )  # fmt: skip
    (out.loss * UPSTREAM).backward()
    assert w.grad.placements == (Replicate(),)
    assert_gradients([None, w.grad.to_local(), b.grad.to_local()], [None, *grads[1:]])


@contextmanager
def counted_collectives():
    """How often each collective is called inside."""
    names, calls = ("all_gather", "all_reduce"), Counter()
    originals = {name: getattr(dist, name) for name in names}
    for name, original in originals.items():

        def counting(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        setattr(dist, name, counting)
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def check_products_and_collectives():
    """2G with a frozen head and 3G with a trained one on every rank, of its share; and no collective too many."""
    world, (B, T, D) = dist.get_world_size(), (8, 8, 16)
    V = 16 * world
    h, w, targets = torch.randn(B, T, D), torch.randn(V, D), torch.randint(0, V, (B, T))
    for tensor in (h, w, targets):
        dist.broadcast(tensor, 0)
    rank, chunks = dist.get_rank(), 4
    for wanted, products in (("h", 2), ("hw", 3), ("", 1)):
        for kind in ("vocab_group", "sequence_group"):
            if kind == "vocab_group":
                x, weight, y, shape = h, shard(w, [V // world] * world), targets, (B * T, V // world)
                chunk_tokens = B * T // chunks
                # one meeting and one exchange a chunk; dH once a chunk
                expected = {"all_gather": 1 + chunks, "all_reduce": chunks if "h" in wanted else 0}
            else:
                part = slice(rank * T // world, (rank + 1) * T // world)
                x, weight, y, shape = h[:, part], w, targets[:, part], (B * T // world, V)
                chunk_tokens = B * T // world // chunks
                # two to meet; the sums of a trained head's chunk, or of all sequences at once
                expected = {"all_gather": 2, "all_reduce": chunks if "w" in wanted else 1}
            x, weight = leaves((x, weight), wanted)
            with counted_collectives() as calls, FlopCounterMode(display=False) as counter:
                out = linear_unlearn_loss(
                    x, weight, y, SimNPO(), chunk_tokens=chunk_tokens, **{kind: dist.group.WORLD}
                )  # fmt: skip
                if wanted:
                    out.loss.backward()
            assert counter.get_total_flops() == products * 2 * shape[0] * shape[1] * D, (kind, wanted)
            assert +calls == +Counter(expected), (kind, wanted)


def check_memory():
    """Every rank holds what the formula says of its own share, and nothing of the others'."""
    world, (B, T, D, V) = dist.get_world_size(), (16, 64, 64, 32768)
    h, w, targets = torch.randn(B, T, D), torch.randn(V, D), torch.randint(0, V, (B, T))
    for tensor in (h, w, targets):
        dist.broadcast(tensor, 0)
    chunk_tokens = B * T // 4
    own, part = shard(w, [V // world] * world), slice(dist.get_rank() * T // world, (dist.get_rank() + 1) * T // world)
    for wanted in ("hw", "h"):
        for kind, operands, y, rows in (
            ("vocab_group", (h, own), targets, B * T),
            ("sequence_group", (h[:, part], w), targets[:, part], B * T // world),
        ):
            x, weight = leaves(operands, wanted)

            def step(x=x, weight=weight, y=y, kind=kind):
                out = linear_unlearn_loss(x, weight, y, SimNPO(), chunk_tokens=chunk_tokens, **{kind: dist.group.WORLD})
                out.loss.backward()
                return x.grad, weight.grad

            formula = loss_memory_bytes(rows, D, len(weight), chunk_tokens, 4, head_is_trained="w" in wanted)
            assert peak_bytes(step) <= formula * 1.02 + 3 * TORCH_BLOCK_BYTES["cpu"], (wanted, kind)


def check_refusals():
    rank = dist.get_rank()
    (h, w, _), targets, retain_mask, _ = ragged()
    sizes = V_SIZES[dist.get_world_size()]
    group, own = dist.group.WORLD, shard(w, sizes)

    def loss(h=h, w=w, targets=targets, **options):
        return linear_unlearn_loss(h, w, targets, SimNPO(), **options)

    with pytest.raises(ValueError, match=r"gradient_error must be 0 with a vocab_group, got 0\.01"):
        loss(w=own, vocab_group=group, gradient_error=0.01)
    with pytest.raises(ValueError, match=r"gradient_error must be 0 with a sequence_group, got 0\.01"):
        loss(sequence_group=group, gradient_error=0.01)
    different = targets.clone()
    different[4, 4] = (targets[4, 4] + rank) % 53
    with pytest.raises(ValueError, match=r"must be the same on all ranks of vocab_group.*their targets differ"):
        loss(w=own, targets=different, vocab_group=group)
    with pytest.raises(ValueError, match=r"must be the same on all ranks of vocab_group.*their targets differ"):
        linear_logps(h[: 3 + rank], own, targets[: 3 + rank], vocab_group=group)
    with pytest.raises(ValueError, match=r"must take a gradient on all ranks of vocab_group or on none.*\[False, True"):
        loss(w=own.clone().requires_grad_(rank == 1), vocab_group=group)
    with pytest.raises(ValueError, match="must take a gradient on all ranks of sequence_group or on none"):
        loss(w=w.clone().requires_grad_(rank == 1), sequence_group=group)
    with pytest.raises(ValueError, match=r"all ranks of sequence_group must have the same sequences, got \[3, 4"):
        loss(h=h[: min(3 + rank, 4)], targets=targets[: min(3 + rank, 4)], sequence_group=group)
    with pytest.raises(ValueError, match="retain_mask must be the same on all ranks of sequence_group"):
        loss(retain_mask=retain_mask if rank else ~retain_mask, sequence_group=group)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 53\) or -100, got 53"):
        loss(w=own, targets=targets.where(targets != targets[4, 4], 53), vocab_group=group)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ValueError, match=r"must be replicated or have its vocabulary sharded over one mesh dimension"):
        loss(w=distribute_tensor(w, mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="bias must be a DTensor placed like lm_head_weight"):
        loss(w=distribute_tensor(w, mesh, [Shard(0)]), bias=torch.zeros(53, dtype=w.dtype))
    other = dist.new_group([0, 1])
    with pytest.raises(ValueError, match="vocab_group must be the ranks of lm_head_weight's mesh dimension 0"):
        loss(w=distribute_tensor(w, mesh, [Shard(0)]), vocab_group=other)


CHECKS = [
    check_vocabulary_shards,
    check_vocabulary_shards_of_token_logps,
    check_vocabulary_shards_in_triton,
    check_vocabulary_shards_in_half_precision,
    check_split_sequences,
    check_every_objective,
    check_a_rank_without_tokens,
    check_dtensor_heads,
    check_products_and_collectives,
    check_memory,
    check_refusals,
]
ON_FOUR = [check_both_at_once]


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request, tmp_path_factory):
    world = request.param
    checks = CHECKS + (ON_FOUR if world == 4 else [])
    return run_on_ranks(world, checks, tmp_path_factory.mktemp(f"world{world}"))


@pytest.mark.slow
@pytest.mark.parametrize("check", [*CHECKS, *ON_FOUR], ids=lambda check: check.__name__)
def test_on_several_processes(outcomes, check):
    if check.__name__ not in outcomes:
        pytest.skip("needs 2 x 2 processes")
    assert outcomes[check.__name__] == PASSED, outcomes[check.__name__]


@pytest.mark.parametrize("shape", [(0,), (0, 16)])
def test_a_weight_that_is_not_gathered_is_refused(shape):
    """What DeepSpeed ZeRO-3 leaves of a weight outside its module's forward."""
    hidden, targets = torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.int64)
    for call in (
        lambda w: linear_logps(hidden, w, targets),
        lambda w: linear_unlearn_loss(hidden, w, targets, SimNPO()),
    ):
        with pytest.raises(ValueError, match=r"lm_head_weight is empty, .*ZeRO-3.*simnpo\.attach\(model\)"):
            call(torch.empty(shape))
