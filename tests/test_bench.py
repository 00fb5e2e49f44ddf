"""tools/bench.py: its numbers hang together; and what makes training fast changes nothing. LONG=1: inductor, too."""

import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, call, output_and_gradients, small_unet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
import train
from lib.cli import InputError
from model import NovelViewModel
from tools import bench

QUICK = [
    "--size",
    "tiny",
    "--device",
    "cpu",
    "--micro_batches",
    2,
    "--seconds",
    0.05,
    "--workers",
    0,
]


def measured(capsys, out, name, *flags) -> list[dict]:
    """The JSON lines of a benchmark, of which each is a line of its Markdown table, too."""
    call(bench, name, *QUICK, "--out", out, *flags)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    table = capsys.readouterr().out.split(f"\n{name}: ")[1]
    assert len(
        [line for line in table.split("\n\n")[1].splitlines() if line.startswith("|")]
    ) == 2 + len(records)
    assert all(
        r["device"].startswith("CPU") and r["torch"] == torch.__version__ and r["shapes"]
        for r in records
    )
    for r in records:  # rates are consistent with the time that passed
        for unit in {"samples", "views"} & {
            key.removesuffix("_per_second") for key in r if key.endswith("_second")
        }:
            assert r[f"{unit}_per_second"] == pytest.approx(r[unit] / r["seconds"]) and r[unit] > 0
    return records


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of `train`, measured once."""
    out = tmp_path_factory.mktemp("bench") / "train.jsonl"
    call(bench, "train", *QUICK, "--accumulate", 2, "--out", out)
    return {record["row"]: record for record in map(json.loads, out.read_text().splitlines())}


def test_every_row_of_train_is_measured_and_consistent(rows):
    assert list(rows) == ["ours", "reading", "diffusers", "zero123"]
    for r in rows.values():
        assert (
            r["status"] == "ok" and r["samples"] % 4 == 0
        )  # whole steps of two micro-batches of two
        assert r["samples_per_second"] == pytest.approx(r["samples"] / r["seconds"])
        assert r["tflops"] == pytest.approx(r["samples_per_second"] * r["gflop_per_sample"] / 1e3)
        assert r["mfu"] == pytest.approx(r["tflops"] / r["matmul_tflops"]) and 0 < r["mfu"] < 1.5
        assert r["ratio"] == pytest.approx(
            rows["ours"]["samples_per_second"] / r["samples_per_second"]
        )


def test_rows_do_the_same_work(rows):
    """Parameters are equal up to the amalgamation; FLOPs are those of a real forward and backward pass."""
    size, spec = (
        bench.SIZES["tiny"],
        {"cls_dim": 192, "feature_dim": rows["ours"]["feature_dim"], "tokens": 4},
    )
    amalgamation = spec["feature_dim"] * (32 + 32)  # both stages are entered with 32 channels
    assert (
        rows["ours"]["parameters"] - amalgamation
        == rows["diffusers"]["parameters"]
        == rows["zero123"]["parameters"]
    )
    for row in ("ours", "diffusers"):
        net = bench.make_model(size, torch.device("cpu"), spec, row)
        condition = {
            "latent": torch.randn(2, 4, 4, 4),
            "cls": torch.randn(2, 192),
            "pose": torch.randn(2, 4),
        }
        with (
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
        ):  # the CPU's own isn't counted
            output = net(
                condition["latent"],
                torch.tensor([1, 900]),
                condition | {"patch": torch.randn(2, 4, 64)},
            )
            output.sum().backward()
        # three times the forward pass, of which the first convolution's input and attn2's queries need no gradient
        assert rows[row]["gflop_per_sample"] == pytest.approx(
            counter.get_total_flops() / 2e9, rel=0.03
        )
        assert output.std() > 1e-3  # the layers that start at zero don't
    assert 1 < rows["diffusers"]["gflop_per_sample"] / rows["ours"]["gflop_per_sample"] < 1.1
    assert (
        rows["zero123"]["gflop_per_sample"] > 2 * rows["ours"]["gflop_per_sample"]
    )  # with two VAE encodes


def test_a_missing_package_and_too_little_memory_are_rows_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    real, full = bench.train_row, []

    def train_row(*args):
        if not full.append(0) and len(full) == 2:
            raise torch.OutOfMemoryError("so it goes")
        if args[5] == "reduce-overhead":
            raise RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten")
        return real(*args)

    monkeypatch.setattr(bench, "train_row", train_row)
    flags = ["--rows", "ours", "reading", "diffusers", "--accumulate", 1, "--profile"]
    ours, reading, diffusers = measured(capsys, tmp_path / "x", "train", *flags)
    (graphs,) = measured(
        capsys, tmp_path / "y", "train", "--rows", "ours", "--compile", "reduce-overhead"
    )
    assert (
        graphs["status"]
        == "failed: accessing tensor output of CUDAGraphs that has been overwritten"
    )
    assert ours["status"] == "ok" and reading["status"] == "out of memory"
    times = ours["profile_ms"]
    assert (
        min(
            times[kind] for kind in ("convolution", "gemm", "attention", "copies", "norm+pointwise")
        )
        > 0
    )
    assert times["other"] < 0.5 * sum(times.values())
    assert diffusers["status"].startswith("not run: ") and "\n" not in diffusers["status"]


def test_the_row_that_reads_counts_the_wait_for_its_workers(tmp_path, monkeypatch):
    clocks, real = [], bench.measure
    monkeypatch.setattr(
        bench, "measure", lambda *a, **k: clocks.append(k.get("workers", 0)) or real(*a, **k)
    )
    call(
        bench,
        "train",
        *QUICK[:-1],
        0,
        1,
        "--accumulate",
        1,
        "--rows",
        "ours",
        "reading",
        "--micro_batches",
        2,
    )
    assert clocks == [0, 0, 0, 0, 0, 1]  # a row: a matrix product, the first step, the others


@pytest.mark.parametrize("name, argv, words", [
    ("read", ["--micro_batches", 0], "--micro_batches 0: at least 1"),
    ("read", ["--workers", 1, -1], "--workers -1: at least 0"),
    ("read", ["--seconds", "nan"], "--seconds nan: at least 0"),
    ("train", ["--accumulate", 0], "--accumulate 0: at least 1"),
    ("sample", ["--steps", 0], "--steps 0: between 1 and"),
    ("all", ["--data", "none"], "none"),
    ("read", ["--out", "file/x.jsonl"], "file/x.jsonl: could not be written"),
    ("train", ["--archive"], "--archive .*: latents of .48, 8, 8.; --size tiny has .4, 4, 4."),
])  # fmt: skip
def test_wrong_flags_are_one_line_before_anything_is_measured(
    tmp_path, monkeypatch, archive, name, argv, words
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "measure", lambda *args, **flags: pytest.fail("measured"))
    with pytest.raises(InputError, match=words) as error:
        call(bench, name, *QUICK, *argv, *[archive] * (argv == ["--archive"]))
    assert "\n" not in str(error.value)


def test_unknown_compile_modes_are_refused(capsys):
    with pytest.raises(SystemExit):
        call(bench, "train", *QUICK, "--compile", "off", "tunned")
    assert "argument --compile: invalid choice: 'tunned'" in capsys.readouterr().err


def test_sample(tmp_path, capsys):
    records = measured(capsys, tmp_path / "x", "sample", "--steps", 2)
    assert [(r["row"], r["views"], r["steps"], r["scale"]) for r in records] == [
        ("independent", 12, 2, 3), ("stochastic conditioning", 12, 2, 3)]  # fmt: skip
    assert all(r["seconds"] > 0 for r in records)


def test_read(tmp_path, capsys, archive):
    records = measured(
        capsys, tmp_path / "x", "read", "--recipes", "latents", "fp16", "fp8", "fp8+pca"
    )
    latents, fp16, fp8, pca = (r["bytes_per_sample"] for r in records)
    assert latents == 2 * 3 * 4 * 4 * 4 + 2 * 192 + 4 * 4  # two means and a log variance, CLS, pose
    assert (fp16 - latents, fp8 - latents, pca - latents) == (2 * 4 * 384, 4 * 384, 4 * 64)
    given = measured(capsys, tmp_path / "y", "read", "--archive", archive, "--workers", 0, 1)
    assert [r["workers"] for r in given] == [0, 1] and {r["recipe"] for r in given} == {"as given"}


def test_archive(tmp_path, capsys, monkeypatch, tree):
    records = measured(capsys, tmp_path / "x", "archive", "--data", tree)
    assert [(r["row"], r.get("workers")) for r in records] == [
        ("encode", None),
        ("decode", 0),
        ("decode, encode", 0),
    ]
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: plain(f, backend="aot_eager"))
    records = measured(
        capsys, tmp_path / "y", "archive", "--data", tree, "--compile", "off", "default"
    )
    assert [r.get("compile") for r in records] == ["off", "default", None, "default"]


def test_archive_measures_on_all_threads_and_leaves_out_as_it_was(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(
        bench, "measure", lambda *_: threads.append(torch.get_num_threads()) or (1.0, [1])
    )
    (tmp_path / "x.jsonl").write_text("{}\n")
    torch.set_num_threads(2)
    try:
        call(bench, "archive", *QUICK, "--out", tmp_path / "x.jsonl")
    finally:
        torch.set_num_threads(1)
    first, *records = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert (
        threads == [2, 2, 2]
        and not first
        and all(r["device"].endswith("2 thread(s)") for r in records)
    )


@pytest.mark.parametrize(
    "name, kind",
    {
        "triton_poi_fused__to_copy_clone_3": "copies",
        "triton_poi_fused__to_copy_gelu_mul_12": "norm+pointwise",
        "triton_red_fused_convolution_native_group_norm_7": "norm+pointwise",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "convolution",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>": "copies",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NTT": "gemm",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimiser, EMA",
        "void at::native::elementwise_kernel<direct_copy_kernel_cuda>": "copies",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::vectorized_layer_norm_kernel<c10::BFloat16>": "norm+pointwise",
        "spin_kernel": "other",
    }.items(),
)
def test_kernel_classes(name, kind):
    assert bench.kernel_class(name) == kind


# ---------------------------------------------------------------------------------- the fast path and the plain one


def plain_group_norm(self, x):
    return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def plain_res_block(self, x, emb):
    h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
    return self.skip_connection(x) + self.out_layers(h)


def plain_attention(self, x, context=None):
    """Separate projections, an explicit softmax."""
    context = x if context is None else context
    q, k, v = (
        y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        for y in (self.to_q(x), self.to_k(context), self.to_v(context))
    )
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
    return self.to_out((weights @ v).transpose(1, 2).flatten(2))


def plain_block(self, x, context):
    x = x + self.attn1(self.norm1(x))
    x = x + plain_attention(self.attn2, self.norm2(x), context)
    return x + self.ff(self.norm3(x))


def plain_transformer(self, x, context):
    """1x1 convolutions on contiguous memory."""
    h = self.proj_in(self.norm(x).contiguous())
    tokens = self.transformer_blocks[0](h.flatten(2).transpose(1, 2), context)
    return x + self.proj_out(tokens.transpose(1, 2).reshape(x.shape))


def fast_group_norm(self, x):  # as on a GPU
    return model.channels_last_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def test_the_fast_path_equals_the_plain_one(monkeypatch):
    """Group normalisation in channels-last memory, a bias added with the embedding, upsampling by an expanded view, q,
    k and v in one product, cross attention without a softmax, linear layers for 1x1 convolutions: output and every
    gradient, in float32."""
    unet, inputs = small_unet()
    monkeypatch.setattr(model.GroupNorm, "forward", fast_group_norm)
    fast = output_and_gradients(unet.to(memory_format=torch.channels_last), inputs)
    monkeypatch.setattr(model.GroupNorm, "forward", plain_group_norm)
    monkeypatch.setattr(model.ResBlock, "forward", plain_res_block)
    monkeypatch.setattr(
        model.NearestUpsample, "forward", lambda self, x: F.interpolate(x, scale_factor=2.0)
    )
    monkeypatch.setattr(model.Attention, "forward", plain_attention)
    monkeypatch.setattr(model.TransformerBlock, "forward", plain_block)
    monkeypatch.setattr(model.SpatialTransformer, "forward", plain_transformer)
    unet.requires_grad_(True)  # what the shortcut skips would get no gradient but rounding's
    plain = output_and_gradients(unet.to(memory_format=torch.contiguous_format), inputs)
    skipped = {name: plain.pop(name) for name in plain.keys() - fast.keys()}
    assert skipped and all(float(gradient.abs().max()) < 1e-6 for gradient in skipped.values())
    assert_equal(fast, plain)


def test_group_norm_gradients():
    torch.manual_seed(0)
    x = (3 + torch.randn(2, 64, 5, 5)).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(2, 64).requires_grad_().unbind()
    upstream = torch.randn(2, 64, 5, 5)
    ours = model.channels_last_group_norm(x, 32, weight, bias, 1e-5)
    gradients = torch.autograd.grad(ours, (x, weight, bias), upstream)
    expected = torch.autograd.grad(
        F.group_norm(x, 32, weight, bias, 1e-5), (x, weight, bias), upstream
    )
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# the first stops short of generating code; inductor takes over a minute to compile even this
BACKENDS = [
    "aot_eager_decomp_partition",
    *(["inductor"] if os.environ.get("LONG") and shutil.which("c++") else []),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(monkeypatch, backend):
    monkeypatch.setattr(model.GroupNorm, "forward", fast_group_norm)
    unet, inputs = small_unet((1,), ())
    eager = output_and_gradients(unet, inputs)
    torch._dynamo.reset()
    unet.compile(backend=backend, fullgraph=True)  # no graph breaks, either
    compiled = output_and_gradients(unet, inputs)
    torch._dynamo.reset()
    assert_equal(compiled, eager)


@pytest.mark.parametrize("options, forward, backward", [(train.COMPILE, 4, 5), ({}, 4, 12)])
def test_what_group_norm_and_silu_read_and_write(monkeypatch, options, forward, backward):
    """Bytes of inductor's schedule over those of the input in bf16, by the heuristics that it has for GPUs; no code is
    generated. At its own thresholds it stores intermediate values in float32."""
    from torch._inductor import graph as inductor  # here: it takes a while

    count, net = [], torch.nn.GroupNorm(32, 64)

    def interpret(graph):
        graph._update_scheduler()
        count.append(sum(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes))
        graph.cache_key, graph.cache_path, graph.cache_linemap = "", os.devnull, []
        call = lambda args: list(torch.fx.Interpreter(graph.module).run(*args))  # noqa: E731
        return SimpleNamespace(__file__=os.devnull, key="", call=call)

    monkeypatch.setattr(inductor.GraphLowering, "compile_to_module", interpret)
    monkeypatch.setattr(torch._inductor.ir, "is_cpu", lambda _: False)
    x = torch.randn(8, 64, 32, 32).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(lambda x: F.silu(fast_group_norm(net, x)), options=options)(
            x
        ).sum().backward()
    torch._dynamo.reset()
    assert [each / (2 * x.numel()) for each in count] == pytest.approx([forward, backward], abs=0.1)
    expected = torch.autograd.grad(F.silu(F.group_norm(x.float(), 32)).sum(), x)[0]
    torch.testing.assert_close(
        x.grad, expected, atol=0.02, rtol=0.02
    )  # what was counted computes it


def test_compiling_in_place_keeps_the_names():
    net = NovelViewModel(
        8, model_channels=32, channel_mult=(1,), num_res_blocks=1, context_dim=16, num_heads=4
    )
    names = list(net.state_dict())
    net.unet.compile()
    assert list(net.state_dict()) == names
