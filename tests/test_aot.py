"""What the compiler makes of every kernel for six architectures, with no GPU, read from the cubin and its SASS."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def compiled(path: Path, *arguments: str) -> list[dict]:
    """What `python -m fastdit_kernels.aot` writes, in its own process: this one's kernels may be interpreted functions."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastdit_kernels.aot", "--json", str(path), *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def every_row(tmp_path_factory) -> list[dict]:
    return compiled(tmp_path_factory.mktemp("aot") / "static.json")


@pytest.fixture(scope="module")
def rows(every_row) -> list[dict]:
    """Those of an A100 and an H100, of ops as the model calls them without a bias of the gated residual."""
    return [row for row in every_row if row["arch"] in ("sm_80", "sm_90") and "with bias" not in row["op"]]


def kernels(rows: list[dict], op: str = "", kernel: str = "") -> Iterator[tuple[dict, dict]]:
    for row in rows:
        for compiled in row["kernels"]:
            if row["op"].startswith(op) and compiled["kernel"].startswith(kernel):
                yield row, compiled


ADALN = ("ln_modulate", "gate_residual_ln_modulate")


def test_every_op_at_every_width_on_both_devices(rows):
    seen = {(row["op"], row["width"], row["arch"]) for row in rows if row["op"].split()[0] in ADALN}
    directions = [f"{op} {direction}" for op in ADALN for direction in ("forward", "backward")]
    assert seen == {(op, D, arch) for op in directions for D in (768, 1024, 1152, 1536) for arch in ("sm_80", "sm_90")}


def test_no_spills_no_stack_no_fp64(every_row):
    assert {row["arch"] for row in every_row} == {"sm_80", "sm_90", "sm_100"}
    for row, kernel in kernels(every_row):
        assert (kernel["spills"], kernel["stack"], kernel["fp64"]) == (0, 0, 0), (row["op"], row["width"], kernel)


@pytest.mark.parametrize("arch", [86, 120, pytest.param(89, marks=pytest.mark.soak)])  # what it makes for 89 it makes for 86
def test_no_spills_on_smaller_gpus(tmp_path, arch):
    for row, kernel in kernels(compiled(tmp_path / "rows.json", "--arch", str(arch))):
        assert row["arch"] == f"sm_{arch}"
        assert (kernel["spills"], kernel["stack"], kernel["fp64"]) == (0, 0, 0), (row["op"], row["width"], kernel)


def test_what_shares_an_sm_follows_from_registers(every_row):
    """A quarter of an SM has 16,384 registers: 128 a thread leave room for four warps of it, 168 for three, 255 for two."""
    for row, kernel in kernels(every_row):
        registers = -(-kernel["registers"] // 8) * 8
        assert 0 < kernel["warps_per_sm"] <= min(64, 4 * (16384 // (32 * registers))), (row["op"], kernel)
        assert kernel["warps_per_sm"] % kernel["num_warps"] == 0
        assert kernel["waves"] > 0
        assert kernel["bytes_in_flight_per_sm"] > 0


@pytest.mark.parametrize("op", ADALN)
def test_streams_move_128_bits_at_a_time(rows, op):
    """All but a row's two statistics, loaded in backward and stored in forward, and counters. Partials are eight fp32 a thread:
    two accesses. The last program has eight rows of them in flight, and writes a sum of 16 bits by one.
    """
    streams = {"ln_modulate": (1, 2), "gate_residual_ln_modulate": (2, 4)}[op]  # loaded forward, backward
    modulations = {"ln_modulate": (2, 1), "gate_residual_ln_modulate": (3, 2)}[op]
    written = {"ln_modulate": (1, 1), "gate_residual_ln_modulate": (2, 2)}[op]
    sums = {"ln_modulate": 2, "gate_residual_ln_modulate": 3}[op]
    counters = {"ln_modulate": 1, "gate_residual_ln_modulate": 2}[op]  # made 0: a sample's, and the batch's for a bias
    for row, kernel in kernels(rows, f"{op} ", f"{op}_forward_kernel"):
        assert kernel["loads"] == {"128": streams[0] + modulations[0]}, row["width"]
        assert kernel["stores"] == {"128": written[0], "32": 2 + counters}, row["width"]
    for row, kernel in kernels(rows, f"{op} ", f"{op}_backward_kernel"):
        assert kernel["loads"] == {"128": streams[1] + modulations[1] + 8 * 2 * sums, "32": 2}, row["width"]
        assert kernel["stores"] == {"128": written[1] + 2 * sums + sums, "32": 1}, row["width"]


def test_partials_that_a_kernel_of_its_own_adds_are_read_128_bits_at_a_time(rows):
    found = list(kernels(rows, "sum_partials"))
    assert len(found) == 2
    assert all(set(kernel["loads"]) == {"128"} for _, kernel in found)


def test_registers(rows):
    for op in ADALN:
        for row, kernel in kernels(rows, f"{op} "):
            assert kernel["registers"] <= 80, (row["op"], row["width"])
            if row["width"] <= 1024:
                assert kernel["num_warps"] <= 4


@pytest.mark.parametrize(("op", "limit"), [("ln_modulate backward", 33), ("gate_residual_ln_modulate backward", 45)])
def test_instructions_per_element(rows, op, limit):
    """From entry to exit, at D = 768; of the gated one 2 count programs and add partials."""
    found = [row["instructions_per_element"] for row in rows if row["op"] == op and row["width"] == 768]
    assert len(found) == 2
    assert max(found) <= limit, found


def test_memory_binds_the_adaln_kernels(rows):
    """On both devices bytes take longer than issue or the special-function unit: nothing is left to gain in the code itself."""
    for row in rows:
        if row["op"].split()[0] in ADALN:
            assert row["bound_by"] == "bytes", (row["op"], row["width"], row["device"], row["bound_us"])


def test_gelu_dwconv_for_every_kernel_size_on_both_devices(rows):
    seen = {(row["op"], row["width"], row["arch"]) for row in rows if row["op"].startswith("gelu_dwconv ")}
    sizes = [(3072, 3), (4608, 3), (3072, 4), (3072, 5)]
    directions = [(f"gelu_dwconv K={K} {direction}", F) for F, K in sizes for direction in ("forward", "backward")]
    assert seen == {(op, F, arch) for op, F in directions for arch in ("sm_80", "sm_90")}


@pytest.mark.parametrize("K", [3, 4, 5])
def test_gelu_dwconv_moves_its_streams_128_bits_at_a_time(rows, K):
    """But the backward of K > 3, whose K² sums leave a thread room for four channels or two: 64 and 32 bits. A warp still takes
    whole lines of 128 bytes. Partials are stored in 32 bits, and added with four of their rows in flight. Their sums are stored
    in 16 bits, K² of them behind each other for a channel.
    """
    bits, (columns_ahead, columns_back) = {3: ("128", (4, 2)), 4: ("64", (2, 4)), 5: ("32", (2, 4))}[K]
    taps = K * K * 2  # eight fp32 are two accesses
    for _, kernel in kernels(rows, f"gelu_dwconv K={K} ", "gelu_dwconv_forward_kernel"):
        assert kernel["loads"] == {"128": columns_ahead + K - 1 + taps + 2}  # h, taps, biases
        assert kernel["stores"] == {"128": columns_ahead * (1 + K // 2), "32": 1}  # a row, and the last ones; a counter
    for _, kernel in kernels(rows, f"gelu_dwconv K={K} ", "gelu_dwconv_backward_kernel"):
        streams = columns_back + K * (columns_back + K - 1) + 1  # h, dz, bias
        adding, added = {3: (4 * 3, 11), 4: (4 * 5, 18), 5: (4 * 4, 14)}[K]  # of a thread
        of_taps = {3: {"128": streams + taps + adding}, 4: {"128": taps // 2 + adding}, 5: {"64": taps // 2, "128": adding}}[K]
        assert kernel["loads"] == {bits: streams} | of_taps
        partials = {"32": K * K + 2 + 1 + (columns_back if bits == "32" else 0)}  # and the counter
        assert kernel["stores"] == {bits: columns_back} | partials | {"16": added}


@pytest.mark.parametrize(("K", "forward", "backward"), [(3, 26, 54), (4, 43, 70), (5, 60, 120)])
def test_gelu_dwconv_instructions_per_element(rows, K, forward, backward):
    """Nine loads and as many GELUs would be 132 forward, three of each 45 (K = 3)."""
    for direction, limit in (("forward", forward), ("backward", backward)):
        found = [row["instructions_per_element"] for row in rows if row["op"] == f"gelu_dwconv K={K} {direction}"]
        assert len(found) >= 2
        assert max(found) <= limit, found


@pytest.mark.parametrize("K", [3, 4, 5, 7])
def test_gelu_dwconv1d_moves_its_streams_128_bits_at_a_time(rows, K):
    """But the backward of K > 3, where four channels of a thread leave room for twice the warps: 64 bits."""
    tokens, bits = 4, "128" if K == 3 else "64"
    assert sum(row["op"].startswith(f"gelu_dwconv1d K={K} ") for row in rows) == 4  # directions and devices
    for _, kernel in kernels(rows, f"gelu_dwconv1d K={K} ", "gelu_dwconv1d_forward_kernel"):
        assert kernel["loads"] == {"128": tokens + K - 1 + 2 * K + 2}  # h, taps (eight fp32 are two accesses), biases
        assert kernel["stores"] == {"128": tokens, "32": 1}  # a counter
    for _, kernel in kernels(rows, f"gelu_dwconv1d K={K} ", "gelu_dwconv1d_backward_kernel"):
        streams = 2 * tokens + K - 1 + 1  # h, dz, bias
        adding, added = {3: (4 * 2, 5), 4: (4, 3), 5: (4, 4), 7: (4 * 2, 5)}[K]  # partials of a thread, as for the K×K one
        assert kernel["loads"] == ({"128": streams + 2 * K + adding} if K == 3 else {"64": streams, "128": K + adding})
        assert kernel["stores"] == {bits: tokens, "32": K + 2 + 1, "16": added}


@pytest.mark.parametrize(("K", "forward", "backward"), [(3, 14, 30), (4, 16, 34), (5, 16, 37), (7, 20, 42)])
def test_memory_binds_the_convolution_along_sequences(rows, K, forward, backward):
    """With far fewer instructions than the K×K one, of which it would waste all but a row."""
    for direction, limit in (("forward", forward), ("backward", backward)):
        found = [row for row in rows if row["op"] == f"gelu_dwconv1d K={K} {direction}"]
        assert len(found) == 2
        for row in found:
            assert row["instructions_per_element"] <= limit, row["instructions_per_element"]
            assert row["bytes_per_element"] <= 1.05 * row["floor_bytes_per_element"]
            assert row["bound_by"] == "bytes", (row["device"], row["bound_us"])
            assert max(kernel["registers"] for kernel in row["kernels"]) <= 192


def test_gelu_dwconv_moves_at_most_8_percent_over_the_floor(rows):
    for row in rows:
        if row["op"].startswith("gelu_dwconv "):
            assert row["bytes_per_element"] <= 1.08 * row["floor_bytes_per_element"], (row["op"], row["width"])


def test_memory_binds_the_3x3_convolution(rows):
    for row in rows:
        if row["op"].startswith("gelu_dwconv K=3 "):
            assert row["bound_by"] == "bytes", (row["op"], row["width"], row["device"], row["bound_us"])


@pytest.mark.parametrize(
    ("op", "loads", "stores", "registers"),
    [
        # Five tensors; the table; which tensor and block, and scalars.
        ("adamw_ema", {"128": 10, "64": 6, "32": 8}, {"128": 8}, 64),
        ("adamw_ema with copies", {"128": 9, "64": 7, "32": 8}, {"128": 9}, 72),  # eight numbers of 16 bits are one access
    ],
)
def test_adamw_ema_moves_128_bits_at_a_time_and_memory_binds_it(rows, op, loads, stores, registers):
    found = [row for row in rows if row["op"] == op]
    assert [row["arch"] for row in found] == ["sm_80", "sm_90"]
    for row in found:
        (kernel,) = row["kernels"]
        assert (kernel["loads"], kernel["stores"]) == (loads, stores)
        assert kernel["registers"] <= registers
        assert row["bytes_per_element"] <= 1.001 * 36
        assert row["bound_us"]["issue"] < row["bound_us"]["bytes"] / 2
