"""tools/bench.py: its numbers hang together. And what makes training fast changes no result.

LONG=1 compiles with inductor, too.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_equal, call, output_and_gradients, small_unet
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
from lib.cli import InputError
from tools import bench, bench_train, rivals

TINY = ["--size", "tiny", "--device", "cpu", "--micro_batches", 2, "--seconds", 0.05]
QUICK = [*TINY, "--workers", 0]
CPU = torch.device("cpu")


def measured(capsys, out, name, *flags) -> list[dict]:
    """The lines of JSON of a benchmark, after a look at them and at its Markdown table."""
    call(bench, name, *QUICK, "--out", out, *flags)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    printed = capsys.readouterr().out
    table = printed.split(f"\n{name}: ")[1].split("\n\n")[1]
    assert len(table.splitlines()) == 2 + len(records)
    for record in records:
        assert record["device"].startswith("CPU")
        assert record["torch"] == torch.__version__
        assert record["shapes"]
        for unit in ("samples", "views"):
            if f"{unit}_per_second" in record:
                rate = record[unit] / record["seconds"]
                assert record[f"{unit}_per_second"] == pytest.approx(rate)
                assert rate > 0
    return records


# ------------------------------------------------------------------------------------------- train


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of `train`, measured once."""
    out = tmp_path_factory.mktemp("bench") / "train.jsonl"
    call(bench, "train", *QUICK, "--accumulate", 2, "--out", out)
    return {record["row"]: record for record in map(json.loads, out.read_text().splitlines())}


def test_every_row_of_train_is_measured_and_consistent(rows):
    assert list(rows) == ["ours", "reading", "diffusers", "zero123"]
    for row in rows.values():
        rate = row["samples_per_second"]
        assert row["status"] == "ok"
        assert row["samples"] % 4 == 0  # whole steps of two micro-batches of two
        assert rate == pytest.approx(row["samples"] / row["seconds"])
        assert row["tflops"] == pytest.approx(rate * row["gflop_per_sample"] / 1e3)
        assert row["mfu"] == pytest.approx(row["tflops"] / row["matmul_tflops"])
        assert 0 < row["mfu"] < 1.5
        assert row["ratio"] == pytest.approx(rows["ours"]["samples_per_second"] / rate)


def test_rows_have_the_same_parameters_up_to_the_amalgamation(rows):
    # Both stages of the tiny UNet are entered with 32 channels.
    amalgamation = rows["ours"]["feature_dim"] * (32 + 32)
    ours = rows["ours"]["parameters"] - amalgamation
    assert ours == rows["diffusers"]["parameters"] == rows["zero123"]["parameters"]
    assert rows["reading"]["parameters"] == rows["ours"]["parameters"]


@pytest.mark.parametrize("row", ["ours", "diffusers"])
def test_flops_are_those_of_a_forward_and_a_backward_pass(rows, row):
    size = rivals.SIZES["tiny"]
    spec = {"cls_dim": 192, "feature_dim": rows["ours"]["feature_dim"], "tokens": 4}
    net = bench.random_model(size, CPU, spec)
    if row == "diffusers":
        net.unet = rivals.DiffusersUNet(size)
        rivals.fill_zeros(net)
    condition = {
        "latent": torch.randn(2, 4, 4, 4),
        "cls": torch.randn(2, 192),
        "pose": torch.randn(2, 4),
        "patch": torch.randn(2, 4, 64),
    }
    # The counter does not know the CPU's own attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = net(condition["latent"], torch.tensor([1, 900]), condition)
        output.sum().backward()
    # Three times the forward pass is a little too much: the first convolution's input and attn2's
    # queries need no gradient.
    counted = counter.get_total_flops() / 2e9
    assert rows[row]["gflop_per_sample"] == pytest.approx(counted, rel=0.03)
    assert output.std() > 1e-3  # no layer is left at zero


def test_the_rivals_compute_more(rows):
    ours = rows["ours"]["gflop_per_sample"]
    assert 1 < rows["diffusers"]["gflop_per_sample"] / ours < 1.1  # all of cross attention
    assert rows["zero123"]["gflop_per_sample"] > 2 * ours  # two VAE encodes


def test_a_missing_package_is_a_row_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    flags = ["--rows", "ours", "diffusers", "--accumulate", 1, "--profile"]
    ours, diffusers = measured(capsys, tmp_path / "x", "train", *flags)
    assert ours["status"] == "ok"
    assert "aten::" in ours["profile"]
    assert diffusers["status"].startswith("not run: ")
    assert "\n" not in diffusers["status"]


@contextmanager
def too_large(net):
    raise torch.OutOfMemoryError("so it goes")
    yield


def refuses_to_accumulate(module):
    raise RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten")


def test_a_row_that_fails_is_a_row_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(rivals.VARIANTS, "cudnn.benchmark", too_large)
    monkeypatch.setitem(rivals.COMPILERS, "reduce-overhead", refuses_to_accumulate)
    flags = ["--rows", "ours", "--accumulate", 1, "--micro_batches", 1, 2]
    variants = ["--variants", "cudnn.benchmark", "plain"]
    records = measured(capsys, tmp_path / "x", "train", *flags, *variants)
    assert [record["status"] for record in records] == [
        "out of memory",
        "ok",
        "out of memory, like a smaller micro-batch",
        "ok",
    ]
    (graphs,) = measured(
        capsys, tmp_path / "y", "train", *flags[:-1], "--compile", "reduce-overhead"
    )
    reason = "accessing tensor output of CUDAGraphs that has been overwritten"
    assert graphs["status"] == f"failed: {reason}"


@pytest.mark.slow
def test_repetitions_alternate_and_the_table_shows_medians(tmp_path, capsys):
    out = tmp_path / "x"
    flags = ["--rows", "ours", "diffusers", "--accumulate", 1, "--repeat", 3]
    call(bench, "train", *QUICK, "--out", out, *flags)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["row"] for record in records] == 3 * ["ours", "diffusers"]
    table = capsys.readouterr().out.split("\ntrain: ")[1].split("\n\n")[1].splitlines()
    for name, line in zip(("ours", "diffusers"), table[2:], strict=True):
        rates = [r["samples_per_second"] for r in records if r["row"] == name]
        assert f"| {sorted(rates)[1]:.1f} |" in line


def test_waiting_for_workers_counts():
    torch.set_num_threads(1)
    for workers, counts in ((0, False), (1, True)):
        now = bench_train.stopwatch(CPU, workers)
        start = now()
        time.sleep(0.2)
        assert (now() - start > 0.1) == counts


# --------------------------------------------------------------------------------- other benchmarks


def test_sample(tmp_path, capsys):
    records = measured(capsys, tmp_path / "x", "sample", "--steps", 2)
    assert [record["row"] for record in records] == ["independent", "stochastic conditioning"]
    for record in records:
        assert (record["views"], record["steps"], record["scale"]) == (12, 2, 3)
        assert record["seconds"] > 0


def test_read(tmp_path, capsys, archive):
    recipes = ["latents", "fp16", "fp8", "fp8+pca"]
    records = measured(capsys, tmp_path / "x", "read", "--recipes", *recipes)
    latents, fp16, fp8, pca = (record["bytes_per_sample"] for record in records)
    # two means and a log variance in fp16, CLS in fp16, the pose in float32
    assert latents == 2 * 3 * 4 * 4 * 4 + 2 * 192 + 4 * 4
    assert (fp16 - latents, fp8 - latents, pca - latents) == (2 * 4 * 384, 4 * 384, 4 * 64)
    given = measured(capsys, tmp_path / "y", "read", "--archive", archive, "--workers", 0, 1)
    assert [record["workers"] for record in given] == [0, 1]
    assert {record["recipe"] for record in given} == {"as given"}


def test_archive(tmp_path, capsys, tree):
    out = tmp_path / "x"
    records = measured(capsys, out, "archive", "--data", tree)
    found = [(record["row"], record.get("workers")) for record in records]
    assert found == [("encode", None), ("decode", 0), ("decode, encode", 0)]
    measured(capsys, tmp_path / "y", "archive")  # a tree of its own
    call(bench, "archive", *QUICK, "--data", tree, "--out", out)
    assert len(out.read_text().splitlines()) == 6  # appended


@pytest.mark.slow
def test_startup(tmp_path, capsys):
    records = measured(capsys, tmp_path / "x", "startup")
    assert [record["row"] for record in records] == [
        *(f"{name}.py --help" for name in bench.SCRIPTS),
        "train.py, one step and a checkpoint",
        "train.py, resumed for one step more",
    ]
    for record in records:
        assert record["cpu_seconds"] > 0


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("read", ["--micro_batches", 0], "--micro_batches 0: must be above 0"),
        ("read", ["--workers", 1, -1], "--workers -1: must be 0 or above"),
        ("read", ["--seconds", "nan"], "--seconds nan: "),
        ("train", ["--accumulate", 0], "--accumulate 0: must be above 0"),
        ("train", ["--repeat", 0], "--repeat 0: must be above 0"),
        ("train", ["--compile", "off", "tunned"], "--compile invalid choice: 'tunned'"),
        ("train", ["--archive", "ARCHIVE"], ": latents of (48, 8, 8); --size tiny has (4, 4, 4)"),
        ("sample", ["--steps", 0], "--steps 0: "),
        ("all", ["--data", "none"], "none: no such folder"),
        ("read", ["--out", "file/x.jsonl"], "file/x.jsonl: could not be written"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, archive, name, argv, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    argv = [archive if word == "ARCHIVE" else word for word in argv]
    with pytest.raises(InputError) as error:
        call(bench, name, *QUICK, *argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "|" not in capsys.readouterr().out  # nothing was measured


# --------------------------------------------------------------- the fast path and the plain layers


def plain_group_norm(self, x):
    return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


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
    x = x + self.attn2(self.norm2(x), context)
    return x + self.ff(self.norm3(x))


def plain_transformer(self, x, context):
    """1x1 convolutions on contiguous memory."""
    h = self.proj_in(self.norm(x).contiguous())
    tokens = self.transformer_blocks[0](h.flatten(2).transpose(1, 2), context)
    return x + self.proj_out(tokens.transpose(1, 2).reshape(x.shape))


def test_the_fast_path_equals_plain_layers():
    """Output and every gradient, in float32.

    The fast path: group normalisation in channels-last memory; q, k and v in one product; cross
    attention without a softmax; linear layers for 1x1 convolutions.
    """
    unet, inputs = small_unet()
    reference = copy.deepcopy(unet)
    rivals.replace_forward(reference, model.GroupNorm, plain_group_norm)
    rivals.replace_forward(reference, model.Attention, plain_attention)
    rivals.replace_forward(reference, model.TransformerBlock, plain_block)
    rivals.replace_forward(reference, model.SpatialTransformer, plain_transformer)
    reference.requires_grad_(True)
    fast = output_and_gradients(unet.to(memory_format=torch.channels_last), inputs)
    plain = output_and_gradients(reference, inputs)
    skipped = [plain.pop(name) for name in plain.keys() - fast.keys()]
    assert skipped
    for gradient in skipped:  # what the shortcut skips gets none, except for rounding
        assert float(gradient.abs().max()) < 1e-6
    assert_equal(fast, plain)


@pytest.mark.parametrize("name", [name for name in rivals.VARIANTS if "Triton" not in name])
def test_variants_change_nothing_but_rounding(name):
    check_variant(name)


def test_triton_kernels_change_nothing_but_rounding():
    """By Triton's interpreter, which is chosen when triton is imported."""
    pytest.importorskip("triton", reason="comes with PyTorch for GPUs")
    code = "import test_bench; test_bench.check_variant('Triton GroupNorm')"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if "wrap_triton only works on" in done.stderr:
        pytest.skip("torch 2.6 does not take interpreted kernels")
    assert done.returncode == 0, done.stderr


def check_variant(name: str) -> None:
    """Output and gradients of the small UNet with the variant are those without it."""
    unet, inputs = small_unet()
    unet.to(memory_format=torch.channels_last)
    expected = output_and_gradients(unet, inputs)
    modules = {kind: module.forward for kind, module in unet.named_modules()}
    with rivals.VARIANTS[name](unet):
        assert_equal(output_and_gradients(unet, inputs), expected)
    changed = [kind for kind, module in unet.named_modules() if module.forward != modules[kind]]
    of_settings = ("plain", "cudnn.benchmark", "compiler thresholds")
    assert bool(changed) == (name not in of_settings)  # else it would measure the plain code
    assert not torch.backends.cudnn.benchmark


# The first stops before it generates code; inductor takes over a minute to compile even this.
BACKENDS = ["aot_eager_decomp_partition"]
if os.environ.get("LONG") and shutil.which("c++"):
    BACKENDS.append("inductor")


COMPILED = [
    "plain",
    pytest.param("bias with embedding", marks=pytest.mark.slow),
    pytest.param("expanded upsampling", marks=pytest.mark.slow),
    pytest.param("GroupNorm by channel", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(backend, name):
    unet, inputs = small_unet((1,), ())
    eager = output_and_gradients(unet, inputs)
    torch._dynamo.reset()
    with rivals.VARIANTS[name](unet):
        unet.compile(backend=backend, fullgraph=True)  # the graph has no breaks, either
        compiled = output_and_gradients(unet, inputs)
    torch._dynamo.reset()
    assert_equal(compiled, eager)


@pytest.mark.parametrize("mode", rivals.COMPILERS)
def test_compiling_in_place_keeps_the_names(mode):
    net = nn.Sequential(nn.Linear(2, 2))
    rivals.COMPILERS[mode](net)
    assert list(net.state_dict()) == ["0.weight", "0.bias"]
