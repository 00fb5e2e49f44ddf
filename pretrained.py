"""What is frozen, and weights in and out: latent codecs, the image encoder, checkpoints of every format.

Foreign weights are read into LDM's names, those of Stable Diffusion 1.x and zero123: `model.diffusion_model.*`,
`first_stage_model.*`, `cc_projection.*`, `cond_stage_model.*`. B batch, C latent channels, T patch tokens, D width.
"""

import argparse
import json
import re
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from lib.autoencoder import load_autoencoder
from lib.checkpoints import read_checkpoint, read_meta, tensor_hash
from lib.cli import InputError, hint, one_line
from lib.formats import (
    PREFIX,
    clip_to_timm,
    find_weights,
    from_hub,
    infer_args,
    read_tensors,
    read_weights,
)
from model import NovelViewModel

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
CLIP = "vit_large_patch14_clip_quickgelu_224.openai"  # Zero-1-to-3's


# ----------------------------------------------------------------------------------------------------------- codecs


class SpaceToDepth(nn.Module):
    """The lossless codec without weights: f x f pixels become 3 f² channels. AutoencoderKL's interface."""

    name, scale, source = "pixels", 1.0, None

    def __init__(self, factor: int = 4):
        super().__init__()
        self.factor, self.channels = factor, 3 * factor**2

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean = F.pixel_unshuffle(image, self.factor)
        return mean, torch.full_like(mean, -30.0)

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, self.factor)


def codec_spec(codec: nn.Module) -> dict:
    """What an archive or a checkpoint notes of a codec, fit for json."""
    spec = {key: getattr(codec, key) for key in ("name", "channels", "factor", "scale", "source")}
    return spec | {"sha256": tensor_hash(codec.state_dict())}


def load_codec(name: str, source: str | None = None, factor: int = 4) -> nn.Module:
    """The frozen codec "sd", from anything that `read_weights` reads, or "pixels" with its factor."""
    if name == "pixels" and source:
        raise InputError(f"--vae {source}: the codec is pixels, which takes no weights")
    if name == "pixels":
        return SpaceToDepth(factor)
    if name != "sd" or not source:
        raise InputError(
            f"--codec {name}: give pixels, or sd with --vae (a checkpoint, diffusers folder or hub name)"
        )
    codec = load_autoencoder(read_weights(source, ("vae",)))
    codec.source = str(source)
    return codec


# ---------------------------------------------------------------------------------------------------- image encoder


class ImageEncoder(nn.Module):
    """A frozen timm ViT (3.3): image (B, 3, H, W) in [-1, 1] -> cls (B, cls_dim), patch (B, T, feature_dim) or None.

    weights: "pretrained" (timm's, from the hub), "random", a file (timm's names, DINOv2's original, CLIP in OpenAI's
        names or transformers', a zero123 checkpoint), a diffusers folder, or the tensors of an earlier `.vit`.
    layers: blocks whose patch tokens are kept, counted from 0, rising; () for none.
    pca: {"mean": (K0,), "components": (K0, K)} for the patch features.
    Further arguments go to timm.create_model. Raises InputError for what the user can mend.
    """

    def __init__(
        self,
        name=DINOV2,
        weights="pretrained",
        layers=(5, 11, 17, 23),
        image_size=224,
        pca=None,
        **args,
    ):
        super().__init__()
        self.name, self.layers, self.image_size, self.clip = (
            name,
            list(layers),
            image_size,
            "_clip_" in name,
        )
        self.source = weights if isinstance(weights, str) else "saved"
        if weights == "random":
            torch.manual_seed(0)  # the same in every process
        try:  # on "meta" where weights follow, for initialising a ViT-L takes ten seconds
            with torch.device("cpu" if weights == "random" else "meta"):
                vit = timm.create_model(name, **(args if self.clip else {"num_classes": 0} | args))
        except (RuntimeError, OSError) as error:
            raise InputError(f"--encoder {name}: {one_line(error)}") from None
        if not isinstance(vit, timm.models.VisionTransformer):
            raise InputError(
                f"--encoder {name}: a {type(vit).__name__}, not one of timm's VisionTransformers"
            )
        if self.layers != sorted(set(layers)) or not set(layers) <= set(range(len(vit.blocks))):
            raise InputError(
                f"--layers {self.layers}: {name} has 0 to {len(vit.blocks) - 1}, to be given rising"
            )
        if image_size % vit.patch_embed.patch_size[0]:
            raise InputError(
                f"--encoder_size {image_size}: not a multiple of the patch {vit.patch_embed.patch_size}"
            )
        if weights == "random":
            print(
                f"WARNING: --weights random: the features of {name} MEAN NOTHING, they only try the pipeline"
            )
        elif isinstance(weights, str):
            load_vit(vit, name, weights)
            if (
                "natively QuickGELU" in str(vit.pretrained_cfg.get("notes"))
                and "quickgelu" not in name
            ):
                print(
                    f"WARNING: the weights want QuickGELU: --encoder {name.replace('_clip_', '_clip_quickgelu_', 1)}"
                )
        positions, grid = vit.pos_embed, vit.patch_embed.grid_size
        vit.set_input_size((image_size, image_size))
        # as transformers for DINOv2, without antialias; for DINOv2 with registers, and others, as timm, with it
        # Deviation: without registers DINOv2's own code adds .1 to the new size, and samples up to .2 of a cell off.
        antialias, prefix = (
            "dinov2" not in name or "reg" in name,
            0 if vit.no_embed_class else vit.num_prefix_tokens,
        )
        new = resample_abs_pos_embed(
            positions.detach(), vit.patch_embed.grid_size, grid, prefix, antialias=antialias
        )
        vit.pos_embed = nn.Parameter(new)
        if isinstance(weights, dict):
            vit.load_state_dict(weights, assign=True)
        self.vit = vit
        self.cls_dim = vit.head.out_features if self.clip else vit.num_features
        self.tokens, self.feature_dim = vit.patch_embed.num_patches, len(layers) * vit.num_features
        if pca:
            if len(pca["components"]) != self.feature_dim:
                raise InputError(
                    f"--pca: for {len(pca['components'])} channels, the layers have {self.feature_dim}"
                )
            self.feature_dim = pca["components"].shape[1]
        mean, std = (
            torch.tensor(vit.pretrained_cfg[k]).reshape(1, 3, 1, 1) for k in ("mean", "std")
        )
        constants = {
            "mean": mean,
            "std": std,
            "pca_mean": pca and pca["mean"],
            "pca": pca and pca["components"],
        }
        for key, value in constants.items():
            self.register_buffer(key, value, persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        cls, patch = self.features(image)
        return cls, self.project(patch)

    def project(self, patch: Tensor | None) -> Tensor | None:
        """Patch features (B, T, K0) through the PCA, where there is one: (B, T, feature_dim)."""
        return patch if patch is None or self.pca is None else (patch - self.pca_mean) @ self.pca

    @torch.no_grad()
    def features(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """`forward` before the PCA."""
        size = (self.image_size, self.image_size)
        if self.clip:  # Zero-1-to-3's preprocessing: no antialias
            x = F.interpolate(image.float(), size, mode="bicubic", align_corners=True)
        else:  # the paper is silent; ours, as DINOv2's evaluation does
            x = F.interpolate(image.float(), size, mode="bicubic", antialias=True)
        x = (((x + 1) / 2 - self.mean) / self.std).to(self.vit.patch_embed.proj.weight.dtype)
        if self.layers:  # hidden: (B, T, D) each, before the final norm
            x, hidden = self.vit.forward_intermediates(x, indices=self.layers, output_fmt="NLC")
        else:
            x, hidden = self.vit.forward_features(x), []
        cls = self.vit.forward_head(
            x
        )  # [CLS] behind the final norm, and CLIP's behind its projection
        cls = cls.float() if self.clip else plain_norm(cls)  # CLIP's stays what Zero-1-to-3 expects
        patch = (
            torch.cat([plain_norm(h) for h in hidden], dim=2) if hidden else None
        )  # (B, T, K0), shallow to deep
        return cls, patch

    def spec(self) -> dict:
        """What an archive or a checkpoint notes of this encoder, fit for json."""
        # the position embeddings are resampled, which different machines round differently
        tensors = {k: v for k, v in self.vit.state_dict().items() if k != "pos_embed"}
        tensors |= {} if self.pca is None else {"pca_mean": self.pca_mean, "pca": self.pca}
        spec = {
            "name": self.name,
            "weights": self.source,
            "layers": self.layers,
            "image_size": self.image_size,
        }
        spec |= {"cls_dim": self.cls_dim, "feature_dim": self.feature_dim, "tokens": self.tokens}
        return spec | {
            "pca": None if self.pca is None else self.pca.shape[1],
            "sha256": tensor_hash(tensors),
        }


def plain_norm(x: Tensor) -> Tensor:
    """3.4's additional LayerNorm, which cures 16-bit training. It gives no details: over each layer's channels, and for
    DINOv2's CLS too, without parameters and in float32 are ours."""
    return F.layer_norm(x.float(), x.shape[-1:])


def load_vit(vit: nn.Module, name: str, weights: str) -> None:
    """Fill a timm ViT of its pretraining's size, in float32; weights as in ImageEncoder."""
    if weights == "pretrained":
        repo = vit.pretrained_cfg.get("hf_hub_id") or name
        file = vit.pretrained_cfg.get("hf_hub_filename") or "model.safetensors"
        weights = from_hub(repo, [file], "it to --weights (sample.py: --encoder_weights)") / file
    tensors = (
        read_tensors(weights)
        if Path(weights).is_file()
        else read_weights(weights, ("image_encoder",))
    )
    tensors = {re.sub(r"^cond_stage_model\.(model\.)?", "", k): v for k, v in tensors.items()}
    try:
        state = checkpoint_filter_fn(clip_to_timm(tensors), vit)
        vit.load_state_dict(
            {k: state[k].float().contiguous() for k in vit.state_dict()}, assign=True
        )
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"encoder's weights {weights}: no {name} in it ({one_line(error)})"
        ) from None


# ----------------------------------------------------------------------------------------------- reading checkpoints


@torch.no_grad()
def load_pretrained(model: NovelViewModel, weights: dict[str, Tensor], flag: str = "init") -> None:
    """Fill `model.unet` and `model.cc_projection` from `read_weights`'s tensors, of that flag, and print what happened.

    A conv_in without the condition's channels is extended with zeros: the network starts as the pretrained one
    (Zero-1-to-3). Raises InputError, before anything is changed, where shapes disagree or a tenth of the UNet is
    missing.
    """
    own, conv_in, prefix = model.state_dict(), "unet.input_blocks.0.0.weight", PREFIX["unet"]
    given = {
        k.replace(prefix, "unet."): v
        for k, v in weights.items()
        if k.startswith((prefix, "cc_projection."))
    }
    if conv_in in given and 2 * given[conv_in].shape[1] == own[conv_in].shape[1]:
        given[conv_in] = torch.cat([given[conv_in], torch.zeros_like(given[conv_in])], dim=1)
        print(
            f"{flag}: extended {conv_in} to {given[conv_in].shape[1]} channels: those of the condition are zero"
        )
    for name, tensor in given.items():
        if (
            name.endswith((".proj_in.weight", ".proj_out.weight")) and tensor.ndim == 2
        ):  # LDM's are 1x1 convolutions
            given[name] = tensor[:, :, None, None]
    wrong = [name for name in own.keys() & given.keys() if given[name].shape != own[name].shape]
    for part in ("unet.amalgamation.", "cc_projection."):
        if any(name.startswith(part) for name in wrong):
            print(f"{flag}: {part}* left as initialised: the checkpoint's is another encoder's")
            wrong, given = ([k for k in wrong if not k.startswith(part)],
                            {k: v for k, v in given.items() if not k.startswith(part)})  # fmt: skip
    if wrong:
        shapes = [
            f"{k} {tuple(given[k].shape)} for {tuple(own[k].shape)}" for k in sorted(wrong)[:3]
        ]
        raise InputError(f"--{flag}: {len(wrong)} tensors are of other shapes: {', '.join(shapes)}")
    missing, left = [k for k in own if k not in given], [k for k in given if k not in own]
    sizes = {
        k: v.numel() for k, v in own.items() if k.startswith("unet.") and "amalgamation" not in k
    }
    covered = sum(size for k, size in sizes.items() if k in given) / sum(sizes.values())
    if covered < 0.9:
        raise InputError(
            f"--{flag}: holds {covered:.0%} of the UNet, no {', '.join(missing[:3])}; is it SD 1.x?"
        )
    for name in own.keys() & given.keys():
        own[name].copy_(given[name])
    print(
        f"{flag}: loaded {len(given) - len(left)} tensors, {covered:.1%} of the UNet's parameters"
    )
    for what, names in (("missing, left as initialised", missing), ("left over, unused", left)):
        if names:
            print(
                f"{flag}: {len(names)} tensors {what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            )


def own_tensors(encoder: ImageEncoder, pca: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What no public file holds of an encoder: random weights ("encoder.*") and the PCA ("pca.*")."""
    tensors = (
        {f"encoder.{k}": v for k, v in encoder.vit.state_dict().items()}
        if encoder.source == "random"
        else {}
    )
    tensors |= {f"pca.{k}": v for k, v in (pca or {}).items()}
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def split_own(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """(an encoder's weights, its PCA or None) from what holds `own_tensors`, among others."""
    parts = [
        {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)}
        for p in ("encoder.", "pca.")
    ]
    return parts[0], parts[1] or None


def open_encoder(
    spec: dict, source: str | None = None, tensors: dict[str, Tensor] | None = None
) -> ImageEncoder:
    """The encoder of a spec, from --encoder_weights, from `own_tensors`, or from where it came. Raises InputError."""
    saved, pca = split_own(tensors or {})
    weights = str(source) if source else saved or spec["weights"]
    with hint("" if source else "; give the weights by --encoder_weights"):
        encoder = ImageEncoder(
            spec["name"], weights, tuple(spec["layers"]), spec["image_size"], pca
        )
    if encoder.spec() | {"weights": spec["weights"]} != {"pca": None} | spec:
        what = f"{source or spec['weights']}: not the {spec['name']}"
        raise InputError(f"--encoder_weights {what} that the model was trained with")
    return encoder


def open_codec(spec: dict, source: str | None = None, advice: str = "") -> nn.Module:
    """The codec of a spec, from --vae or from where it came. Raises InputError, with the advice."""
    given, source = source, source or spec.get("source")
    with hint("" if given else f"; give the VAE by --vae{advice}"):
        codec = load_codec(spec["name"], source, spec["factor"])
    if codec_spec(codec) | {"source": None} != spec | {"source": None}:
        raise InputError(f"--vae {source}: not the VAE that the model was trained with")
    return codec


def read_model(path: Path) -> tuple[dict, dict[str, Tensor], NovelViewModel] | None:
    """(metadata, all tensors, the model) that `save_model` wrote; None where the file is another program's.

    Raises InputError where it is damaged, or its parts don't fit together.
    """
    if (found := read_checkpoint(path)) is None:
        return None
    meta, tensors = found
    try:
        side, tokens = meta["image_size"] // meta["codec"]["factor"], meta["encoder"]["tokens"]
        if (meta["model"]["latent_size"], meta["model"]["feature_tokens"]) != (side, tokens):
            raise ValueError("latent_size or feature_tokens is not the codec's or encoder's")
        model = build(meta["model"], tensors)
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    except Exception as error:  # the arguments may be anything
        raise InputError(
            f"{path}: its weights do not fit its metadata ({one_line(error)})"
        ) from None
    return meta, tensors, model


def build(args: dict, tensors: dict[str, Tensor]) -> NovelViewModel:
    """The model of these arguments, allocated once they turn out to ask for the sizes of the tensors given for it."""
    if len(args["channel_mult"]) > 16 or args["num_res_blocks"] > 64:
        raise ValueError("absurd sizes")
    with torch.device("meta"):
        sizes = {name: value.numel() for name, value in NovelViewModel(**args).state_dict().items()}
    if wrong := [
        name for name, size in sizes.items() if name in tensors and tensors[name].numel() != size
    ]:
        raise ValueError(f"{len(wrong)} tensors are of another shape, {wrong[0]} for one")
    return NovelViewModel(**args)


def check_init(model: NovelViewModel, source: str, encoder: dict) -> None:
    """Raises InputError where --init is a checkpoint of ours that disagrees in what shapes don't show; says so where it
    knew other features than this encoder's."""
    path, config = Path(source), Path(source, "unet", "config.json")
    file = (
        find_weights(path)
        if (path / "latest").is_file() or (path / "model.safetensors").exists()
        else path
    )
    meta = read_meta(file) if file.suffix == ".safetensors" and file.is_file() else None
    theirs = (
        {key: meta["model"].get(key) for key in ("prediction", "num_heads")}
        if meta
        else diffusers_heads(config)
    )
    for key, value in theirs.items():
        if value != model.args[key]:
            raise InputError(f"--init {source}: its {key} is {value}, here it is {model.args[key]}")
    if meta and any(meta["encoder"].get(key) != encoder[key] for key in ("sha256", "layers")):
        print(f"init: {source} was trained with another image encoder, or other layers of it")


def diffusers_heads(config: Path) -> dict[str, int]:
    """{"num_heads"} of a diffusers UNet's config.json, the one place that holds it; {} where there is no such file."""
    try:
        return (
            {"num_heads": json.loads(config.read_text()).get("attention_head_dim", 8)}
            if config.is_file()
            else {}
        )
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{config}: not a diffusers configuration ({one_line(error)})") from None


def load_checkpoint(
    path: str, device="cpu", encoder_weights: str | None = None, vae: str | None = None
):
    """(model with EMA weights in eval mode, encoder, codec, meta) from --ckpt: ours, or a zero123 checkpoint."""
    file = find_weights(path)
    ours = read_model(file) if file.suffix == ".safetensors" and file.is_file() else None
    if ours:
        meta, tensors, model = ours
        encoder = open_encoder(meta["encoder"], encoder_weights, tensors)
        codec = open_codec(meta["codec"], vae)
    else:
        weights = read_weights(path)
        try:
            named = {k.replace(PREFIX["unet"], "unet."): v for k, v in weights.items()}
            model = build(
                infer_args(weights) | diffusers_heads(Path(path, "unet", "config.json")), named
            )
        except InputError:
            raise
        except Exception as error:  # whatever its shapes do to infer_args
            raise InputError(
                f"--ckpt {path}: neither ours nor zero123's ({one_line(error)})"
            ) from None
        load_pretrained(model, weights, "ckpt")
        with hint("" if encoder_weights else "; give CLIP by --encoder_weights"):
            encoder = ImageEncoder(CLIP, str(encoder_weights or path), layers=())
        if encoder.cls_dim != model.args["cls_dim"]:
            raise InputError(
                f"--ckpt {path}: takes a CLS of {model.args['cls_dim']}, CLIP's has {encoder.cls_dim}"
            )
        codec = load_codec("sd", vae) if vae else load_autoencoder(weights)
        meta = {
            "image_size": 256,
            "val_fraction": 0.01,
            "encoder": encoder.spec(),
            "codec": codec_spec(codec),
        }
    model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return model, encoder.to(device), codec.to(device, memory_format=torch.channels_last), meta


# ------------------------------------------------------------------------------------------- what is frozen, by flags


def autocast(device: torch.device, precision: str):
    """16-bit mixed precision (section 3.4): precision is bf16, fp16 or fp32.

    Deviation: bf16 is the default on GPUs; the Lightning 1.4.2 of the paper's A.1 has only fp16.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


@torch.no_grad()
def encode(image: Tensor, encoder, codec) -> dict[str, Tensor]:
    """What is archived of each image (B,3,H,W) in [-1,1]: latent_mean, latent_logvar, cls and, with layers, patch.

    Sampling calls it too: archived features and a photo's are the same, but for --precision and the format on disk.
    """
    mean, logvar = codec.encode(image)
    cls, patch = encoder(image)
    rows = {"latent_mean": mean, "latent_logvar": logvar, "cls": cls}
    return rows if patch is None else rows | {"patch": patch}


def add_encoder_flags(group) -> None:
    """The flags that choose what is frozen, shared by precompute_dino.py and train.py --online."""
    group.add_argument(
        "--image_size", type=int, default=256, help="side of the images in pixels (4.1)"
    )
    group.add_argument(
        "--encoder", default=DINOV2, help="a timm ViT (3.3; CLIP for Zero-1-to-3's baseline)"
    )
    group.add_argument(
        "--weights", default="pretrained", help="encoder's weights: pretrained, random, or a file"
    )
    group.add_argument(
        "--encoder_size", type=int, default=224, help="the encoder's input in pixels: 16x16 patches"
    )
    group.add_argument("--layers", type=int, nargs="*", default=[5, 11, 17, 23], help="encoder blocks whose patch "
                       "features are kept, from 0, shallow to deep (3.3 gives no numbers; ours)")  # fmt: skip
    group.add_argument(
        "--codec",
        choices=["sd", "pixels"],
        default="sd",
        help="SD's VAE, or lossless space-to-depth",
    )
    group.add_argument(
        "--pixels_factor", type=int, default=4, help="downsampling of --codec pixels"
    )
    group.add_argument(
        "--vae", help="weights of --codec sd: any Stable Diffusion checkpoint or VAE, or a hub name"
    )
    group.add_argument(
        "--val_fraction", type=float, default=0.01, help="share of objects held out, the last (4.1)"
    )


def open_frozen(
    args: argparse.Namespace, device: torch.device, tensors: dict[str, Tensor] | None = None
):
    """(encoder, codec) that the flags of `add_encoder_flags` and --compile describe, on the device, channels-last.

    tensors: what no public file holds, as `own_tensors` gives it.
    """
    codec = load_codec(args.codec, args.vae, args.pixels_factor)
    if args.image_size % codec.factor:
        raise InputError(
            f"--image_size {args.image_size} is not a multiple of the codec's factor {codec.factor}"
        )
    saved, pca = split_own(tensors or {})
    weights = saved if args.weights == "random" and saved else args.weights
    encoder = ImageEncoder(args.encoder, weights, tuple(args.layers), args.encoder_size, pca)
    encoder, codec = encoder.to(device), codec.to(device, memory_format=torch.channels_last)
    if args.compile:
        compile_frozen(encoder, codec)
    return encoder, codec


def compile_frozen(encoder, codec=None) -> None:
    """torch.compile what is run of them, in place."""
    encoder.features = torch.compile(encoder.features)
    if codec is not None:
        codec.encode = torch.compile(codec.encode)
