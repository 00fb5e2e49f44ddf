"""Frozen networks and foreign checkpoints, against diffusers and transformers on the same random weights.

FULL_SIZE=1 adds Stable Diffusion 1.x's full shape (minutes, 16 GB).
"""

import copy
import os
import pickle
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from diffusers import AutoencoderKL as TheirVAE
from diffusers import UNet2DConditionModel
from helpers import call
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

import pretrained
import sample
from lib import checkpoints
from lib.autoencoder import AutoencoderKL, load_autoencoder
from lib.cli import InputError
from lib.formats import to_ldm, unet_names, vae_names
from model import NovelViewModel, UNet
from pretrained import ImageEncoder, SpaceToDepth
from tools import convert

SMALL_UNET = dict(
    in_channels=8,
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1,),
    context_dim=16,
)
FULL = pytest.param(
    True, marks=pytest.mark.skipif("FULL_SIZE" not in os.environ, reason="FULL_SIZE is not set")
)


def their_unet(full: bool = False) -> UNet2DConditionModel:
    if full:
        return UNet2DConditionModel(in_channels=8, cross_attention_dim=768)
    kinds = dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    widths = dict(
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    return UNet2DConditionModel(in_channels=8, **kinds, **widths)


def their_vae(full: bool = False) -> TheirVAE:
    levels = 4 if full else 2
    return TheirVAE(
        block_out_channels=(128, 256, 512, 512) if full else (64, 128),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2 if full else 1,
    )


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size that keeps activations near 1, none of them zero or one: every tensor matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(
                torch.randn_like(p) * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
                + 0.5 * (p.ndim == 1)
            )
    return module


def small_model(**args) -> NovelViewModel:
    return randomize(NovelViewModel(cls_dim=12, **SMALL_UNET | args))


def ldm_tensors() -> dict[str, torch.Tensor]:
    """A small zero123 checkpoint without EMA and CLIP."""
    model, vae = small_model(), randomize(AutoencoderKL(64, (1, 2), 1))
    tensors = {f"model.diffusion_model.{k}": v for k, v in model.unet.state_dict().items()}
    tensors |= {f"cc_projection.{k}": v for k, v in model.cc_projection.state_dict().items()}
    return tensors | {f"first_stage_model.{k}": v for k, v in vae.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def gradient_error(ours: torch.nn.Module, theirs: torch.nn.Module, names: dict[str, str]) -> float:
    """Worst relative error of a tensor's gradient; gradients that are zero but for rounding count against the whole."""
    expected = {k: p.grad for k, p in theirs.named_parameters()}
    floor = 1e-3 * sum(g.square().sum() for g in expected.values() if g is not None) ** 0.5
    pairs = [(p.grad, expected[names[k]]) for k, p in ours.named_parameters() if p.grad is not None]
    assert len(pairs) > 50
    return max(float((a.reshape(b.shape) - b).norm() / b.norm().clamp(min=floor)) for a, b in pairs)


# -------------------------------------------------------------------------------------------- parity with diffusers


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("full", [False, FULL])
def test_unet_equals_diffusers(full, dtype, bound):
    theirs = randomize(their_unet(full)).to(dtype)
    ours = (UNet() if full else UNet(**SMALL_UNET)).to(dtype)
    ours.time_embed.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
    names = unet_names(theirs.state_dict(), back=True)
    ours.load_state_dict({names[k]: v for k, v in theirs.state_dict().items()})
    x, t, context = (
        torch.randn(2, 8, 16, 16).to(dtype),
        torch.tensor([3, 977]),
        torch.randn(2, 1, 768 if full else 16),
    )
    context = context.to(dtype)
    with torch.set_grad_enabled(
        not full or dtype == torch.float32
    ):  # float64 gradients at full size: 28 GB
        a, b = ours(x, t, context), theirs(x, t, context).sample
    assert error(a, b) < bound
    if not a.requires_grad:
        return
    a.square().mean().backward()
    b.square().mean().backward()
    assert gradient_error(ours, theirs, unet_names(ours.state_dict())) < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("full", [False, FULL])
def test_autoencoder_equals_diffusers(full, dtype, bound):
    theirs = randomize(their_vae(full)).to(dtype)
    ours = load_autoencoder(to_ldm(theirs.state_dict())).to(dtype)  # infers the shape
    assert (ours.channels, ours.factor, ours.scale) == (4, 8 if full else 2, 0.18215)
    ours = ours.requires_grad_(True)
    image = (torch.rand(1, 3, 32, 32) * 2 - 1).to(dtype)
    (mean, logvar), posterior = ours.encode(image), theirs.encode(image).latent_dist
    assert error(mean, posterior.mean) < bound and error(logvar, posterior.logvar) < bound
    a, b = ours.decode(mean), theirs.decode(posterior.mean).sample
    assert error(a, b) < bound
    a.square().mean().backward()
    b.square().mean().backward()
    assert gradient_error(ours, theirs, vae_names(ours.state_dict())) < bound


def test_full_size_names_and_shapes_equal_diffusers():
    with torch.device("meta"):
        pairs = (
            (UNet(), their_unet(True), unet_names),
            (AutoencoderKL(), their_vae(True), vae_names),
        )
    for ours, theirs, rename in pairs:
        expected = {k: v.shape.numel() for k, v in theirs.state_dict().items()}
        assert {
            rename(ours.state_dict())[k]: v.numel() for k, v in ours.state_dict().items()
        } == expected
        assert set(rename(expected, back=True).values()) == set(ours.state_dict())
    assert sum(p.numel() for p in UNet(**SMALL_UNET).parameters()) == sum(
        p.numel() for p in their_unet().parameters()
    )
    assert sum(p.numel() for p in pairs[0][0].parameters()) == 859_532_484


def test_old_diffusers_attention_names():
    theirs = randomize(their_vae()).state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for k, v in theirs.items():
        for new, name in old.items():
            k = k.replace(f".{new}.", f".{name}.")
        renamed[k] = v
    assert set(renamed) != set(theirs)
    assert same(to_ldm(renamed), to_ldm(theirs))


# ----------------------------------------------------------------------------------------------------------- codecs


def test_space_to_depth_is_lossless():
    codec, image = SpaceToDepth(4), torch.rand(2, 3, 32, 24) * 2 - 1
    mean, logvar = codec.encode(image)
    assert mean.shape == logvar.shape == (2, codec.channels, 8, 6) and (logvar == -30).all()
    assert torch.equal(codec.decode(mean), image)


def test_hash_depends_on_values_names_and_types_only(tmp_path):
    tensors = {"b": torch.randn(3, 2), "a": torch.tensor(1)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save({k: tensors[k] for k in "ab"}, tmp_path / "x.pt")
    read = [
        checkpoints.tensor_hash(pretrained.read_tensors(tmp_path / f"x.{suffix}"))
        for suffix in ("safetensors", "pt")
    ]
    assert read == [checkpoints.tensor_hash(tensors)] * 2
    assert checkpoints.tensor_hash(tensors | {"a": torch.tensor(2)}) != read[0]
    assert checkpoints.tensor_hash(tensors | {"a": torch.tensor(1.0)}) != read[0]
    assert checkpoints.tensor_hash({"b": tensors["b"], "c": tensors["a"]}) != read[0]


# ---------------------------------------------------------------------------------------------------- image encoder

CLIP_ARGS = dict(embed_dim=32, depth=3, num_heads=4, img_size=56, patch_size=14, num_classes=20)
DINO_ARGS = dict(embed_dim=32, depth=3, num_heads=4, img_size=126)


def their_clip() -> CLIPVisionModelWithProjection:
    size = dict(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
    )
    return randomize(
        CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=14, projection_dim=20, **size))
    ).eval()


def test_clip_embedding_equals_transformers(tmp_path):
    theirs = their_clip()
    theirs.save_pretrained(tmp_path / "image_encoder")
    encoder = ImageEncoder(
        pretrained.CLIP, str(tmp_path), layers=(0, 2), image_size=56, **CLIP_ARGS
    )
    image = torch.rand(2, 3, 72, 72) * 2 - 1
    x = torch.nn.functional.interpolate(image, (56, 56), mode="bicubic", align_corners=True)
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    x = ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = theirs(x, output_hidden_states=True)
    cls, patch = encoder(image)
    assert error(cls, expected.image_embeds) < 1e-5
    hidden = [
        torch.nn.functional.layer_norm(expected.hidden_states[i + 1][:, 1:], (32,)) for i in (0, 2)
    ]
    assert error(patch, torch.cat(hidden, dim=2)) < 1e-5
    assert (encoder.cls_dim, encoder.feature_dim, encoder.tokens) == (20, 64, 16)
    # the same weights from a zero123 checkpoint, which holds them under OpenAI's names beside CLIP's text parts
    openai = {
        f"cond_stage_model.model.{k}": v
        for k, v in convert.clip_to_openai(encoder.vit.state_dict()).items()
    }
    torch.save(
        {"state_dict": openai | {"cond_stage_model.model.logit_scale": torch.ones(())}},
        tmp_path / "z.ckpt",
    )
    again = ImageEncoder(
        pretrained.CLIP, str(tmp_path / "z.ckpt"), layers=(0, 2), image_size=56, **CLIP_ARGS
    )
    assert again.spec()["sha256"] == encoder.spec()["sha256"] and torch.equal(again(image)[0], cls)


def test_dinov2_features_equal_transformers(tmp_path):
    """At a size that needs the position embeddings resampled, 9x9 -> 4x4; from a file of Meta's own format."""
    size = dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=126, patch_size=14
    )
    theirs = randomize(Dinov2Model(Dinov2Config(**size))).eval()
    meta = {}
    for k, v in theirs.state_dict().items():
        for old, new in {
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.": "",
            "encoder.layer.": "blocks.",
            "attention.o_proj": "attn.proj",
            "attention.q_proj": "attn.qkv",
            "layer_scale1.lambda1": "ls1.gamma",
            "layer_scale2.lambda1": "ls2.gamma",
            "layernorm": "norm",
        }.items():
            k = k.replace(old, new)
        meta[k] = v
    for k in [k for k in meta if ".qkv." in k]:
        q, key = meta[k], k.replace("attn.qkv", "attention.{}_proj")
        meta[k] = torch.cat([q, meta.pop(key.format("k")), meta.pop(key.format("v"))])
    torch.save(meta, tmp_path / "dinov2.pth")
    encoder = ImageEncoder(
        pretrained.DINOV2, str(tmp_path / "dinov2.pth"), (0, 2), image_size=56, **DINO_ARGS
    )
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    x = torch.nn.functional.interpolate(image, (56, 56), mode="bicubic", antialias=True)
    x = ((x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        expected = theirs(x, output_hidden_states=True)
    cls, patch = encoder(image)
    assert patch.shape == (2, 16, 64)
    for i, layer in enumerate((0, 2)):
        hidden = torch.nn.functional.layer_norm(expected.hidden_states[layer + 1][:, 1:], (32,))
        assert error(patch[..., 32 * i : 32 * (i + 1)], hidden) < 1e-5
    assert error(cls, torch.nn.functional.layer_norm(expected.pooler_output, (32,))) < 1e-5
    # a PCA projects what is otherwise the same; no layers, no patch features
    pca = {"mean": torch.randn(64), "components": torch.randn(64, 5)}
    projected = ImageEncoder(
        pretrained.DINOV2, encoder.vit.state_dict(), (0, 2), 56, pca, **DINO_ARGS
    )
    assert (
        error(projected(image)[1], (patch - pca["mean"]) @ pca["components"]) < 1e-5
        and projected.feature_dim == 5
    )
    bare = ImageEncoder(pretrained.DINOV2, str(tmp_path / "dinov2.pth"), (), 56, **DINO_ARGS)
    assert bare(image)[1] is None and torch.equal(bare(image)[0], cls) and bare.feature_dim == 0


def test_encoder_mistakes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for args, words in (
        (("no_such_model",), "--encoder no_such_model"),
        (("resnet18",), "--encoder resnet18"),
        (("vit_tiny_patch16_224", "random", (5, 12)), "0 to 11"),
        (("vit_tiny_patch16_224", "random", (5,), 100), "--encoder_size 100"),
        (
            ("vit_tiny_patch16_224", str(tmp_path / "other.safetensors"), (5,)),
            "no vit_tiny_patch16_224 in it",
        ),
        (("vit_tiny_patch16_224", str(tmp_path / "absent.pth"), (5,)), "no such file"),
        (
            (pretrained.DINOV2, "pretrained"),
            "timm/vit_large_patch14_dinov2.lvd142m .*model.safetensors.*--weights",
        ),
    ):
        with pytest.raises(InputError, match=words) as info:
            ImageEncoder(*args)
        assert "\n" not in str(info.value)


def test_random_encoder_warns_and_can_be_saved_whole(capsys):
    encoder = ImageEncoder("vit_tiny_patch16_224", "random", (5, 11), image_size=64)
    assert "WARNING" in capsys.readouterr().out
    again = ImageEncoder(
        "vit_tiny_patch16_224", copy.deepcopy(encoder.vit.state_dict()), (5, 11), image_size=64
    )
    image = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(encoder(image), again(image), strict=True))
    assert encoder.spec()["sha256"] == again.spec()["sha256"]
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_round_trip_is_bit_for_bit(tmp_path):
    """LDM -> ours -> diffusers (opened and saved by diffusers itself) -> ours -> LDM, and zero123's own format."""
    tensors = ldm_tensors()
    torch.save({"state_dict": tensors}, tmp_path / "ldm.ckpt")
    encoder = ImageEncoder(
        pretrained.CLIP,
        timm.create_model(pretrained.CLIP, **CLIP_ARGS).state_dict(),
        (),
        56,
        **CLIP_ARGS,
    )
    weights = pretrained.read_weights(tmp_path / "ldm.ckpt")
    model, vae = NovelViewModel(cls_dim=12, **SMALL_UNET), load_autoencoder(weights)
    pretrained.load_pretrained(model, weights)
    convert.write_diffusers(tmp_path / "hf", model, vae, encoder)
    for folder, kind in (("unet", UNet2DConditionModel), ("vae", TheirVAE)):
        opened, info = kind.from_pretrained(tmp_path / "hf" / folder, output_loading_info=True)
        assert not any(info.values())
        opened.save_pretrained(tmp_path / "hf" / folder)
    x, t, context = torch.randn(1, 8, 8, 8), torch.tensor([500]), torch.randn(1, 1, 16)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "hf" / "unet")
    assert (
        error(unet(x, t, context).sample, model.unet(x, t, context)) < 1e-5
    )  # config.json, the heads among it

    again = pretrained.read_weights(tmp_path / "hf")
    assert same(again, tensors)
    model2 = NovelViewModel(cls_dim=12, **SMALL_UNET)
    pretrained.load_pretrained(model2, again)
    convert.write_ldm(tmp_path / "zero123.ckpt", model2, load_autoencoder(again), encoder)
    written = torch.load(tmp_path / "zero123.ckpt", weights_only=True)["state_dict"]
    assert same({k: v for k, v in written.items() if k in tensors}, tensors)
    ema = {f"model_ema.{k[6:].replace('.', '')}" for k in tensors if k.startswith("model.")}
    rest = {
        k
        for k in written
        if k not in tensors and not k.startswith("cond_stage_model.model.visual.")
    }
    assert rest == ema | {"model_ema.decay", "model_ema.num_updates"}
    reopened = ImageEncoder(pretrained.CLIP, str(tmp_path / "zero123.ckpt"), (), 56, **CLIP_ARGS)
    assert reopened.spec()["sha256"] == encoder.spec()["sha256"]


def test_writing_refuses_what_others_cannot_represent(tmp_path):
    vae, fed = AutoencoderKL(32, (1, 1), 1), dict(feature_dim=8, feature_tokens=16, latent_size=8)
    clip = SimpleNamespace(name=pretrained.CLIP)
    for model, codec in (
        (small_model(**fed), vae),
        (small_model(), SpaceToDepth(2)),
        (small_model(prediction="v"), vae),
    ):
        with pytest.raises(InputError):
            convert.write_diffusers(tmp_path / "x", model, codec, clip)
    dino = ImageEncoder("vit_tiny_patch16_224", "random", ())
    for write, out in ((convert.write_ldm, "x.ckpt"), (convert.write_diffusers, "x")):
        with pytest.raises(InputError, match="CLIP only"):
            write(tmp_path / out, small_model(), vae, dino)
    assert not list(tmp_path.iterdir())
    silent = small_model(**fed)
    torch.nn.init.zeros_(silent.unet.amalgamation.weight)
    convert.write_diffusers(tmp_path / "x", silent, vae, clip)


def test_every_container_and_naming_reads_alike(tmp_path):
    tensors = ldm_tensors()
    unet = {
        k.removeprefix("model.diffusion_model."): v
        for k, v in tensors.items()
        if k.startswith("model.")
    }
    vae = {
        k.removeprefix("first_stage_model."): v for k, v in tensors.items() if k.startswith("first")
    }
    names = unet_names(unet)
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.ckpt")
    torch.save(
        {"state_dict": tensors, "global_step": 5},
        tmp_path / "b.ckpt",
        _use_new_zipfile_serialization=False,
    )
    assert all(
        same(pretrained.read_weights(tmp_path / name), tensors)
        for name in ("a.safetensors", "a.ckpt", "b.ckpt")
    )
    linear = {
        names[k]: v.flatten(1) if "proj_in.weight" in k or "proj_out.weight" in k else v
        for k, v in unet.items()
    }
    save_file(linear, tmp_path / "diffusers.safetensors")
    save_file(unet, tmp_path / "bare.safetensors")
    torch.save({"state_dict": vae | {"loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    for name in ("diffusers", "bare"):
        model = NovelViewModel(cls_dim=12, **SMALL_UNET)
        pretrained.load_pretrained(model, pretrained.read_weights(tmp_path / f"{name}.safetensors"))
        assert same(model.unet.state_dict(), unet)
    codec = pretrained.load_codec("sd", tmp_path / "vae.ckpt")
    assert same(codec.state_dict(), vae)
    hashes = [
        pretrained.codec_spec(c)["sha256"]
        for c in (pretrained.load_codec("sd", tmp_path / "a.ckpt"), codec)
    ]
    assert hashes[0] == hashes[1]
    # a diffusers folder that holds half-precision twins
    (tmp_path / "hf" / "unet").mkdir(parents=True)
    half = {k: v.half() for k, v in linear.items()}
    save_file(half, tmp_path / "hf" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert (
        pretrained.read_weights(tmp_path / "hf")["model.diffusion_model.out.0.weight"].dtype
        == torch.float16
    )
    save_file(linear, tmp_path / "hf" / "unet" / "diffusion_pytorch_model.safetensors")
    assert (
        pretrained.read_weights(tmp_path / "hf")["model.diffusion_model.out.0.weight"].dtype
        == torch.float32
    )


def test_init_extends_conv_in_prefers_ema_and_reports(tmp_path, capsys):
    tensors = {k: v for k, v in ldm_tensors().items() if not k.startswith("cc_")}
    conv_in = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[conv_in] = tensors[conv_in][:, :4].clone()
    ema = {
        f"model_ema.{k[6:].replace('.', '')}": v + 1
        for k, v in tensors.items()
        if k.startswith("model.")
    }
    save_file(
        tensors | ema | {"model.diffusion_model.strange": torch.zeros(1)},
        tmp_path / "a.safetensors",
    )
    save_file(tensors | ema, tmp_path / "b.safetensors")
    model = small_model(feature_dim=8, feature_tokens=16, latent_size=8)
    before = copy.deepcopy(model.state_dict())
    pretrained.load_pretrained(model, pretrained.read_weights(tmp_path / "b.safetensors"))
    assert torch.equal(model.unet.input_blocks[0][0].weight[:, :4], tensors[conv_in] + 1)
    assert not model.unet.input_blocks[0][0].weight[:, 4:].any()
    assert torch.equal(model.unet.out[0].weight, tensors["model.diffusion_model.out.0.weight"] + 1)
    for name in ("cc_projection.weight", "unet.amalgamation.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    out = capsys.readouterr().out
    words = (
        "EMA",
        "extended unet.input_blocks.0.0.weight",
        "3 tensors missing, left as initialised",
        "100.0% of",
    )
    assert all(
        word in out
        for word in (*words, "amalgamation.weight", "cc_projection.weight", "cc_projection.bias")
    )
    pretrained.load_pretrained(
        model, pretrained.read_weights(tmp_path / "a.safetensors")
    )  # its EMA is not complete
    out = capsys.readouterr().out
    assert "EMA" not in out and "left over, unused: unet.strange" in out
    assert torch.equal(model.unet.out[0].weight, tensors["model.diffusion_model.out.0.weight"])


def test_init_from_another_encoder_or_another_prediction(run, tmp_path, capsys):
    """Of another encoder amalgamation and cc_projection stay as initialised; what shapes don't show is refused."""
    meta, _, theirs = pretrained.read_model(pretrained.find_weights(run))
    weights = pretrained.read_weights(run)
    args = theirs.args | {"cls_dim": 12, "feature_dim": 8}
    ours = NovelViewModel(**args)
    before = copy.deepcopy(ours.state_dict())
    pretrained.load_pretrained(ours, weights)
    out = capsys.readouterr().out
    assert (
        "unet.amalgamation.* left as" in out
        and "cc_projection.* left as" in out
        and "100.0% of" in out
    )
    for name, value in ours.state_dict().items():
        other = "amalgamation" in name or "cc_projection" in name
        assert torch.equal(value, before[name] if other else theirs.state_dict()[name]), name
    assert pretrained.check_init(ours, run, meta["encoder"]) is None and not capsys.readouterr().out
    pretrained.check_init(ours, run, meta["encoder"] | {"layers": [1]})
    assert "another image encoder, or other layers" in capsys.readouterr().out
    for key, value in (("prediction", "eps"), ("num_heads", 8)):
        with pytest.raises(InputError, match=f"--init .*its {key} is"):
            pretrained.check_init(
                NovelViewModel(**(args | {key: value})), str(run), meta["encoder"]
            )


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_what_is_asked_of_the_hub(tmp_path, monkeypatch, suffix):
    """Only the parts that are wanted, as safetensors where there are any; a VAE may have a repository of its own."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    parts = {"unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "image_encoder/model"}
    there = {"sd/x": parts, "vae/x": {"diffusion_pytorch_model"}}
    asked = []

    def snapshot(repo, allow_patterns, local_files_only):
        files = list(
            filter_repo_objects(
                [f"{f}.{suffix}" for f in there[repo]], allow_patterns=allow_patterns
            )
        )
        for file in files:
            path = tmp_path / repo / file
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {
                "visual_projection.weight"
                if "image" in file
                else "encoder.conv_in.weight": torch.zeros(1)
            }
            tensors = {"time_embed.0.weight": torch.zeros(1)} if "unet" in file else tensors
            save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
        asked.append(sorted(file.split("/")[0].split(".")[0] for file in files))
        (tmp_path / repo).mkdir(parents=True, exist_ok=True)
        return tmp_path / repo

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: exec("raise OSError"))
    for repo, wanted, found in (
        ("sd/x", ("unet", "cc_projection"), ["unet"]),
        ("sd/x", ("vae",), ["vae"]),
        ("sd/x", ("image_encoder",), ["image_encoder"]),
        ("vae/x", ("vae",), ["diffusion_pytorch_model"]),
    ):
        shutil.rmtree(tmp_path / repo, ignore_errors=True)
        assert len(pretrained.read_weights(repo, wanted)) == 1
        assert sum(asked, []) == found  # nothing twice
        asked.clear()


def test_init_refuses_an_uncovered_unet_and_changes_nothing():
    tensors, model = ldm_tensors(), small_model()
    before = copy.deepcopy(model.state_dict())
    torch.nn.init.zeros_(model.unet.out[0].weight)
    before["unet.out.0.weight"].zero_()
    sparse = {k: v for k, v in tensors.items() if "output_blocks" not in k}
    wrong = tensors | {"model.diffusion_model.out.2.weight": torch.zeros(9, 64, 3, 3)}
    for weights, words in (
        (sparse, r"holds \d+% of the UNet"),
        (wrong, "1 tensors are of other shapes.*out.2.weight"),
        ({}, "0%"),
    ):
        with pytest.raises(InputError, match=words):
            pretrained.load_pretrained(model, weights)
        assert same(model.state_dict(), before)


class ModelCheckpoint:  # stands in for Lightning's, as a pickled reference
    pass


def test_lightning_leftovers_load_without_lightning(tmp_path):
    """Callbacks keyed by class, numpy scalars and arrays: what a Lightning 1.x checkpoint of LDM holds."""
    tensors = {"model.diffusion_model.x": torch.ones(2)}
    leftovers = {
        "epoch": 3,
        "callbacks": {
            ModelCheckpoint: {"best_model_score": torch.ones(()), "best_model_path": "a.ckpt"}
        },
        "lr_schedulers": [
            {
                "base_lrs": [np.float64(1e-4)],
                "_last_lr": [np.arange(3)],
                "dtype": np.dtype("float32"),
            }
        ],
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.zeros(2)}}}],
    }
    ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    module = type(os)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = ModelCheckpoint
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "pytorch_lightning",
            "pytorch_lightning.callbacks",
            ModelCheckpoint.__module__,
        ):
            patch.setitem(__import__("sys").modules, name, module)
        for zipped in (True, False):
            path = tmp_path / f"{zipped}.ckpt"
            torch.save(
                {"state_dict": tensors} | leftovers, path, _use_new_zipfile_serialization=zipped
            )
    for path in tmp_path.iterdir():
        assert same(pretrained.read_weights(path), tensors)


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize(
    "call, name", [(os.mkdir, "mkdir"), (eval, "eval"), (np.load, "numpy.*load")]
)
def test_malicious_pickle_is_refused_by_name_and_not_run(tmp_path, call, name):
    victim = tmp_path / "victim"
    evil = Evil(call, f"__import__('os').mkdir({str(victim)!r})" if call is eval else str(victim))
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": evil}, tmp_path / "zip.ckpt")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps({"w": evil}, protocol=2))
    for path in ("zip.ckpt", "raw.bin"):
        with pytest.raises(
            InputError, match=f"{path}: refused.*{name}" if path == "zip.ckpt" else path
        ) as info:
            pretrained.read_weights(tmp_path / path)
        assert "\n" not in str(info.value)
    assert not victim.exists()


def test_a_program_in_place_of_weights_is_named(tmp_path):
    """OpenAI publishes CLIP as TorchScript; torch says so, and this says what to take."""
    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl", "version", "code/x.py"):
            file.writestr(f"clip/{name}", b"3")
    with pytest.raises(
        InputError, match=r"clip.pt: a program \(TorchScript\), not weights; take those that timm"
    ):
        pretrained.read_tensors(tmp_path / "clip.pt")


def test_damaged_and_foreign_checkpoints_get_one_line(tmp_path):
    tensors = {"model.diffusion_model.x": torch.randn(1000)}
    save_file(tensors, tmp_path / "cut.safetensors")
    torch.save(tensors, tmp_path / "cut.ckpt")
    torch.save(tensors, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("cut.safetensors", "cut.ckpt", "old.ckpt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1500])
    for suffix in ("safetensors", "ckpt"):
        (tmp_path / f"page.{suffix}").write_text("<!DOCTYPE html><html>not found</html>")
        (tmp_path / f"empty.{suffix}").touch()
    block = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    theirs = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    linear, mark = torch.zeros(320, 320), {"time_embedding.linear_1.weight": torch.zeros(4, 4)}
    ldm = "model.diffusion_model."
    save_file(
        {ldm + block: torch.zeros(320, 1024), f"{ldm}a.proj_in.weight": linear},
        tmp_path / "sd2.safetensors",
    )
    save_file(
        mark | {theirs: torch.zeros(320, 1024), "a.proj_in.weight": linear},
        tmp_path / "sd2hf.safetensors",
    )
    save_file(
        {ldm + block: torch.zeros(640, 2048), f"{ldm}a.proj_in.weight": linear},
        tmp_path / "xl.safetensors",
    )
    save_file(
        mark | {theirs: torch.zeros(640, 2048), "a.proj_in.weight": linear},
        tmp_path / "xlhf.safetensors",
    )
    (tmp_path / "folder").mkdir()
    words = {
        "sd2": "Stable Diffusion 2.x",
        "xl": "Stable Diffusion XL",
        "fol": "no weights",
        "nam": "hub",
        "abs": "no such",
    }
    for path in sorted(tmp_path.iterdir()) + [tmp_path / "absent.ckpt"]:
        expected = next(
            (word for start, word in words.items() if path.name.startswith(start)), "truncated"
        )
        with pytest.raises(InputError, match=expected) as info:
            pretrained.read_weights(path)
        assert "\n" not in str(info.value) and path.name in str(info.value)


def test_unreachable_hub_repository_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match="someone/some-model.*fetch https://huggingface.co/someone/some-model"
    ) as info:
        pretrained.load_codec("sd", "someone/some-model")
    assert "\n" not in str(info.value)
    with pytest.raises(InputError, match="--vae"):
        pretrained.load_codec("sd")
    with pytest.raises(
        InputError, match="no such file"
    ):  # a run's name mistyped, and no repository
        pretrained.load_checkpoint(str(tmp_path / "runs"))


def test_clip_with_another_activation_than_its_weights_is_warned_of(monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "load_vit", lambda *_: None)
    for name, warned in (("vit_base_patch32_clip_224.metaclip_400m", True),
                         ("vit_base_patch32_clip_quickgelu_224.metaclip_400m", False)):  # fmt: skip
        ImageEncoder(name, "a file", ())
        text = "WARNING: the weights want QuickGELU: --encoder vit_base_patch32_clip_quickgelu_224.metaclip_400m"
        assert (text in capsys.readouterr().out) == warned


def test_sampling_a_zero123_checkpoint(tmp_path, monkeypatch):
    """`sample.py --ckpt zero123.ckpt --image photo.png` as is: CLIP, VAE, EMA and pose projection all from the file.

    CLIP ViT-L/14 is stood in for by timm's smallest CLIP.
    """
    clip = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"
    monkeypatch.setattr(pretrained, "CLIP", clip)
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)
    encoder = ImageEncoder(clip, "random", ())
    shape = dict(
        in_channels=8,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1,),
    )
    model = NovelViewModel(cls_dim=encoder.cls_dim, context_dim=32, **shape)
    randomize(model)
    vae = AutoencoderKL(32, (1, 1, 1, 1), 1)
    convert.write_ldm(tmp_path / "zero123.ckpt", model, vae, encoder)
    opened, opened_encoder, opened_vae, meta = pretrained.load_checkpoint(tmp_path / "zero123.ckpt")
    assert same(opened.state_dict(), model.state_dict()) and same(
        opened_vae.state_dict(), vae.state_dict()
    )
    assert opened_encoder.spec()["sha256"] == encoder.spec()["sha256"] and meta["image_size"] == 256
    photo = torch.zeros(40, 30, 4, dtype=torch.uint8)
    photo[5:30, 5:20] = torch.tensor([200, 50, 50, 255], dtype=torch.uint8)
    Image.fromarray(photo.numpy()).save(tmp_path / "photo.png")
    call(sample, "--ckpt", tmp_path / "zero123.ckpt", "--image", tmp_path / "photo.png", "--azimuth", 30, "--steps", 2,
         "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    assert Image.open(tmp_path / "out" / "photo" / "000.png").size == (256, 256)
    call(convert, "--ckpt", tmp_path / "zero123.ckpt", "--out", tmp_path / "hf")
    assert same(pretrained.read_weights(tmp_path / "hf"), {
        k: v for k, v in pretrained.read_weights(tmp_path / "zero123.ckpt").items() if not k.startswith("cond_stage")
    })  # fmt: skip
    four = NovelViewModel(cls_dim=encoder.cls_dim, context_dim=32, num_heads=4, **shape)
    convert.write_diffusers(
        tmp_path / "hf", four, vae, encoder
    )  # its config.json holds the heads, the .ckpt would not
    with pytest.raises(InputError, match="--init .*num_heads is 4, here it is 8"):
        pretrained.check_init(
            NovelViewModel(num_heads=8, **shape), str(tmp_path / "hf"), encoder.spec()
        )
    (tmp_path / "flat").mkdir()
    shutil.copy(tmp_path / "hf" / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "flat")
    pretrained.check_init(model, str(tmp_path / "flat"), encoder.spec())
    assert pretrained.read_weights(tmp_path / "flat")
    opened = pretrained.load_checkpoint(tmp_path / "hf", encoder_weights=tmp_path / "zero123.ckpt")[
        0
    ]
    assert opened.unet.middle_block[1].transformer_blocks[0].attn1.num_heads == 4
    with pytest.raises(InputError, match="4 attention heads"):
        convert.write_ldm(tmp_path / "x.ckpt", four, vae, encoder)
    with pytest.raises(
        InputError, match="no weights in this folder.*give CLIP by --encoder_weights"
    ):
        pretrained.load_checkpoint(tmp_path / "hf")
    torch.save({"state_dict": {k: v for k, v in torch.load(tmp_path / "zero123.ckpt")["state_dict"].items()
                               if k != "cc_projection.weight"} | {"cc_projection.weight": torch.zeros(32, 9)}},
               tmp_path / "other.ckpt")  # fmt: skip
    with pytest.raises(InputError, match="takes a CLS of 5, CLIP's has"):
        pretrained.load_checkpoint(tmp_path / "other.ckpt")
    monkeypatch.setattr(pretrained, "CLIP", "vit_large_patch14_clip_quickgelu_224.openai")
    monkeypatch.setattr(pretrained, "load_checkpoint", lambda *_: (model, encoder, vae, {}))
    for out in ("x.ckpt", "x"):
        with pytest.raises(InputError, match=f"conditioned on {clip}"):
            call(convert, "--ckpt", "any", "--out", tmp_path / out)
