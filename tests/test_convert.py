"""tools/convert.py: what it writes for other codebases, and what it refuses.

Round trips through diffusers are in test_pretrained.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import call

import pretrained
from lib.autoencoder import AutoencoderKL
from lib.cli import InputError
from model import NovelViewModel
from pretrained import ImageEncoder, SpaceToDepth
from tools import convert

AMALGAMATING = {"feature_dim": 8, "feature_tokens": 16, "latent_size": 8}


def small_model(**args) -> NovelViewModel:
    shape = {
        "cls_dim": 12,
        "context_dim": 16,
        "in_channels": 8,
        "model_channels": 32,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (),
    }
    return NovelViewModel(**{**shape, **args})


def amalgamating_model(weight: float) -> NovelViewModel:
    model = small_model(**AMALGAMATING)
    torch.nn.init.constant_(model.unet.amalgamation.weight, weight)
    return model


@pytest.fixture
def vae() -> AutoencoderKL:
    return AutoencoderKL(32, (1, 1), 1)


@pytest.fixture
def clip():
    """What the writers of diffusers' folders ask an encoder for: its name."""
    return SimpleNamespace(name=pretrained.CLIP)


@pytest.mark.parametrize(
    "write, out", [(convert.write_ldm, "x.ckpt"), (convert.write_diffusers, "x")]
)
@pytest.mark.parametrize(
    "kind, words",
    [
        ("amalgamating", "amalgamates patch features"),
        ("mlp", "takes its pose by an MLP"),
        ("v", r"eps \(not v\)"),
        ("pixels", r"codec \(not pixels\)"),
        ("dino", "conditioned on vit_tiny_patch16_224; .*its CLIP only"),
    ],
)
def test_what_others_cannot_represent_is_refused(tmp_path, vae, clip, write, out, kind, words):
    model = small_model()
    codec = vae
    encoder = clip
    if kind == "amalgamating":
        model = amalgamating_model(0.1)
    elif kind == "mlp":
        model = small_model(pose_embedding="mlp")
    elif kind == "v":
        model = small_model(prediction="v")
    elif kind == "pixels":
        codec = SpaceToDepth(2)
    elif kind == "dino":
        encoder = ImageEncoder("vit_tiny_patch16_224", "random", ())
    with pytest.raises(InputError, match=f"--ckpt: .*{words}") as info:
        write(tmp_path / out, model, codec, encoder)
    assert "\n" not in str(info.value)
    assert not list(tmp_path.iterdir())


def test_an_amalgamation_of_zeros_is_left_out(tmp_path, vae, clip):
    convert.write_diffusers(tmp_path / "x", amalgamating_model(0.0), vae, clip)
    names = pretrained.read_weights(tmp_path / "x")
    assert not any("amalgamation" in name for name in names)


def test_heads_are_kept_where_the_format_holds_them(tmp_path, vae, clip):
    model = small_model(num_heads=4)
    with pytest.raises(InputError, match="--ckpt: 4 attention heads"):
        convert.write_ldm(tmp_path / "x.ckpt", model, vae, clip)
    assert not list(tmp_path.iterdir())
    convert.write_diffusers(tmp_path / "folder", model, vae, clip)
    config = json.loads((tmp_path / "folder" / "unet" / "config.json").read_text())
    assert config["attention_head_dim"] == 4


def test_the_vaes_scale_is_kept(tmp_path, vae, clip):
    vae.scale = 0.25
    convert.write_diffusers(tmp_path, small_model(), vae, clip)
    assert pretrained.load_codec("sd", tmp_path).scale == 0.25


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_file_names_that_mislead_are_refused(suffix):
    with pytest.raises(InputError, match=f"--out x{suffix}: "):
        call(convert, "--ckpt", "none", "--out", f"x{suffix}")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, vae, clip):
    (tmp_path / "file").touch()
    words = "file/unet/diffusion_pytorch_model.safetensors: could not be written"
    with pytest.raises(InputError, match=words):
        convert.write_diffusers(tmp_path / "file", small_model(), vae, clip)


def test_half_the_size_gives_nearly_the_same_model(run, tmp_path, capsys):
    out = tmp_path / "half.safetensors"
    call(convert, "--ckpt", run, "--out", out)
    whole = run / (run / "latest").read_text() / "model.safetensors"
    assert out.stat().st_size < 0.6 * whole.stat().st_size
    model, encoder, _, meta = pretrained.load_checkpoint(str(out))
    exact, exact_encoder, _, exact_meta = pretrained.load_checkpoint(str(run))
    assert meta["step"] == exact_meta["step"]
    assert Path(exact_meta["args"]["archive"]).is_absolute()
    assert (meta["args"]["archive"], meta["args"]["out"]) == ("archive", "run")
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    capsys.readouterr()
    pretrained.check_init(exact, str(out), exact_encoder.spec())
    assert not capsys.readouterr().out  # the encoder is the same one, rounded
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(encoder(image)[1], exact_encoder(image)[1], atol=0.05, rtol=0.05)


def test_half_of_another_format_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="not a checkpoint of ours"):
        call(convert, "--ckpt", tmp_path / "x.ckpt", "--out", tmp_path / "y.safetensors")


def test_a_pose_that_the_format_cannot_name_is_said(tmp_path, vae, clip, monkeypatch, capsys):
    """As Stable Zero123's: its readers must be told."""

    def load(path, device, encoder_weights, vae_source, pose):
        return small_model(pose_encoding=pose or "zero123"), clip, vae, {}

    monkeypatch.setattr(pretrained, "load_checkpoint", load)
    call(convert, "--ckpt", "stable.ckpt", "--out", tmp_path / "a", "--pose", "elevation")
    assert "note: " in capsys.readouterr().out
    call(convert, "--ckpt", "zero123.ckpt", "--out", tmp_path / "b")
    assert "note: " not in capsys.readouterr().out
