"""Frozen networks and foreign checkpoints, against diffusers and transformers on the same weights.

FULL_SIZE=1 adds Stable Diffusion 1.x's full size (minutes, 16 GB).
"""

import collections
import copy
import json
import os
import pathlib
import pickle
import shutil
import socket
import sys
import time
import types
import typing
import zipfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL as TheirVAE
from diffusers import UNet2DConditionModel
from helpers import call
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

import pretrained
import sample
from lib import checkpoints, formats
from lib.autoencoder import AutoencoderKL, load_autoencoder
from lib.cli import InputError
from lib.formats import PREFIX, to_ldm, unet_names, vae_names
from model import NovelViewModel, UNet, make_pose_mlp
from pretrained import ImageEncoder, SpaceToDepth
from tools import convert

SMALL_UNET = {
    "in_channels": 8,
    "model_channels": 64,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (1,),
    "context_dim": 16,
}
AMALGAMATING = {"feature_dim": 8, "feature_tokens": 16, "latent_size": 8}
CLIP_ARGS = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "img_size": 56,
    "patch_size": 14,
    "num_classes": 20,
}
DINO_ARGS = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 126}
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
FULL = pytest.param(
    True, marks=pytest.mark.skipif("FULL_SIZE" not in os.environ, reason="FULL_SIZE is not set")
)


def their_unet(full: bool = False) -> UNet2DConditionModel:
    if full:
        return UNet2DConditionModel(in_channels=8, cross_attention_dim=768)
    return UNet2DConditionModel(
        in_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
    )


def their_vae(full: bool = False) -> TheirVAE:
    widths = (128, 256, 512, 512) if full else (64, 128)
    return TheirVAE(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2 if full else 1,
    )


def their_clip() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        projection_dim=20,
    )
    return randomize(CLIPVisionModelWithProjection(config)).eval()


def their_dinov2(registers: int = 0):
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 126,
        "patch_size": 14,
    }
    if registers:
        config = Dinov2WithRegistersConfig(num_register_tokens=registers, **size)
        return randomize(Dinov2WithRegistersModel(config)).eval()
    return randomize(Dinov2Model(Dinov2Config(**size))).eval()


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that keep activations near 1, none of them zero or one: every tensor matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.copy_(0.5 + 0.1 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
    return module


def small_model(**args) -> NovelViewModel:
    return randomize(NovelViewModel(cls_dim=12, **{**SMALL_UNET, **args}))


def small_clip() -> ImageEncoder:
    """A random CLIP of few layers, with the name that tools.convert asks for."""
    torch.manual_seed(0)
    state = timm.create_model(pretrained.CLIP, **CLIP_ARGS).state_dict()
    return ImageEncoder(pretrained.CLIP, state, (), 56, **CLIP_ARGS)


def ldm_tensors() -> dict[str, torch.Tensor]:
    """A small zero123 checkpoint without EMA and CLIP."""
    model = small_model()
    vae = randomize(AutoencoderKL(64, (1, 2), 1))
    tensors = {}
    for part, module in (
        ("unet", model.unet),
        ("cc_projection", model.cc_projection),
        ("vae", vae),
    ):
        tensors.update(with_prefix(PREFIX[part], module.state_dict()))
    return tensors


def with_prefix(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def part_of(tensors: dict, part: str) -> dict:
    """The tensors of a part of an LDM checkpoint, without the prefix."""
    return pretrained.with_prefix(tensors, PREFIX[part])


def diffusers_unet(tensors: dict) -> dict:
    """The UNet of an LDM checkpoint under diffusers' names."""
    unet = part_of(tensors, "unet")
    return {theirs: unet[ours] for ours, theirs in unet_names(unet).items()}


def write_folder(folder, tensors: dict, name: str = "diffusion_pytorch_model.safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)


def ema_names(tensors: dict) -> dict:
    """{name of a UNet's tensor: LitEma's name of its average}."""
    names = {}
    for name in tensors:
        if name.startswith(PREFIX["unet"]):
            names[name] = "model_ema." + name.removeprefix("model.").replace(".", "")
    return names


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def gradient_error(ours: torch.nn.Module, theirs: torch.nn.Module, names: dict[str, str]) -> float:
    """Worst relative error of a tensor's gradient.

    Gradients that are zero up to rounding count against the norm of all.
    """
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    squares = [gradient.square().sum() for gradient in expected.values() if gradient is not None]
    floor = 1e-3 * sum(squares) ** 0.5
    errors = []
    for name, p in ours.named_parameters():
        if p.grad is not None:
            gradient = expected[names[name]]
            difference = p.grad.reshape(gradient.shape) - gradient
            errors.append(float(difference.norm() / gradient.norm().clamp(min=floor)))
    assert len(errors) > 50
    return max(errors)


# --------------------------------------------------------------------------- parity with diffusers


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("full", [False, FULL])
def test_unet_equals_diffusers(full, dtype, bound):
    theirs = randomize(their_unet(full)).to(dtype)
    ours = (UNet() if full else UNet(**SMALL_UNET)).to(dtype)
    ours.time_embed.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
    names = unet_names(theirs.state_dict(), back=True)
    ours.load_state_dict({names[k]: v for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 8, 16, 16).to(dtype)
    t = torch.tensor([3, 977])
    context = torch.randn(2, 1, 768 if full else 16).to(dtype)
    gradients = not full or dtype == torch.float32  # float64 gradients at full size take 28 GB
    with torch.set_grad_enabled(gradients):
        a = ours(x, t, context)
        b = theirs(x, t, context).sample
    assert error(a, b) < bound
    if gradients:
        a.square().mean().backward()
        b.square().mean().backward()
        assert gradient_error(ours, theirs, unet_names(ours.state_dict())) < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("full", [False, FULL])
def test_autoencoder_equals_diffusers(full, dtype, bound):
    theirs = randomize(their_vae(full)).to(dtype)
    ours = load_autoencoder(to_ldm(theirs.state_dict())).to(dtype)  # it infers the size
    assert (ours.channels, ours.factor, ours.scale) == (4, 8 if full else 2, 0.18215)
    ours = ours.requires_grad_(True)
    image = (torch.rand(1, 3, 32, 32) * 2 - 1).to(dtype)
    mean, logvar = ours.encode(image)
    posterior = theirs.encode(image).latent_dist
    assert error(mean, posterior.mean) < bound
    assert error(logvar, posterior.logvar) < bound
    a = ours.decode(mean)
    b = theirs.decode(posterior.mean).sample
    assert error(a, b) < bound
    a.square().mean().backward()
    b.square().mean().backward()
    assert gradient_error(ours, theirs, vae_names(ours.state_dict())) < bound


@pytest.mark.slow
def test_full_size_names_and_shapes_equal_diffusers():
    with torch.device("meta"):
        unet = UNet()
        pairs = (
            (unet, their_unet(True), unet_names),
            (AutoencoderKL(), their_vae(True), vae_names),
        )
    for ours, theirs, rename in pairs:
        names = rename(ours.state_dict())
        sizes = {names[k]: v.numel() for k, v in ours.state_dict().items()}
        expected = {k: v.numel() for k, v in theirs.state_dict().items()}
        assert sizes == expected
        assert set(rename(expected, back=True).values()) == set(ours.state_dict())
    assert sum(p.numel() for p in unet.parameters()) == 859_532_484


def test_old_diffusers_attention_names():
    theirs = randomize(their_vae()).state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in theirs.items():
        old_name = name
        for new, before in old.items():
            old_name = old_name.replace(f".{new}.", f".{before}.")
        renamed[old_name] = tensor
    assert set(renamed) != set(theirs)
    assert same(to_ldm(renamed), to_ldm(theirs))


# ------------------------------------------------------------------------------------------ codecs


def test_space_to_depth_is_lossless():
    codec = SpaceToDepth(4)
    image = torch.rand(2, 3, 32, 24) * 2 - 1
    mean, logvar = codec.encode(image)
    assert mean.shape == logvar.shape == (2, codec.channels, 8, 6)
    assert (logvar == -30).all()
    assert torch.equal(codec.decode(mean), image)


def test_hash_depends_on_values_names_and_types_only(tmp_path):
    tensors = {"b": torch.randn(3, 2), "a": torch.tensor(1)}
    expected = checkpoints.tensor_hash(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save({"a": tensors["a"], "b": tensors["b"]}, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        assert checkpoints.tensor_hash(formats.read_tensors(tmp_path / name)) == expected
    for other in (
        {**tensors, "a": torch.tensor(2)},
        {**tensors, "a": torch.tensor(1.0)},
        {"b": tensors["b"], "c": tensors["a"]},
    ):
        assert checkpoints.tensor_hash(other) != expected


def write_vae_folder(folder, scaling_factor) -> None:
    write_folder(folder, randomize(their_vae()).state_dict())
    config = {"_class_name": "AutoencoderKL", "scaling_factor": scaling_factor}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_vae_folder_brings_its_own_scale(tmp_path, capsys):
    """As a folder of its own, in a pipeline, or by its weights file. Training with it says so."""
    write_vae_folder(tmp_path / "sd" / "vae", 0.25)
    file = tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    for source in (tmp_path / "sd", tmp_path / "sd" / "vae", file):
        assert pretrained.load_codec("sd", source).scale == 0.25
    shutil.copy(file, tmp_path / "alone.safetensors")
    assert pretrained.load_codec("sd", tmp_path / "alone.safetensors").scale == 0.18215

    args = types.SimpleNamespace(
        codec="sd",
        vae=str(tmp_path / "sd"),
        pixels_factor=4,
        image_size=32,
        encoder="vit_tiny_patch16_224",
        weights="random",
        layers=[],
        encoder_size=32,
        compile=False,
    )
    _, codec = pretrained.open_frozen(args, torch.device("cpu"))
    assert codec.scale == 0.25
    assert f"--vae {tmp_path}/sd: latents are multiplied by its own scaling_factor 0.25" in (
        capsys.readouterr().out
    )

    # A checkpoint's model knows the scale that it was trained with, whatever holds the VAE now.
    spec = pretrained.codec_spec(codec)
    assert pretrained.open_codec(spec, tmp_path / "alone.safetensors").scale == 0.25
    spec["scale"] = 0.18215
    assert pretrained.open_codec(spec).scale == 0.18215

    for bad in ("x", 0, float("nan")):
        (tmp_path / "sd" / "vae" / "config.json").write_text(json.dumps({"scaling_factor": bad}))
        with pytest.raises(InputError, match="vae/config.json: scaling_factor"):
            pretrained.load_codec("sd", tmp_path / "sd")


# ----------------------------------------------------------------------------------- image encoder


def test_clip_embedding_equals_transformers(tmp_path):
    theirs = their_clip()
    theirs.save_pretrained(tmp_path / "image_encoder")
    args = {"layers": (0, 2), "image_size": 56, **CLIP_ARGS}
    encoder = ImageEncoder(pretrained.CLIP, str(tmp_path), **args)
    image = torch.rand(2, 3, 72, 72) * 2 - 1
    x = F.interpolate(image, (56, 56), mode="bicubic", align_corners=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        expected = theirs(((x + 1) / 2 - mean) / std, output_hidden_states=True)
    cls, patch = encoder(image)
    assert error(cls, expected.image_embeds) < 1e-5
    hidden = [F.layer_norm(expected.hidden_states[i + 1][:, 1:], (32,)) for i in (0, 2)]
    assert error(patch, torch.cat(hidden, dim=2)) < 1e-5
    assert (encoder.cls_dim, encoder.feature_dim, encoder.tokens) == (20, 64, 16)

    # The same weights from LDM checkpoints, in OpenAI's names and in transformers', beside CLIP's
    # text parts; and from a file of transformers' whole CLIP.
    openai = convert.clip_to_openai(encoder.vit.state_dict())
    text = {"text_model.final_layer_norm.weight": torch.ones(8)}
    published = load_file(tmp_path / "image_encoder" / "model.safetensors")
    for tensors in (
        with_prefix("cond_stage_model.model.", {**openai, "logit_scale": torch.ones(())}),
        with_prefix("cond_stage_model.transformer.", {**published, **text}),
        {**published, **text},
    ):
        torch.save({"state_dict": tensors}, tmp_path / "z.ckpt")
        again = ImageEncoder(pretrained.CLIP, str(tmp_path / "z.ckpt"), **args)
        assert again.spec()["sha256"] == encoder.spec()["sha256"]
        assert torch.equal(again(image)[0], cls)


def meta_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DINOv2 as transformers publishes it -> as Meta does."""
    translation = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.": "",
        "encoder.layer.": "blocks.",
        "attention.attention.query": "attn.qkv",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "layernorm": "norm",
    }
    result = {}
    for name, tensor in tensors.items():
        meta_name = name
        for theirs, metas in translation.items():
            meta_name = meta_name.replace(theirs, metas)
        if ".query." in name:
            key = tensors[name.replace("query", "key")]
            value = tensors[name.replace("query", "value")]
            result[meta_name] = torch.cat([tensor, key, value])
        elif ".key." not in name and ".value." not in name:
            result[meta_name] = tensor
    return result


def dinov2_input(image: torch.Tensor) -> torch.Tensor:
    x = F.interpolate(image, (56, 56), mode="bicubic", antialias=True)
    return ((x + 1) / 2 - IMAGENET_MEAN) / IMAGENET_STD


@pytest.mark.parametrize("names", ["meta", "transformers"])
def test_dinov2_features_equal_transformers(tmp_path, names):
    """At a size that needs the position embeddings resampled, 9x9 -> 4x4."""
    theirs = their_dinov2()
    theirs.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    assert {"embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight"} < set(
        published
    )
    source = str(tmp_path)
    if names == "meta":
        source = str(tmp_path / "dinov2.pth")
        torch.save(meta_names(published), source)
    encoder = ImageEncoder(pretrained.DINOV2, source, (0, 2), image_size=56, **DINO_ARGS)
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = theirs(dinov2_input(image), output_hidden_states=True)
    cls, patch = encoder(image)
    assert patch.shape == (2, 16, 64)
    for i, layer in enumerate((0, 2)):
        hidden = F.layer_norm(expected.hidden_states[layer + 1][:, 1:], (32,))
        assert error(patch[..., 32 * i : 32 * (i + 1)], hidden) < 1e-5
    assert error(cls, F.layer_norm(expected.pooler_output, (32,))) < 1e-5

    # A PCA projects what is otherwise the same. No layers, no patch features.
    pca = {"mean": torch.randn(64), "components": torch.randn(64, 5)}
    saved = encoder.vit.state_dict()
    projected = ImageEncoder(pretrained.DINOV2, saved, (0, 2), 56, pca, **DINO_ARGS)
    assert error(projected(image)[1], (patch - pca["mean"]) @ pca["components"]) < 1e-5
    assert projected.feature_dim == 5
    bare = ImageEncoder(pretrained.DINOV2, source, (), 56, **DINO_ARGS)
    bare_cls, bare_patch = bare(image)
    assert bare_patch is None and bare.feature_dim == 0
    assert torch.equal(bare_cls, cls)


def test_dinov2_with_registers_equals_transformers(tmp_path):
    theirs = their_dinov2(registers=4)
    theirs.save_pretrained(tmp_path)
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    args = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 126}
    encoder = ImageEncoder(name, str(tmp_path), (2,), image_size=126, **args)
    image = torch.rand(2, 3, 126, 126) * 2 - 1
    with torch.no_grad():
        expected = theirs(((image + 1) / 2 - IMAGENET_MEAN) / IMAGENET_STD)
    cls, _ = encoder(image)
    assert error(cls, F.layer_norm(expected.pooler_output, (32,))) < 1e-5


@pytest.mark.parametrize(
    "args, words",
    [
        (("no_such_model",), "--encoder no_such_model"),
        (("resnet18",), "--encoder resnet18"),
        (("vit_base_patch16_clip_224.openai_ft_in1k",), "_ft_in1k: finetuned to classes"),
        (("vit_tiny_patch16_224", "random", (5, 12)), "0 to 11"),
        (("vit_tiny_patch16_224", "random", (5,), 100), "--encoder_size 100"),
        (("vit_tiny_patch16_224", "other.safetensors", (5,)), "no vit_tiny_patch16_224 in it"),
        (("vit_tiny_patch16_224", "absent.pth", (5,)), "no such file"),
        (("vit_tiny_patch16_224", {"x": torch.zeros(1)}, (5,)), "of another encoder"),
        (
            (pretrained.DINOV2, "pretrained"),
            "timm/vit_large_patch14_dinov2.lvd142m .*model.safetensors.*--weights",
        ),
    ],
)
def test_encoder_mistakes_are_one_line(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(InputError, match=words) as info:
        ImageEncoder(*args)
    assert "\n" not in str(info.value)


def test_random_encoder_warns_and_can_be_saved_whole(capsys):
    encoder = ImageEncoder("vit_tiny_patch16_224", "random", (5, 11), image_size=64)
    assert "WARNING" in capsys.readouterr().out
    saved, pca = pretrained.split_own(pretrained.own_tensors(encoder))
    assert pca is None
    again = ImageEncoder("vit_tiny_patch16_224", saved, (5, 11), image_size=64)
    image = torch.rand(1, 3, 64, 64)
    for a, b in zip(encoder(image), again(image), strict=True):
        assert torch.equal(a, b)
    assert encoder.spec()["sha256"] == again.spec()["sha256"]
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("kind, warned", [("clip", True), ("clip_quickgelu", False)])
def test_clip_with_another_activation_than_its_weights_is_warned_of(tmp_path, capsys, kind, warned):
    name = f"vit_base_patch32_{kind}_224.metaclip_400m"
    small = {"embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 8}
    save_file(timm.create_model(name, **small).state_dict(), tmp_path / "x.safetensors")
    ImageEncoder(name, str(tmp_path / "x.safetensors"), (), **small)
    text = "WARNING: the weights want QuickGELU: --encoder vit_base_patch32_clip_quickgelu_224"
    assert (text in capsys.readouterr().out) == warned


# ------------------------------------------------------------------- formats: the published layouts


def test_round_trip_is_bit_for_bit(tmp_path):
    """LDM -> ours -> diffusers, opened and saved by diffusers itself -> ours -> LDM."""
    tensors = ldm_tensors()
    torch.save({"state_dict": tensors}, tmp_path / "ldm.ckpt")
    encoder = small_clip()
    weights = pretrained.read_weights(tmp_path / "ldm.ckpt")
    model = NovelViewModel(cls_dim=12, **SMALL_UNET)
    pretrained.load_pretrained(model, weights)
    convert.write_diffusers(tmp_path / "hf", model, load_autoencoder(weights), encoder)
    for folder, kind in (("unet", UNet2DConditionModel), ("vae", TheirVAE)):
        opened, info = kind.from_pretrained(tmp_path / "hf" / folder, output_loading_info=True)
        assert not any(info.values())
        opened.save_pretrained(tmp_path / "hf" / folder)
    x = torch.randn(1, 8, 8, 8)
    t = torch.tensor([500])
    context = torch.randn(1, 1, 16)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "hf" / "unet")  # by its config.json
    assert error(unet(x, t, context).sample, model.unet(x, t, context)) < 1e-5

    again = pretrained.read_weights(tmp_path / "hf")
    assert same(again, tensors)
    reread = NovelViewModel(cls_dim=12, **SMALL_UNET)
    pretrained.load_pretrained(reread, again)
    convert.write_ldm(tmp_path / "zero123.ckpt", reread, load_autoencoder(again), encoder)
    written = torch.load(tmp_path / "zero123.ckpt", weights_only=True)["state_dict"]
    assert same({name: v for name, v in written.items() if name in tensors}, tensors)
    beside = set()
    for name in written:
        if name not in tensors and not name.startswith("cond_stage_model.model.visual."):
            beside.add(name)
    expected = set(ema_names(tensors).values())
    assert beside == expected | {"model_ema.decay", "model_ema.num_updates"}
    reopened = ImageEncoder(pretrained.CLIP, str(tmp_path / "zero123.ckpt"), (), 56, **CLIP_ARGS)
    assert reopened.spec()["sha256"] == encoder.spec()["sha256"]


def test_every_container_reads_alike(tmp_path):
    tensors = ldm_tensors()
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.ckpt")
    old_style = {"state_dict": tensors, "global_step": 5}
    torch.save(old_style, tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.ckpt", "b.ckpt"):
        assert same(pretrained.read_weights(tmp_path / name), tensors)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    tensors = ldm_tensors()
    torch.save({"state_dict": with_prefix(prefix, tensors)}, tmp_path / "ldm.ckpt")
    assert same(pretrained.read_weights(tmp_path / "ldm.ckpt"), tensors)
    write_folder(tmp_path / "hf" / "unet", with_prefix(prefix, diffusers_unet(tensors)))
    read = pretrained.read_weights(tmp_path / "hf", ("unet",))
    assert same(part_of(read, "unet"), part_of(tensors, "unet"))


def test_one_model_alone_is_told_by_its_names(tmp_path):
    """A UNet in diffusers' names or LDM's without prefix, convolutions as linear layers; a VAE."""
    tensors = ldm_tensors()
    unet = part_of(tensors, "unet")
    linear = {}
    for name, tensor in diffusers_unet(tensors).items():
        convolution = name.endswith(("proj_in.weight", "proj_out.weight"))
        linear[name] = tensor.flatten(1) if convolution else tensor
    save_file(linear, tmp_path / "diffusers.safetensors")
    save_file(unet, tmp_path / "bare.safetensors")
    for name in ("diffusers", "bare"):
        model = NovelViewModel(cls_dim=12, **SMALL_UNET)
        pretrained.load_pretrained(model, pretrained.read_weights(tmp_path / f"{name}.safetensors"))
        assert same(model.unet.state_dict(), unet)

    vae = part_of(tensors, "vae")
    torch.save({"state_dict": {**vae, "loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    save_file(tensors, tmp_path / "all.safetensors")
    alone = pretrained.load_codec("sd", tmp_path / "vae.ckpt")
    assert same(alone.state_dict(), vae)
    together = pretrained.load_codec("sd", tmp_path / "all.safetensors")
    assert pretrained.codec_spec(alone)["sha256"] == pretrained.codec_spec(together)["sha256"]


def test_of_a_models_variants_the_plain_one_is_read(tmp_path):
    unet = diffusers_unet(ldm_tensors())
    half = {name: tensor.half() for name, tensor in unet.items()}
    write_folder(tmp_path / "unet", half, "diffusion_pytorch_model.fp16.safetensors")
    name = PREFIX["unet"] + "out.0.weight"
    assert pretrained.read_weights(tmp_path)[name].dtype == torch.float16
    write_folder(tmp_path / "unet", half, "diffusion_pytorch_model.non_ema.safetensors")
    write_folder(tmp_path / "unet", unet)
    assert pretrained.read_weights(tmp_path)[name].dtype == torch.float32


def write_shards(folder, tensors: dict, stem: str, shards: int) -> list:
    """As diffusers and transformers write them: numbered files and their index."""
    files = [f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = files[i % shards]
    for file in files:
        write_folder(folder, {n: tensors[n] for n, f in weight_map.items() if f == file}, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return [folder / file for file in files]


def test_shards_are_read_together(tmp_path):
    tensors = ldm_tensors()
    files = write_shards(
        tmp_path / "unet", diffusers_unet(tensors), "diffusion_pytorch_model", shards=3
    )
    read = pretrained.read_weights(tmp_path, ("unet",))
    assert same(part_of(read, "unet"), part_of(tensors, "unet"))
    with pytest.raises(InputError, match=f"{files[1].name}: one of several shards; give their"):
        pretrained.read_weights(files[1])
    files[1].unlink()
    with pytest.raises(InputError, match="one of 3 shards, only 2 are in its folder"):
        pretrained.read_weights(tmp_path, ("unet",))

    clip = their_clip()
    clip.save_pretrained(tmp_path / "one" / "image_encoder")
    clip.save_pretrained(tmp_path / "many" / "image_encoder", max_shard_size="20KB")
    assert len(list((tmp_path / "many" / "image_encoder").glob("*.safetensors"))) > 2
    one = pretrained.read_weights(tmp_path / "one", ("image_encoder",))
    assert same(pretrained.read_weights(tmp_path / "many", ("image_encoder",)), one)


@pytest.mark.parametrize(
    "folder, prefix", [("cc_projection", "projection."), ("clip_camera_projection", "proj.")]
)
def test_the_pose_projection_of_both_diffusers_conversions(tmp_path, folder, prefix):
    """zero123-hf's and zero123-xl-diffusers'; the latter publishes half precision only."""
    tensors = ldm_tensors()
    projection = part_of(tensors, "cc_projection")
    half = {name: tensor.half() for name, tensor in with_prefix(prefix, projection).items()}
    write_folder(tmp_path / folder, half, "diffusion_pytorch_model.fp16.safetensors")
    write_folder(tmp_path / "unet", diffusers_unet(tensors))
    read = pretrained.read_weights(tmp_path)
    for name, tensor in projection.items():
        assert torch.equal(read[PREFIX["cc_projection"] + name], tensor.half())
    args = formats.infer_args(read, tmp_path)
    assert (args["cls_dim"], args["context_dim"]) == (12, 16)


class Forbidden:
    """Its pickle cannot be read: what asks for it shows that the file was opened."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_accelerates_checkpoint_folder(tmp_path, suffix):
    """zero123-hf's training saves its two models by number, beside the optimiser."""
    tensors = ldm_tensors()
    tensors = {name: v for name, v in tensors.items() if not name.startswith(PREFIX["vae"])}
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    models = [
        diffusers_unet(tensors),
        with_prefix("projection.", part_of(tensors, "cc_projection")),
    ]
    for number, state in enumerate(models):
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        file = folder / f"{stem}{f'_{number}' if number else ''}.{suffix}"
        if suffix == "safetensors":
            save_file(state, file)
        else:
            torch.save(state, file)
    for name in ("optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl"):
        torch.save({"state": Forbidden()}, folder / name)
    assert same(pretrained.read_weights(folder), tensors)
    with pytest.raises(InputError, match="CLIP"):  # found, and only CLIP is missing
        pretrained.load_checkpoint(folder, vae=str(tmp_path / "absent.ckpt"))


def test_accelerates_checkpoint_with_an_ema_folder(tmp_path, capsys):
    """diffusers' own training scripts save unet/ and unet_ema/."""
    raw = diffusers_unet(ldm_tensors())
    write_folder(tmp_path / "unet", raw)
    write_folder(tmp_path / "unet_ema", {name: tensor + 1 for name, tensor in raw.items()})
    torch.save({"state": Forbidden()}, tmp_path / "optimizer.bin")
    read = diffusers_unet(pretrained.read_weights(tmp_path))
    assert all(torch.equal(read[name], tensor + 1) for name, tensor in raw.items())
    assert "taking the UNet's EMA of unet_ema/" in capsys.readouterr().out


def fake_class(path: str, *bases, **members) -> type:
    """A class that pickle writes as `path`. Its modules must be importable while it is written."""
    module, name = path.rsplit(".", 1)
    return type(name, bases, {"__module__": module, **members})


def register(patch, *classes) -> None:
    """Makes the modules of the classes importable."""
    for kind in classes:
        parts = kind.__module__.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            if name not in sys.modules:
                patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules[kind.__module__], kind.__name__, kind, raising=False)


def lightning_leftovers(patch) -> dict:
    """What Lightning and OmegaConf keep beside the tensors, by fakes of their classes' names."""
    checkpoint = fake_class("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    old_dict = fake_class("pytorch_lightning.utilities.parsing.AttributeDict", dict)
    new_dict = fake_class("lightning.fabric.utilities.data.AttributeDict", dict)
    metadata = fake_class("omegaconf.base.ContainerMetadata")
    node = fake_class("omegaconf.nodes.AnyNode")
    dict_config = fake_class("omegaconf.dictconfig.DictConfig")
    list_config = fake_class("omegaconf.listconfig.ListConfig")
    register(patch, checkpoint, old_dict, new_dict, metadata, node, dict_config, list_config)

    described = metadata()
    described.__dict__.update(object_type=dict, ref_type=typing.Any, key_type=str)
    leaf = node()
    leaf.__dict__.update(_val=3, _parent=None, _metadata=described)
    options = list_config()
    options.__dict__.update(_content=[leaf], _metadata=described)
    config = dict_config()
    config.__dict__.update(_content={"a": leaf, "b": options}, _metadata=described)
    return {
        "epoch": 3,
        "callbacks": {checkpoint: {"best_model_score": torch.ones(()), "path": "a.ckpt"}},
        "hyper_parameters": old_dict(lr=1e-4, config=config),
        "datamodule": new_dict(root=pathlib.Path("/data"), other=pathlib.PureWindowsPath("c:/x")),
        "loops": collections.defaultdict(int, {"a": 1}),
        "more": collections.defaultdict(list, {"a": [1]}),
        "lr_schedulers": [
            {
                "base_lrs": [np.float64(1e-4)],
                "_last_lr": [np.arange(3)],
                "dtype": np.dtype("float32"),
            }
        ],
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.zeros(2)}}}],
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_lightning_leftovers_load_without_lightning(tmp_path, zipped):
    tensors = {"model.diffusion_model.x": torch.ones(2)}
    path = tmp_path / "x.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        checkpoint = {"state_dict": tensors, **lightning_leftovers(patch)}
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    assert same(pretrained.read_weights(path), tensors)


# ------------------------------------------------------------------------ filling a model from them


def test_init_extends_conv_in_takes_the_ema_and_reports(tmp_path, capsys):
    tensors = ldm_tensors()
    tensors = {name: v for name, v in tensors.items() if not name.startswith("cc_projection.")}
    conv_in = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[conv_in] = tensors[conv_in][:, :4].clone()
    ema = {shadow: tensors[name] + 1 for name, shadow in ema_names(tensors).items()}
    save_file({**tensors, **ema}, tmp_path / "x.safetensors")
    model = small_model(**AMALGAMATING)
    before = copy.deepcopy(model.state_dict())
    pretrained.load_pretrained(model, pretrained.read_weights(tmp_path / "x.safetensors"))
    assert torch.equal(model.unet.input_blocks[0][0].weight[:, :4], tensors[conv_in] + 1)
    assert not model.unet.input_blocks[0][0].weight[:, 4:].any()
    assert torch.equal(model.unet.out[0].weight, tensors[PREFIX["unet"] + "out.0.weight"] + 1)
    for name in ("cc_projection.weight", "unet.amalgamation.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    out = capsys.readouterr().out
    for words in (
        f"taking the EMA (model_ema.*) of {len(ema)} of the UNet's {len(ema)} tensors",
        "extended unet.input_blocks.0.0.weight",
        "3 tensors missing, left as initialised",
        "100.0% of",
        "amalgamation.weight",
        "cc_projection.weight",
        "cc_projection.bias",
    ):
        assert words in out


def test_a_partial_ema_is_taken_as_far_as_it_goes(tmp_path, capsys):
    """Some finetuning averages the attention alone."""
    tensors = ldm_tensors()
    averaged = {name: s for name, s in ema_names(tensors).items() if ".attn" in name}
    ema = {shadow: tensors[name] + 1 for name, shadow in averaged.items()}
    strange = {"model.diffusion_model.strange": torch.zeros(1)}
    save_file({**tensors, **ema, **strange}, tmp_path / "x.safetensors")
    read = pretrained.read_weights(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor + 1 if name in averaged else tensor)
    total = len(ema_names(tensors)) + 1
    assert f"EMA (model_ema.*) of {len(ema)} of the UNet's {total} tensors" in (
        capsys.readouterr().out
    )
    pretrained.load_pretrained(small_model(), read)
    assert "left over, unused: unet.strange" in capsys.readouterr().out


def test_init_from_another_encoder_or_another_prediction(run, capsys):
    """Of another encoder amalgamation and cc_projection stay as initialised.

    What shapes don't show is refused.
    """
    meta, _, theirs = pretrained.read_model(pretrained.find_weights(run))
    weights = pretrained.read_weights(run)
    args = {**theirs.args, "cls_dim": 12, "feature_dim": 8}
    ours = NovelViewModel(**args)
    before = copy.deepcopy(ours.state_dict())
    pretrained.load_pretrained(ours, weights)
    out = capsys.readouterr().out
    for words in ("unet.amalgamation.* left as", "cc_projection.* left as", "100.0% of"):
        assert words in out
    for name, value in ours.state_dict().items():
        other = "amalgamation" in name or "cc_projection" in name
        assert torch.equal(value, before[name] if other else theirs.state_dict()[name]), name

    pretrained.check_init(ours, str(run), meta["encoder"])
    assert not capsys.readouterr().out
    pretrained.check_init(ours, str(run), {**meta["encoder"], "layers": [1]})
    assert "another image encoder, or other layers" in capsys.readouterr().out
    other_pose = NovelViewModel(**{**args, "pose_encoding": "elevation"})
    pretrained.check_init(other_pose, str(run), meta["encoder"])
    assert "another pose encoding than --pose asks for" in capsys.readouterr().out
    for key, value in (("prediction", "eps"), ("num_heads", 8)):
        model = NovelViewModel(**{**args, key: value})
        with pytest.raises(InputError, match=f"--init .*its {key} is"):
            pretrained.check_init(model, str(run), meta["encoder"])


def test_a_run_with_a_pose_mlp_is_a_beginning_for_another(tmp_path):
    theirs = randomize(NovelViewModel(cls_dim=12, pose_embedding="mlp", **SMALL_UNET))
    checkpoints.save_model(tmp_path / "model.safetensors", theirs, {"step": 1}, {})
    ours = NovelViewModel(cls_dim=12, pose_embedding="mlp", **SMALL_UNET)
    weights = pretrained.read_weights(tmp_path, ("unet", "cc_projection"))
    pretrained.load_pretrained(ours, weights)
    assert same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("theirs_has_more", [False, True])
def test_a_pose_mlp_of_other_layers_is_refused(tmp_path, monkeypatch, theirs_has_more):
    """One layer would be taken for another of its shape: an earlier version had one more."""

    def deeper(width: int) -> torch.nn.Sequential:
        first, act, last = make_pose_mlp(width)
        return torch.nn.Sequential(first, act, torch.nn.Linear(width, width), act, last)

    ours = NovelViewModel(cls_dim=12, pose_embedding="mlp", **SMALL_UNET)
    with monkeypatch.context() as patch:
        patch.setattr("model.make_pose_mlp", deeper)
        theirs = NovelViewModel(cls_dim=12, pose_embedding="mlp", **SMALL_UNET)
    if not theirs_has_more:
        ours, theirs = theirs, ours
    checkpoints.save_model(tmp_path / "model.safetensors", randomize(theirs), {"step": 1}, {})
    before = copy.deepcopy(ours.state_dict())
    weights = pretrained.read_weights(tmp_path, ("unet", "cc_projection"))
    with pytest.raises(InputError, match="--init: its pose MLP has other layers .*pose_mlp.4"):
        pretrained.load_pretrained(ours, weights)
    assert same(ours.state_dict(), before)


def test_init_refuses_an_uncovered_unet_and_changes_nothing():
    tensors = ldm_tensors()
    model = small_model()
    torch.nn.init.zeros_(model.unet.out[0].weight)
    before = copy.deepcopy(model.state_dict())
    sparse = {name: v for name, v in tensors.items() if "output_blocks" not in name}
    wrong = {**tensors, "model.diffusion_model.out.2.weight": torch.zeros(9, 64, 3, 3)}
    for weights, words in (
        (sparse, r"--init: holds \d+% of the UNet"),
        (wrong, "--init: 1 tensors are of other shapes.*out.2.weight"),
        ({}, "--init: holds 0% of the UNet"),
    ):
        with pytest.raises(InputError, match=words):
            pretrained.load_pretrained(model, weights)
        assert same(model.state_dict(), before)


# --------------------------------------------------------------------------------- zero123 as it is

TINY_CLIP = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"
TINY_UNET = {
    "in_channels": 8,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (1,),
    "context_dim": 32,
}


@pytest.fixture
def zero123(tmp_path, monkeypatch):
    """(file, model, VAE, encoder): a small zero123.ckpt, with timm's smallest CLIP."""
    monkeypatch.setattr(pretrained, "CLIP", TINY_CLIP)
    encoder = ImageEncoder(TINY_CLIP, "random", ())
    model = randomize(NovelViewModel(cls_dim=encoder.cls_dim, **TINY_UNET))
    vae = AutoencoderKL(32, (1, 1, 1, 1), 1)
    convert.write_ldm(tmp_path / "zero123.ckpt", model, vae, encoder)
    return tmp_path / "zero123.ckpt", model, vae, encoder


@pytest.mark.slow
def test_sampling_a_zero123_checkpoint(zero123, tmp_path):
    """`sample.py --ckpt zero123.ckpt`: CLIP, VAE, EMA and pose projection are in the one file."""
    file, model, vae, encoder = zero123
    opened, opened_encoder, opened_vae, meta = pretrained.load_checkpoint(file)
    assert same(opened.state_dict(), model.state_dict())
    assert same(opened_vae.state_dict(), vae.state_dict())
    assert opened_encoder.spec()["sha256"] == encoder.spec()["sha256"]
    assert meta["image_size"] == pretrained.image_size(file) == 256
    photo = torch.zeros(40, 30, 4, dtype=torch.uint8)
    photo[5:30, 5:20] = torch.tensor([200, 50, 50, 255], dtype=torch.uint8)
    Image.fromarray(photo.numpy()).save(tmp_path / "photo.png")
    files = ["--ckpt", file, "--image", tmp_path / "photo.png", "--out", tmp_path / "out"]
    call(sample, *files, "--azimuth", 30, "--steps", 2, "--device", "cpu")
    assert Image.open(tmp_path / "out" / "photo" / "000.png").size == (256, 256)


def test_a_diffusers_folder_of_zero123_opens_with_its_heads_and_scale(zero123, tmp_path):
    file, model, vae, encoder = zero123
    call(convert, "--ckpt", file, "--out", tmp_path / "hf")
    parts = ("unet", "vae", "cc_projection")
    assert same(
        pretrained.read_weights(tmp_path / "hf", parts), pretrained.read_weights(file, parts)
    )
    four_heads = NovelViewModel(cls_dim=encoder.cls_dim, num_heads=4, **TINY_UNET)
    vae.scale = 0.25
    convert.write_diffusers(tmp_path / "hf", four_heads, vae, encoder)
    opened, _, opened_vae, _ = pretrained.load_checkpoint(tmp_path / "hf", encoder_weights=file)
    assert opened.args["num_heads"] == 4
    assert opened_vae.scale == 0.25
    with pytest.raises(InputError, match="no weights in this.*give CLIP by --encoder_weights"):
        pretrained.load_checkpoint(tmp_path / "hf")

    # As --init: the heads are compared, where a file tells them.
    eight_heads = NovelViewModel(cls_dim=encoder.cls_dim, **TINY_UNET)
    with pytest.raises(InputError, match="--init .*num_heads is 4, here it is 8"):
        pretrained.check_init(eight_heads, str(tmp_path / "hf"), encoder.spec())
    (tmp_path / "flat").mkdir()
    shutil.copy(tmp_path / "hf" / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "flat")
    pretrained.check_init(eight_heads, str(tmp_path / "flat"), encoder.spec())
    assert pretrained.read_weights(tmp_path / "flat")


def test_a_vae_of_another_scale_is_refused_for_a_checkpoint(zero123, tmp_path):
    """A zero123 model knows latents of its own VAE's scale only."""
    file, model, vae, encoder = zero123
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    _, _, opened, _ = pretrained.load_checkpoint(file, vae=str(tmp_path / "vae.safetensors"))
    assert opened.scale == 0.18215
    write_vae_folder(tmp_path / "sdxl-vae", 0.13025)
    with pytest.raises(InputError, match="--vae .*sdxl-vae: its scaling_factor is 0.13025, that "):
        pretrained.load_checkpoint(file, vae=str(tmp_path / "sdxl-vae"))


def changed_state(file, change) -> None:
    """Rewrites a .ckpt with its state dict changed."""
    checkpoint = torch.load(file)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, file)


def test_what_is_missing_is_said_with_the_files_name(zero123, tmp_path):
    file = zero123[0]
    without_vae = shutil.copy(file, tmp_path / "without_vae.ckpt")
    changed_state(without_vae, lambda state: state.pop("first_stage_model.quant_conv.weight"))
    without_pose = shutil.copy(file, tmp_path / "without_pose.ckpt")
    changed_state(without_pose, lambda state: state.pop("cc_projection.weight"))
    other_cls = shutil.copy(file, tmp_path / "other_cls.ckpt")
    changed_state(
        other_cls, lambda state: state.update({"cc_projection.weight": torch.zeros(32, 9)})
    )
    for path, words in (
        (without_vae, "--ckpt .*without_vae.ckpt: no autoencoder.*; give the VAE by --vae"),
        (without_pose, "--ckpt .*without_pose.ckpt: neither ours nor zero123's"),
        (other_cls, "--ckpt .*other_cls.ckpt: takes a CLS of 5, CLIP's has"),
    ):
        with pytest.raises(InputError, match=words) as info:
            pretrained.load_checkpoint(str(path))
        assert "\n" not in str(info.value)


# ------------------------------------------------------------------------------ what is not weights


@pytest.mark.parametrize("part", ["unet", "vae", "cc_projection", "image_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(zero123, part, value):
    file = zero123[0]
    names = {
        "unet": "model_ema.diffusion_modelout0weight",
        "vae": "first_stage_model.decoder.conv_in.weight",
        "cc_projection": "cc_projection.weight",
        "image_encoder": "cond_stage_model.model.visual.proj",
    }

    def spoil(state):
        state[names[part]] = state[names[part]].clone()
        state[names[part]].view(-1)[7] = value

    changed_state(file, spoil)
    shown = "model.diffusion_model.out.0.weight" if part == "unet" else names[part]
    with pytest.raises(InputError, match=f"zero123.ckpt: {shown} holds values that are not finite"):
        pretrained.load_checkpoint(file)


def test_only_what_is_used_must_be_finite(tmp_path):
    tensors = ldm_tensors()
    name = PREFIX["unet"] + "out.0.weight"
    ema = {shadow: tensors[raw].clone() for raw, shadow in ema_names(tensors).items()}
    tensors[name] = torch.full_like(tensors[name], torch.nan)  # its EMA is taken
    tensors[PREFIX["vae"] + "quant_conv.bias"].fill_(torch.nan)  # not asked for
    save_file({**tensors, **ema}, tmp_path / "x.safetensors")
    assert pretrained.read_weights(tmp_path / "x.safetensors", ("unet", "cc_projection"))


def test_a_checkpoint_of_ours_must_be_finite(run, tmp_path):
    step = shutil.copytree(run / "step_0000006", tmp_path / "step_0000006")
    meta, tensors, model = pretrained.read_model(step / "model.safetensors")
    model.unet.out[0].weight.data[3] = torch.nan
    meta = {key: value for key, value in meta.items() if key not in ("sha256", "format", "model")}
    own = {name: v for name, v in tensors.items() if name not in model.state_dict()}
    checkpoints.save_model(step / "model.safetensors", model, meta, own)
    with pytest.raises(InputError, match="model.safetensors: unet.out.0.weight holds values that"):
        pretrained.load_checkpoint(step)


class Evil:
    def __init__(self, function, *args):
        self.function = function
        self.args = args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize(
    "function, name", [(os.mkdir, "mkdir"), (eval, "eval"), (np.load, "numpy.*load")]
)
def test_malicious_pickle_is_refused_by_name_and_not_run(tmp_path, function, name):
    victim = tmp_path / "victim"
    argument = f"__import__('os').mkdir({str(victim)!r})" if function is eval else str(victim)
    evil = Evil(function, argument)
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": evil}, tmp_path / "zip.ckpt")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps({"w": evil}, protocol=2))
    for path, words in (("zip.ckpt", f"zip.ckpt: refused.*{name}"), ("raw.bin", "raw.bin")):
        with pytest.raises(InputError, match=words) as info:
            pretrained.read_weights(tmp_path / path)
        assert "\n" not in str(info.value)
    assert not victim.exists()


def sd_two_or_xl(context: int, width: int, diffusers: bool) -> dict[str, torch.Tensor]:
    """The two tensors by which another Stable Diffusion is told."""
    linear = torch.zeros(320, 320)
    if diffusers:
        return {
            "time_embedding.linear_1.weight": torch.zeros(4, 4),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(
                width, context
            ),
            "a.proj_in.weight": linear,
        }
    block = "model.diffusion_model.input_blocks.1.1"
    return {
        f"{block}.transformer_blocks.0.attn2.to_k.weight": torch.zeros(width, context),
        f"{block}.proj_in.weight": linear,
    }


def write_useless(kind: str, folder) -> pathlib.Path:
    """A file or folder of this kind that holds no weights for us."""
    path = folder / kind
    tensors = {"model.diffusion_model.x": torch.randn(1000)}
    if kind.startswith("cut"):
        if kind.endswith(".safetensors"):
            save_file(tensors, path)
        else:
            torch.save(tensors, path, _use_new_zipfile_serialization=kind == "cut.ckpt")
        path.write_bytes(path.read_bytes()[:-1500])
    elif kind.startswith("page"):
        path.write_text("<!DOCTYPE html><html>not found</html>")
    elif kind.startswith("empty"):
        path.touch()
    elif kind.startswith("sd2"):
        save_file(sd_two_or_xl(1024, 320, "hf" in kind), path)
    elif kind.startswith("xl"):
        save_file(sd_two_or_xl(2048, 640, "hf" in kind), path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "clip.pt":  # OpenAI publishes CLIP as TorchScript
        with zipfile.ZipFile(path, "w") as file:
            for name in ("data.pkl", "constants.pkl", "version", "code/x.py"):
                file.writestr(f"clip/{name}", b"3")
    return path


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
@pytest.mark.parametrize(
    "kind, words",
    [
        ("cut.safetensors", "truncated"),
        ("cut.ckpt", "truncated"),
        ("cut_old.ckpt", "truncated"),
        ("page.safetensors", "truncated"),
        ("page.ckpt", "truncated"),
        ("empty.safetensors", "truncated"),
        ("empty.ckpt", "truncated"),
        ("sd2.safetensors", "a Stable Diffusion 2.x checkpoint"),
        ("sd2hf.safetensors", "a Stable Diffusion 2.x checkpoint"),
        ("xl.safetensors", "a Stable Diffusion XL checkpoint"),
        ("xlhf.safetensors", "a Stable Diffusion XL checkpoint"),
        ("folder", "no weights in this folder"),
        ("clip.pt", r"a program \(TorchScript\), not weights; take those that timm"),
        ("absent.ckpt", "no such file or run"),
        ("absent", "no such file or run"),
    ],
)
def test_what_holds_no_weights_for_us_gets_one_line(tmp_path, kind, words):
    path = write_useless(kind, tmp_path)
    with pytest.raises(InputError, match=f"{kind}: .*{words}") as info:
        pretrained.read_weights(path)
    assert "\n" not in str(info.value)


# ---------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    "source, hub",
    [
        ("kxic/zero123-xl", True),
        ("runs/full", False),
        ("out/demo", False),
        ("./kxic/zero123-xl", False),
        ("kxic/zero123-xl/", False),
        ("a/b/c", False),
        ("kxic/zero123.ckpt", False),
        ("there/model", False),
        ("model", False),
    ],
)
def test_what_looks_like_a_path_is_no_hub_name(tmp_path, monkeypatch, source, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "there").mkdir()
    words = "fetch https://huggingface.co/" if hub else "no such file or run"
    for read in (pretrained.read_weights, pretrained.load_checkpoint):
        with pytest.raises(InputError, match=words) as info:
            read(source)
        assert "\n" not in str(info.value)


class FakeHub:
    """Stands in for the Hugging Face hub: repositories of empty models, by their files' names."""

    def __init__(self, folder, repositories: dict):
        self.folder = folder
        self.repositories = repositories
        self.fetched = []

    def snapshot_download(self, repo, allow_patterns, local_files_only):
        from huggingface_hub.utils import filter_repo_objects

        assert not local_files_only
        root = self.folder / repo
        root.mkdir(parents=True, exist_ok=True)
        for file in filter_repo_objects(self.repositories[repo], allow_patterns=allow_patterns):
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fetched.append(file)
            tensors = {self.mark(file): torch.zeros(1)}
            if file.endswith(".json"):
                path.write_text("{}")
            elif file.endswith(".safetensors"):
                save_file(tensors, path)
            else:
                torch.save(tensors, path)
        return root

    def mark(self, file: str) -> str:
        """The name by which the model in this file is known."""
        if file.startswith("image_encoder/"):
            return "visual_projection.weight"
        if file.startswith("unet/"):
            return "time_embed.0.weight"
        if file.startswith("clip_camera_projection/"):
            return "projection.weight"
        return "encoder.conv_in.weight"


PIPELINE = ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "image_encoder/model"]
OTHERS = ["model_index.json", "unet/config.json", "vae/config.json", "unet/flax_model.msgpack"]
OTHERS += ["unet/openvino_model.bin", "text_encoder/model.safetensors", "sd-v1.ckpt"]


def published(variant: str) -> list[str]:
    """A pipeline's files; unet/ and image_encoder/ are sharded in the variant "sharded"."""
    if variant == "sharded":
        shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        return [*shards, "vae/diffusion_pytorch_model.safetensors", *OTHERS]
    return [f"{name}.{variant}" for name in PIPELINE] + OTHERS


@pytest.mark.parametrize(
    "files, parts, expected",
    [
        (
            published("safetensors") + published("fp16.safetensors"),
            ("unet", "cc_projection"),
            ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"],
        ),
        (
            published("bin"),
            ("vae",),
            ["vae/config.json", "vae/diffusion_pytorch_model.bin"],
        ),
        (published("safetensors"), ("image_encoder",), ["image_encoder/model.safetensors"]),
        (
            published("fp16.safetensors")
            + ["clip_camera_projection/diffusion_pytorch_model.fp16.safetensors"],
            ("unet", "cc_projection"),
            [
                "clip_camera_projection/diffusion_pytorch_model.fp16.safetensors",
                "unet/config.json",
                "unet/diffusion_pytorch_model.fp16.safetensors",
            ],
        ),
        (
            published("sharded"),
            ("unet",),
            [
                "unet/config.json",
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
            ],
        ),
        (
            ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"],
            ("vae",),
            ["config.json", "diffusion_pytorch_model.safetensors"],
        ),
    ],
    ids=["plain", "bin", "image encoder", "half only", "sharded", "a VAE alone"],
)
def test_only_the_parts_that_are_wanted_are_fetched(tmp_path, monkeypatch, files, parts, expected):
    """As safetensors and in full precision, where the hub has that."""
    hub = FakeHub(tmp_path / "cache", {"owner/name": files})
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(formats, "hub_answers", lambda repo: True)
    monkeypatch.chdir(tmp_path)
    assert pretrained.read_weights("owner/name", parts)
    assert sorted(set(hub.fetched)) == expected


@pytest.mark.slow
def test_a_silent_hub_costs_ten_seconds_once(monkeypatch, tmp_path):
    """A server that takes the connection and never answers, as some firewalls do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        start = time.monotonic()
        for _ in range(2):
            with pytest.raises(InputError, match="someone/silent: neither here nor to be had"):
                pretrained.load_codec("sd", "someone/silent")
    assert time.monotonic() - start < 20


def test_the_sd_codec_needs_weights():
    with pytest.raises(InputError, match="--codec sd: give pixels, or sd with --vae"):
        pretrained.load_codec("sd")
    with pytest.raises(InputError, match="--vae x: the codec is pixels"):
        pretrained.load_codec("pixels", "x")


def test_what_resuming_takes_is_no_model(run):
    with pytest.raises(InputError, match="state.pt: holds what resuming takes; give its folder"):
        pretrained.load_checkpoint(str(run / "step_0000006" / "state.pt"))
