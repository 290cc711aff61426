"""The machine of ptx.py itself: every check catches an error planted for it, and instructions compute what the PTX ISA says."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdit_kernels import partials
from fastdit_kernels.adamw_ema import adamw_ema
from fastdit_kernels.triton_ops import TRITON

with pytest.MonkeyPatch.context() as patch:  # files beside this one, which are no package
    patch.syspath_prepend(Path(__file__).parent)
    execute = importlib.import_module("ptx").execute
    Fault = importlib.import_module("ptx_memory").Fault
    ptx_ops = importlib.import_module("ptx_ops")
    adamw, rows, grids = (importlib.import_module(f"test_{op}") for op in ("adamw_ema", "ln_modulate", "gelu_dwconv"))
    gated = importlib.import_module("test_gate_residual_ln_modulate")

BF16 = torch.bfloat16
CPU = torch.device("cpu")


# Errors planted in our own kernels


def ln_modulate(results, shape):
    return results(TRITON.ln_modulate, rows.inputs(shape, BF16, BF16, CPU))


def gelu_dwconv(results, shape):
    return results(TRITON.gelu_dwconv, grids.inputs(shape, BF16, BF16, CPU))


def replaced(kernel, pattern, by):
    """An edit of one kernel's PTX, which must find something to change."""

    def edit(text):
        if f".entry {kernel}" not in text:
            return text
        changed, count = re.subn(pattern, by, text, flags=re.MULTILINE)
        assert count
        return changed

    return edit


def test_a_mask_one_too_wide(results, compiled):
    compiled(80, edit=replaced("ln_modulate_backward_kernel", r"(setp\.lt\.u32 .*), 97;", r"\1, 98;"))
    with pytest.raises(Fault, match=r"ln_modulate_backward_kernel line \d+, .*ld\.global.*thread \d+.*out of bounds: beside"):
        ln_modulate(results, (2, 5, 97))


def test_a_block_of_channels_one_too_wide(results, compiled):
    compiled(90, edit=replaced("gelu_dwconv_forward_kernel", r"(setp\.lt\.s32 .*), 33;", r"\1, 34;"))
    with pytest.raises(Fault, match="out of bounds: outside"):
        gelu_dwconv(results, (1, 2, 3, 33, 3))


def without_barrier(number, kernel):
    def edit(text):
        if f".entry {kernel}" not in text:
            return text
        barriers = list(re.finditer(r"^\s*bar\.(warp\.)?sync.*$", text, re.MULTILINE))
        return text[: barriers[number].start()] + text[barriers[number].end() :]

    return edit


@pytest.mark.parametrize(
    ("shape", "kernel", "number"),
    [((2, 5, 768), "ln_modulate_forward_kernel", n) for n in range(4)]
    + [((1, 2, 768), "ln_modulate_backward_kernel", n) for n in range(8)],
)
def test_a_missing_barrier(results, compiled, shape, kernel, number):
    """Each one of two kernels, left out in turn."""
    compiled(80, edit=without_barrier(number, kernel))
    with pytest.raises(Fault, match=f"{kernel} line .*race: "):
        ln_modulate(results, shape)


def test_a_missing_barrier_of_one_warp(results, compiled):
    compiled(80, edit=without_barrier(1, "gelu_dwconv_forward_kernel"))  # bar.warp.sync: it has one warp
    with pytest.raises(Fault, match=r"gelu_dwconv_forward_kernel line .*race: reads what another thread wrote"):
        gelu_dwconv(results, (1, 4, 6, 33, 3))


def test_a_promise_of_alignment_not_kept(compiled):
    given = adamw.tensors(CPU, offset=1)
    launched = compiled(80)
    launched.reachable = {f"{name}[{i}]": t for name in adamw.LISTS for i, t in enumerate(given[name])}
    launched.changes = {"ALIGNED": True}
    with pytest.raises(Fault, match=r"adamw_ema_kernel .*ld\.global\.v4.*misaligned: 16 bytes at once"):
        adamw_ema(**given, **adamw.SETTINGS)


def test_a_read_of_what_nothing_wrote(results, compiled, monkeypatch):
    monkeypatch.setattr(partials, "MOST", 0)
    compiled(80, skip=("ln_modulate_backward_kernel",))
    with pytest.raises(Fault, match=r"sum_partials_kernel .*reads global memory that nothing wrote"):
        ln_modulate(results, (2, 5, 97))


ATOMIC = r"atom\.global\.gpu\.acq_rel\.add\.u32"


@pytest.mark.parametrize("by", ["atom.global.gpu.relaxed.add.u32", "atom.global.cta.acq_rel.add.u32"])
def test_a_count_that_orders_nothing(results, compiled, by):
    """Not at all, or only among the threads of one program: the last one may see partials that are not there yet."""
    compiled(80, edit=replaced("ln_modulate_backward_kernel", ATOMIC, by))
    with pytest.raises(Fault, match=r"ln_modulate_backward_kernel .*race: "):
        ln_modulate(results, (2, 33, 97))


@pytest.mark.parametrize("half", ["acquire", "release"])
def test_a_count_that_orders_half(results, compiled, half):
    compiled(80, edit=replaced("ln_modulate_backward_kernel", ATOMIC, f"atom.global.gpu.{half}.add.u32"))
    with pytest.raises(Fault, match=r"ln_modulate_backward_kernel .*race: "):
        ln_modulate(results, (2, 33, 97))


@pytest.mark.parametrize(("before", "kernel"), [(True, "ln_modulate"), (False, "ln_modulate"), (True, "gelu_dwconv")])
def test_no_barrier_about_the_count(results, compiled, monkeypatch, before, kernel):
    """One thread counts for all: the others' stores must come before, and their loads after."""

    def edit(text):
        if f".entry {kernel}_backward_kernel" not in text:
            return text
        start, count, end = re.split(rf"^(.*{ATOMIC}.*)$", text, flags=re.MULTILINE)
        barriers = re.compile(r"^\s*bar\.sync.*$", re.MULTILINE)
        if before:
            last = list(barriers.finditer(start))[-1]
            start = start[: last.start()] + start[last.end() :]
        else:  # Triton's own, by which all have the number, and the one written behind it
            end = barriers.sub("", end, count=2)
        return start + count + end

    monkeypatch.setattr(grids.module, "BACKWARD_TOKENS", 1)
    compiled(80, edit=edit)
    with pytest.raises(Fault, match=f"{kernel}_backward_kernel .*race: "):
        ln_modulate(results, (2, 33, 97)) if kernel == "ln_modulate" else gelu_dwconv(results, (2, 2, 16, 33, 3))


@pytest.mark.parametrize("number", [0, 1])
def test_a_counter_that_is_not_put_back(compiled, number):
    """The sums of a second backward are then left unwritten: of samples by the first counter, of the bias by the second."""

    def edit(text):
        if ".entry gate_residual_ln_modulate_backward_kernel" not in text:
            return text
        counters = re.findall(ATOMIC + r" %r\d+, \[ (%rd\d+)", text)
        assert len(counters) == 2
        [reset] = re.finditer(rf"^\s*@%p\d+ st\.global\.b32 \[ {counters[number]} .*$", text, re.MULTILINE)
        return text[: reset.start()] + text[reset.end() :]

    given = gated.inputs((2, 33, 97), BF16, BF16, CPU, bias=True)
    leaves = [t.detach().requires_grad_() for t in given.values()]
    for planted in (False, True):
        compiled(80, edit=edit if planted else None)
        r, m = TRITON.gate_residual_ln_modulate(*leaves)
        loss = (r + m).float().sum()
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) != planted
        assert any(t.isnan().any() for t in second) == planted


def test_two_programs_write_one_address(results, compiled):
    compiled(80, edit=replaced("ln_modulate_forward_kernel", r"mov\.u32\s+(%r\d+), %ctaid\.y;", r"mov.u32 \1, 0;"))
    with pytest.raises(Fault, match=r"ln_modulate_forward_kernel .*st\.global.*race: two programs write one address at once"):
        ln_modulate(results, (2, 33, 97))


def test_an_unknown_mnemonic(results, compiled):
    compiled(80, edit=replaced("ln_modulate_forward_kernel", r"rsqrt\.approx", "rsqrt.guess"))
    with pytest.raises(Fault, match=r"ln_modulate_forward_kernel line \d+: unknown mnemonic rsqrt\.guess\.ftz\.f32"):
        ln_modulate(results, (2, 5, 97))


# The machine alone, on programs written here


def run(body, tensors=(), threads=32, grid=(1,), shared_bytes=0, sign=1):
    """Run lines of PTX. %rd0, %rd1 … hold the tensors' addresses, %r0 the thread."""
    parameters = ",\n".join(f".param .u64 p{i}" for i in range(len(tensors)))
    addresses = "\n".join(f"ld.param.b64 %rd{i}, [p{i}];" for i in range(len(tensors)))
    registers = ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<99>;\n.reg .b64 %rd<99>;"
    head = f".visible .entry planted(\n{parameters}\n)\n.reqntid {threads}\n{{\n{registers}\n{addresses}\nmov.u32 %r0, %tid.x;"
    body = "\n".join(line.strip() for line in body.strip().splitlines())
    execute(f"{head}\n{body}\nret;\n}}\n", shared_bytes, grid, {f"p{i}": t for i, t in enumerate(tensors)}, {}, sign)


def computed(body, threads=32, **options):
    """What %r9 holds at the end, in each thread, as unsigned numbers."""
    out = torch.zeros(threads, dtype=torch.int32)
    run(f"{body}\nmad.wide.u32 %rd9, %r0, 4, %rd0;\nst.global.b32 [%rd9], {{%r9}};", [out], threads, **options)
    return out.numpy().view(np.uint32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shl.b32 %r9, 3, 31;", 0x80000000),
        ("shl.b32 %r9, 3, 32;", 0),
        ("shr.s32 %r9, -8, 1;", 0xFFFFFFFC),
        ("shr.s32 %r9, -8, 40;", 0xFFFFFFFF),
        ("shr.u32 %r9, -8, 40;", 0),
        ("bfe.u32 %r9, 0xABCD, 4, 8;", 0xBC),
        ("bfe.s32 %r9, 0xABCD, 4, 8;", 0xFFFFFFBC),
        ("mul.wide.s32 %rd8, -2, 3;\nbfe.u64 %rd8, %rd8, 1, 31;\ncvt.u32.u64 %r9, %rd8;", 0x7FFFFFFD),
        ("mul.wide.s32 %rd8, -2, 3;\nbfe.u64 %rd8, %rd8, 40, 64;\ncvt.u32.u64 %r9, %rd8;", 0x00FFFFFF),
        ("prmt.b32 %r9, 0x33221100, 0x77665544, 0x7610;", 0x77661100),
        ("prmt.b32 %r9, 0x33F21170, 0x77665544, 0xA8A8;", 0xFF00FF00),
        ("mul.hi.u32 %r9, -1, -1;", 0xFFFFFFFE),
        ("mul.lo.s32 %r9, 65537, 65537;", 0x00020001),
        ("mad.lo.s32 %r9, -3, 5, 7;", 0xFFFFFFF8),
        ("mul.wide.s32 %rd8, -2, 3;\nshr.u64 %rd8, %rd8, 32;\ncvt.u32.u64 %r9, %rd8;", 0xFFFFFFFF),
        ("mul.wide.u32 %rd8, -2, 3;\nshr.u64 %rd8, %rd8, 32;\ncvt.u32.u64 %r9, %rd8;", 2),
        ("min.s32 %r9, -1, 1;", 0xFFFFFFFF),
        ("min.u32 %r9, -1, 1;", 1),
        ("min.f32 %r9, 0f7FC00000, 0f3F800000;", 0x3F800000),
        ("setp.lt.s32 %p1, -1, 1;\nselp.b32 %r9, 5, 6, %p1;", 5),
        ("setp.lt.u32 %p1, -1, 1;\nselp.b32 %r9, 5, 6, %p1;", 6),
        ("setp.ne.f32 %p1, 0f7FC00000, 0f00000000;\nselp.b32 %r9, 5, 6, %p1;", 6),
        ("setp.neu.f32 %p1, 0f7FC00000, 0f00000000;\nselp.b32 %r9, 5, 6, %p1;", 5),
        ("mov.b32 %r8, 0x12345678;\nmov.b32 {%rs1, %rs2}, %r8;\nmov.b32 %r9, {%rs2, %rs1};", 0x56781234),
        ("mov.b32 %r8, 0xFFFF8000;\ncvt.u16.u32 %rs1, %r8;\ncvt.s32.s16 %r9, %rs1;", 0xFFFF8000),
        ("fma.rn.f32 %r9, 0f3F800001, 0f3F800001, 0fBF800002;", 0x28800000),  # (1 + 2^-23)² - (1 + 2^-22) = 2^-46
        ("fma.rn.f32 %r9, 0f3F800001, 0f337FFFFE, 0f3F800001;", 0x3F800001),  # just under a tie, which fp64 would round onto it
        ("div.rn.f32 %r9, 0f3F800000, 0f40400000;", 0x3EAAAAAB),
        ("sqrt.rn.f32 %r9, 0f40000000;", 0x3FB504F3),
        ("cvt.rn.bf16x2.f32 %r9, 0f3F800000, 0f40000000;", 0x3F804000),
        ("cvt.rn.bf16x2.f32 %r9, 0f3F808000, 0f3F818000;", 0x3F803F82),  # ties go to even
        ("cvt.rn.f16x2.f32 %r9, 0f3F800000, 0f47800000;", 0x3C007C00),  # 65536 is beyond fp16
        ("setp.lt.u32 %p1, %r0, 99;\nmov.b32 %r9, 1;\n@!%p1 mov.b32 %r9, 2;", 1),
        ("setp.gt.u32 %p1, %r0, 99;\n@%p1 mov.b32 %r9, 1;", 0xFFFFFFFF),
    ],
)
def test_an_instruction(body, expected):
    assert (computed(body) == expected).all()


def test_shuffles():
    thread = np.arange(64)
    assert (computed("shfl.sync.bfly.b32 %r9, %r0, 5, 31, -1;", 64) == thread ^ 5).all()
    assert (computed("xor.b32 %r8, %r0, 31;\nshfl.sync.idx.b32 %r9, %r0, %r8, 31, -1;", 64) == thread ^ 31).all()


FOUR = "{%r5, %r6, %r7, %r8}"
MATRICES = f"""
    shl.b32 %r1, %r0, 4;
    mul.lo.s32 %r2, %r0, 0x00080008;
    add.s32 %r5, %r2, 0x00010000;
    add.s32 %r6, %r2, 0x00030002;
    add.s32 %r7, %r2, 0x00050004;
    add.s32 %r8, %r2, 0x00070006;
    st.shared.v4.b32 [%r1], {FOUR};
    bar.sync 0;
"""  # thread t writes row t: the numbers 8t … 8t + 7


@pytest.mark.parametrize("k", range(4))
def test_ldmatrix(k):
    thread = np.arange(32)

    def loaded(trans):
        load = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {FOUR}, [%r1];"
        return computed(f"{MATRICES}\n{load}\nmov.b32 %r9, %r{5 + k};", shared_bytes=512)

    first = 8 * (8 * k + thread // 4) + 2 * (thread % 4)
    assert (loaded("") == first + (first + 1 << 16)).all()
    first = 8 * (8 * k + 2 * (thread % 4)) + thread // 4
    assert (loaded(".trans") == first + (first + 8 << 16)).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("k", range(4))
def test_stmatrix_undoes_ldmatrix(k, trans):
    found = computed(
        f"""{MATRICES}
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {FOUR}, [%r1];
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r1+512], {FOUR};
        bar.sync 0;
        ld.shared.v4.b32 {FOUR}, [%r1+512];
        mov.b32 %r9, %r{5 + k};""",
        shared_bytes=1024,
    )
    first = 8 * np.arange(32) + 2 * k
    assert (found == first + (first + 1 << 16)).all()


def test_programs_loop_as_often_as_each_must():
    out = torch.zeros(5, dtype=torch.int32)
    run(
        """
        mov.u32 %r1, %ctaid.x;
        mov.b32 %r2, 0;
        $L1:
        add.s32 %r2, %r2, %r1;
        sub.s32 %r1, %r1, 1;
        setp.gt.s32 %p1, %r1, 0;
        @%p1 bra $L1;
        mov.u32 %r3, %ctaid.x;
        mad.wide.u32 %rd9, %r3, 4, %rd0;
        setp.eq.u32 %p2, %r0, 0;
        @%p2 st.global.b32 [%rd9], {%r2};
        """,
        [out],
        grid=(5,),
    )
    assert out.tolist() == [0, 1, 3, 6, 10]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.lt.u32 %p1, %r0, 7;\n@%p1 bra $L1;\n$L1:", "a branch that parts the threads of a program"),
        ("add.s32 %r1, %r2, 1;", "reads register '%r2', which nothing wrote"),
        ("$L1:\nbra $L1;", "no end after"),
        ("shl.b32 %r1, %r0, 2;\nld.shared.b32 %r2, [%r1];", "thread 0, .*reads shared memory that nothing wrote"),
        ("shl.b32 %r1, %r0, 3;\nst.shared.b32 [%r1], %r0;", "thread 16, .*outside of the program's 128 bytes of shared"),
        ("mov.b32 %r1, 0;\nst.shared.b32 [%r1], %r0;", "race: two threads write one address at once"),
        ("shl.b32 %r1, %r0, 1;\nst.shared.b32 [%r1], %r0;", "thread 1, .*misaligned: 4 bytes"),
        ("mad.wide.u32 %rd9, %r0, 4, %rd0;\nld.global.b32 %r1, [%rd9+4];", "thread 31, .*out of bounds"),
        ("mad.wide.u32 %rd9, %r0, 4, %rd0;\nld.global.v2.b32 {%r1, %r2}, [%rd9];", "thread 1, .*misaligned: 8 bytes"),
        (
            "mad.wide.u32 %rd9, %r0, 4, %rd0;\nxor.b32 %r1, %r0, 1;\nmad.wide.u32 %rd8, %r1, 4, %rd0;\n"
            "ld.global.b32 %r2, [%rd9];\nst.global.b32 [%rd8], %r2;",
            "race: writes what another thread reads",
        ),
        ("shfl.sync.up.b32 %r1, %r0, 1, 0, -1;", "unknown mnemonic shfl.sync.up.b32"),
        ("ld.local.b32 %r1, [%r0];", "unknown mnemonic ld.local.b32"),
    ],
)
def test_what_no_program_may_do(body, message):
    with pytest.raises(Fault, match=message):
        run(body, [torch.zeros(32, dtype=torch.int32)], shared_bytes=128)


def test_a_half_that_the_compiler_left_undefined_is_poison():
    """LLVM packs an undefined register beside one it needs. Whatever would depend on it is a NaN, or an address of nothing."""
    out = torch.zeros(32, dtype=torch.int32)
    store = "mad.wide.u32 %rd9, %r0, 4, %rd0;\nst.global.b32 [%rd9], {%r2};"
    run(f"mov.b16 %rs1, 7;\nmov.b32 %r2, {{%rs1, %rs2}};\n{store}", [out])
    assert (out & 0xFFFF).tolist() == [7] * 32
    assert (out >> 16 == -1).all()
    with pytest.raises(Fault, match="reads register '%rs2', which nothing wrote"):
        run(f"mov.b16 %rs1, 7;\nmov.b32 %r2, {{%rs1, %rs2}};\nmov.b32 %r3, {{%rs2, %rs1}};\n{store}", [out])


def test_the_same_number_may_be_written_twice():
    run("mov.b32 %r1, 0;\nmov.b32 %r2, 7;\nst.shared.b32 [%r1], %r2;", shared_bytes=4)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "true", "bound"),
    [
        ("ex2.approx.ftz.f32", np.exp2, 2 * 2.0**-23),
        ("rsqrt.approx.ftz.f32", lambda x: 1 / np.sqrt(x), 2**-22.9),
        ("sqrt.approx.ftz.f32", np.sqrt, 2.0**-23),
        ("rcp.approx.ftz.f32", lambda x: 1 / x, 2.0**-23),
        ("tanh.approx.f32", np.tanh, 2.0**-11),
    ],
)
def test_approximations_err_as_far_as_they_may(name, true, bound, sign):
    x = np.geomspace(1e-3, 80, 1000).astype(np.float32)
    error = sign * (ptx_ops.approximations(sign)[name].compute(x).astype(np.float64) / true(x.astype(np.float64)) - 1)
    rounding = 2.0**-24
    assert error.max() <= bound + rounding
    assert error.min() >= bound / 2 - rounding  # an ulp is between 2^-24 and 2^-23 of a number
    if "tanh" not in name:
        return
    assert ptx_ops.approximations(sign)[name].compute(np.float32([0, np.inf, -np.inf])).tolist() == [0, 1, -1]
