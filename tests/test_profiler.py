"""The profile of a few steps: which steps it counts, that no time is lost or counted twice, and what each op is called."""

import gzip
import json
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdit.runtime.profiler import OTHER, Kind, Profiler, kind_of, kinds, table

CPU = torch.device("cpu")


def test_it_traces_its_steps_and_no_other(tmp_path):
    net, said = nn.Linear(300, 300), []
    profiler = Profiler(tmp_path / "profile", 2, CPU, said.append)
    for step in range(1, 9):
        net(torch.randn(300, 300)).square().sum().backward()
        if step == 6:  # two forwards in one of the two steps traced
            net(torch.randn(300, 300))
        profiler.step(step * 16)
    profiler.close()
    assert {p.name for p in (tmp_path / "profile").iterdir()} == {"000000096.json.gz", "000000096.txt"}
    events = json.loads(gzip.decompress((tmp_path / "profile" / "000000096.json.gz").read_bytes()))["traceEvents"]
    # Steps 5 and 6: one forward, and two.
    assert sum(e.get("name") == "aten::linear" for e in events) == 3
    (text,) = said
    assert "one step of 2 traced" in text
    assert "matrix products" in text


def test_shares_sum_to_the_whole_step(tmp_path):
    said = []
    profiler = Profiler(tmp_path, 3, CPU, said.append)
    for step in range(1, 8):
        x = torch.randn(500, 500)
        F.softmax(x @ x, dim=1)
        time.sleep(0.02)
        profiler.step(step)
    rows = [line for line in said[0].splitlines()[2:] if "%" in line]
    assert sum(float(row[36:44].strip("% ")) for row in rows) == pytest.approx(100, abs=0.1 * len(rows))
    assert rows[-1].startswith("not in any op")
    assert float(rows[-1][26:36]) >= 20  # the sleep


@pytest.mark.parametrize("steps", [0, 5])
def test_a_run_that_ends_first_or_was_not_asked_writes_nothing(tmp_path, steps):
    profiler = Profiler(tmp_path / "profile", steps, CPU, print)
    for step in range(1, 6):
        torch.ones(2).add_(1)
        profiler.step(step)
    profiler.close()
    assert not (tmp_path / "profile").exists()
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::mm", "matrix products"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nt", "matrix products"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm80_fprop_wmma_f16_knob_32_64x64x64_4x1x1_kernel0_0", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>", "attention"),
        ("aten::bmm", "attention"),
        ("aten::_softmax_backward_data", "attention"),
        ("fastdit::gelu_dwconv_backward", "GELU and convolution"),
        ("gelu_dwconv_forward_kernel", "GELU and convolution"),  # as a GPU's trace names what Triton compiled
        ("gate_residual_ln_modulate_backward_kernel", "norms and residuals"),
        ("sum_partials_kernel", "norms and residuals"),
        ("adamw_ema_kernel", "optimizer and EMA"),
        ("void dgrad2d_c1_k1_nhwc_specialized_kernel", "GELU and convolution"),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32", "GELU and convolution"),
        ("aten::gelu", "GELU and convolution"),
        ("aten::convolution_backward", "GELU and convolution"),
        ("fastdit::gate_residual_ln_modulate", "norms and residuals"),
        ("aten::native_layer_norm_backward", "norms and residuals"),
        ("aten::_fused_adamw_", "optimizer and EMA"),
        ("aten::_fused_sgd_", "optimizer and EMA"),
        ("fsdp::all_gather_copy_in", "sharding's copies"),
        ("c10d::_allgather_base_", "communication"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("triton_poi_fused_add_mul_3", "compiled pointwise"),
        ("aten::copy_", "copies and casts"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("aten::normal_", "random numbers and data"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "sums and elementwise"),
        ("aten::mse_loss_backward", "sums and elementwise"),
        ("cudaLaunchKernel", OTHER),
    ],
)
def test_kind_of(name, kind):
    assert kind_of(name) == kind


def test_kinds_are_per_step_and_longest_first():
    times = {"aten::mm": (0.4, 8), "aten::addmm": (0.6, 2), "aten::gelu": (0.2, 4)}
    found = kinds(times, steps=2)
    assert found == [Kind("matrix products", 0.5, 5, "aten::addmm"), Kind("GELU and convolution", 0.1, 2, "aten::gelu")]
    last = table(found, 0.8, 2).splitlines()[-1]
    assert last.split() == ["not", "in", "any", "op", "200.00", "25.0%"]
