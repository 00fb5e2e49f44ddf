"""What is frozen, and how weights are opened: codecs, the image encoder, checkpoints of any format.

Weights from elsewhere are read into LDM's names, those of Stable Diffusion 1.x and zero123:
`model.diffusion_model.*`, `first_stage_model.*`, `cc_projection.*`, `cond_stage_model.*`.
B batch, C latent channels, T patch tokens, D width of the image encoder.
"""

import argparse
import contextlib
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.autoencoder import AutoencoderKL, load_autoencoder
from lib.checkpoints import read_checkpoint, read_meta, tensor_hash
from lib.cli import (
    InputError,
    fraction,
    hint,
    is_rank_0,
    nonnegative_int,
    one_line,
    positive_int,
)
from lib.formats import (
    POSE_MLP,
    PREFIX,
    check_finite,
    clip_to_timm,
    find_weights,
    from_hub,
    infer_args,
    locate,
    read_heads,
    read_image_encoder,
    read_scale,
    read_tensors,  # noqa: F401 - the scripts read frozen.safetensors by it
    read_weights,
)
from model import NovelViewModel

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
CLIP = "vit_large_patch14_clip_quickgelu_224.openai"  # Zero-1-to-3's


# ------------------------------------------------------------------------------------------ codecs


class SpaceToDepth(nn.Module):
    """The lossless codec without weights: f x f pixels become 3 f² channels.

    It has AutoencoderKL's interface: image (B, 3, H, W) in [-1, 1] <-> latent (B, 3 f², H/f, W/f).
    """

    name = "pixels"
    scale = 1.0
    source = None

    def __init__(self, factor: int = 4):
        super().__init__()
        self.factor = factor
        self.channels = 3 * factor**2

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean = F.pixel_unshuffle(image, self.factor)
        logvar = torch.full_like(mean, -30.0)  # a variance of nearly zero
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, self.factor)


def codec_spec(codec: nn.Module) -> dict:
    """What an archive or a checkpoint notes of a codec, fit for json."""
    return {
        "name": codec.name,
        "channels": codec.channels,
        "factor": codec.factor,
        "scale": codec.scale,
        "source": codec.source,
        "sha256": tensor_hash(codec.state_dict()),
    }


def load_codec(name: str, source: str | None = None, factor: int = 4) -> nn.Module:
    """A frozen codec: "pixels" with its factor, or "sd" from anything that `read_weights` reads.

    The codec's scale is the one that the config.json of its folder names, else Stable Diffusion
    1.x's. Raises InputError.
    """
    if name == "pixels":
        if source:
            raise InputError(f"--vae {source}: the codec is pixels, which takes no weights")
        return SpaceToDepth(factor)
    if name != "sd" or not source:
        raise InputError(
            f"--codec {name}: give pixels, or sd with --vae "
            "(a checkpoint, a diffusers folder or a hub name)"
        )
    path = locate(source, ("vae",))
    codec = load_autoencoder(read_weights(path, ("vae",)), f"--vae {source}")
    codec.source = str(source)
    codec.scale = read_scale(path) or codec.scale
    return codec


# ----------------------------------------------------------------------------------- image encoder


class ImageEncoder(nn.Module):
    """A frozen timm ViT (section 3.3).

    Image (B, 3, H, W) in [-1, 1] -> cls (B, cls_dim), patch (B, T, feature_dim) or None.

    Args:
        weights: "pretrained" (timm's, from the hub), "random", a file (timm's names; DINOv2 in
            Meta's or transformers' names; CLIP in OpenAI's or transformers'; a zero123 checkpoint),
            a folder or hub name of diffusers or transformers, or the tensors of an earlier
            encoder's `.vit`.
        layers: blocks whose patch tokens are kept, counted from 0, rising; () for none.
        image_size: side in pixels to which images are resized.
        pca: {"mean": (K0,), "components": (K0, K)} for the patch features.
        timm_args: further arguments of timm.create_model.

    Raises InputError for what the user can mend.
    """

    def __init__(
        self,
        name=DINOV2,
        weights="pretrained",
        layers=(5, 11, 17, 23),
        image_size=224,
        pca=None,
        **timm_args,
    ):
        super().__init__()
        self.name = name
        self.layers = list(layers)
        self.image_size = image_size
        self.clip = "_clip_" in name
        self.source = weights if isinstance(weights, str) else "saved"

        vit = create_vit(name, weights, timm_args)
        check_geometry(vit, name, self.layers, image_size)
        if isinstance(weights, dict):
            take_saved_weights(vit, name, weights, image_size)
        else:
            if weights == "random":
                print(
                    f"WARNING: --weights random: the features of {name} MEAN NOTHING, "
                    "they only try the pipeline"
                )
            else:
                load_vit(vit, name, weights)
                warn_of_activation(vit, name)
            resize_positions(vit, name, image_size)

        self.vit = vit
        self.cls_dim = vit.head.out_features if self.clip else vit.num_features
        self.tokens = vit.patch_embed.num_patches
        self.feature_dim = len(self.layers) * vit.num_features
        self.register_constant("mean", torch.tensor(vit.pretrained_cfg["mean"]).view(1, 3, 1, 1))
        self.register_constant("std", torch.tensor(vit.pretrained_cfg["std"]).view(1, 3, 1, 1))
        self.add_pca(pca)
        self.eval().requires_grad_(False)

    def register_constant(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    def add_pca(self, pca: dict[str, Tensor] | None) -> None:
        """Registers the PCA of the patch features, which become as wide as it has components."""
        self.register_constant("pca_mean", pca["mean"] if pca else None)
        self.register_constant("pca", pca["components"] if pca else None)
        if pca:
            if len(self.pca) != self.feature_dim:
                raise InputError(
                    f"--pca: for {len(self.pca)} channels, the layers have {self.feature_dim}"
                )
            self.feature_dim = self.pca.shape[1]

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        cls, patch = self.features(image)
        return cls, self.project(patch)

    def project(self, patch: Tensor | None) -> Tensor | None:
        """Patch features (B, T, K0) through the PCA, where there is one: (B, T, feature_dim)."""
        if patch is None or self.pca is None:
            return patch
        return (patch - self.pca_mean) @ self.pca

    @torch.no_grad()
    def features(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """`forward` before the PCA: cls (B, cls_dim), patch (B, T, K0) or None."""
        size = (self.image_size, self.image_size)
        if self.clip:  # Zero-1-to-3's preprocessing: no antialias
            x = F.interpolate(image.float(), size, mode="bicubic", align_corners=True)
        else:  # the paper is silent; this is DINOv2's own evaluation
            x = F.interpolate(image.float(), size, mode="bicubic", antialias=True)
        x = ((x + 1) / 2 - self.mean) / self.std
        x = x.to(self.vit.patch_embed.proj.weight.dtype)

        hidden = []
        if self.layers:  # hidden: (B, T, D) each, before the final norm
            x, hidden = self.vit.forward_intermediates(x, indices=self.layers, output_fmt="NLC")
        else:
            x = self.vit.forward_features(x)
        cls = self.vit.forward_head(x)  # [CLS] behind the final norm; CLIP's behind its projection
        # CLIP's embedding stays as Zero-1-to-3's checkpoints expect it.
        cls = cls.float() if self.clip else plain_norm(cls)
        patch = torch.cat([plain_norm(h) for h in hidden], dim=2) if hidden else None
        return cls, patch

    def spec(self) -> dict:
        """What an archive or a checkpoint notes of this encoder, fit for json."""
        tensors = dict(self.vit.state_dict())
        # The position embeddings are resampled, which different machines round differently.
        tensors.pop("pos_embed", None)
        if self.pca is not None:
            tensors["pca_mean"] = self.pca_mean
            tensors["pca"] = self.pca
        return {
            "name": self.name,
            "weights": self.source,
            "layers": self.layers,
            "image_size": self.image_size,
            "cls_dim": self.cls_dim,
            "feature_dim": self.feature_dim,
            "tokens": self.tokens,
            "pca": None if self.pca is None else self.pca.shape[1],
            "sha256": tensor_hash(tensors),
        }


def plain_norm(x: Tensor) -> Tensor:
    """Section 3.4's additional LayerNorm, which cures 16-bit training: (..., D) -> (..., D).

    The paper gives no details. Ours: over each layer's channels, for DINOv2's CLS too, without
    parameters, in float32.
    """
    return F.layer_norm(x.float(), x.shape[-1:])


def create_vit(name: str, weights, timm_args: dict) -> nn.Module:
    """timm's ViT of this name. Only random weights are initialised here. Raises InputError."""
    import timm  # here, as below: it takes a second or two, also of --help

    if "_clip_" in name and "_ft_" in name:
        raise InputError(f"--encoder {name}: finetuned to classes; its head is no CLIP embedding")
    args = dict(timm_args)
    if "_clip_" not in name:  # CLIP's head is its projection
        args.setdefault("num_classes", 0)
    device = "meta"  # the weights follow, and initialising a ViT-L takes ten seconds
    if weights == "random":
        device = "cpu"
        torch.manual_seed(0)  # the same weights in every process
    try:
        with torch.device(device):
            vit = timm.create_model(name, **args)
    except (RuntimeError, OSError) as error:
        raise InputError(f"--encoder {name}: {one_line(error)}") from None
    if not isinstance(vit, timm.models.VisionTransformer):
        kind = type(vit).__name__
        raise InputError(f"--encoder {name}: a {kind}, not one of timm's VisionTransformers")
    return vit


def check_geometry(vit: nn.Module, name: str, layers: list[int], image_size: int) -> None:
    """Raises InputError where the ViT lacks a layer, or its patches don't tile the image."""
    depth = len(vit.blocks)
    if layers != sorted(set(layers)) or not set(layers) <= set(range(depth)):
        raise InputError(f"--layers {layers}: {name} has 0 to {depth - 1}, to be given rising")
    patch_size = vit.patch_embed.patch_size
    if image_size % patch_size[0]:
        raise InputError(f"--encoder_size {image_size}: not a multiple of the patch {patch_size}")


def load_vit(vit: nn.Module, name: str, weights: str) -> None:
    """Fills a timm ViT of its pretraining's size, in float32. Weights as in ImageEncoder."""
    if weights == "pretrained":
        repo = vit.pretrained_cfg.get("hf_hub_id") or name
        file = vit.pretrained_cfg.get("hf_hub_filename") or "model.safetensors"
        weights = from_hub(repo, [file], "it to --weights (sample.py: --encoder_weights)") / file
    from timm.models.vision_transformer import checkpoint_filter_fn

    tensors = read_image_encoder(weights)
    try:
        state = checkpoint_filter_fn(clip_to_timm(tensors), vit)
        state = {key: state[key].float().contiguous() for key in vit.state_dict()}
        vit.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"encoder's weights {weights}: no {name} in it ({one_line(error)})"
        ) from None


def take_saved_weights(vit: nn.Module, name: str, state: dict[str, Tensor], image_size: int):
    """Makes the ViT of this image size, and fills it with an earlier `.vit`'s tensors."""
    vit.set_input_size((image_size, image_size))
    try:
        vit.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"--encoder {name}: the saved weights are of another encoder ({one_line(error)})"
        ) from None


def resize_positions(vit: nn.Module, name: str, image_size: int) -> None:
    """Makes the ViT take images of this size: resamples its position embeddings to the new grid.

    DINOv2 without registers is resampled as in transformers, without antialias. All others are
    resampled as in timm, with antialias.

    Deviation: for DINOv2 without registers Meta's code adds .1 to the new grid's size, which
    samples up to .2 of a cell off. Ours and transformers' do not.
    """
    from timm.layers import resample_abs_pos_embed

    positions = vit.pos_embed.detach()
    old_grid = vit.patch_embed.grid_size
    vit.set_input_size((image_size, image_size))
    resampled = resample_abs_pos_embed(
        positions,
        new_size=vit.patch_embed.grid_size,
        old_size=old_grid,
        num_prefix_tokens=0 if vit.no_embed_class else vit.num_prefix_tokens,
        antialias="dinov2" not in name or "reg" in name,
    )
    vit.pos_embed = nn.Parameter(resampled)


def warn_of_activation(vit: nn.Module, name: str) -> None:
    """Some CLIPs were trained with QuickGELU, which the name must ask for."""
    if "natively QuickGELU" in str(vit.pretrained_cfg.get("notes")) and "quickgelu" not in name:
        wanted = name.replace("_clip_", "_clip_quickgelu_", 1)
        print(f"WARNING: the weights want QuickGELU: --encoder {wanted}")


# ------------------------------------------------------------------------------- what is frozen


def autocast(device: torch.device, precision: str):
    """16-bit mixed precision (section 3.4): precision is bf16, fp16 or fp32.

    Deviation: bf16 is the default on GPUs. The Lightning 1.4.2 of the paper's A.1 has only fp16.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


@torch.no_grad()
def encode_latent(image: Tensor, codec: nn.Module) -> tuple[Tensor, Tensor]:
    """The codec's posterior mean and log variance (B,C,h,w), never computed in bf16.

    bf16 costs a VAE's moments 2% of their norm and fp16 0.25% (random weights), and an archive
    keeps the error for good. Where autocast asks for bf16, a GPU takes fp16 and a CPU float32.
    """
    device = image.device.type
    if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != torch.bfloat16:
        return codec.encode(image)
    with torch.autocast(device, torch.float16, enabled=device == "cuda"):
        return codec.encode(image)


@torch.no_grad()
def encode(image: Tensor, encoder: ImageEncoder, codec: nn.Module) -> dict[str, Tensor]:
    """What is archived of each image (B, 3, H, W) in [-1, 1].

    Returns "latent_mean" and "latent_logvar" (B, C, H/f, W/f), "cls" (B, cls_dim) and, where the
    encoder keeps layers, "patch" (B, T, feature_dim). Sampling calls it too, so that a photo's
    features equal archived ones, up to --precision and the number format on disk.
    """
    mean, logvar = encode_latent(image, codec)
    cls, patch = encoder(image)
    rows = {"latent_mean": mean, "latent_logvar": logvar, "cls": cls}
    if patch is not None:
        rows["patch"] = patch
    return rows


def add_encoder_flags(group) -> None:
    """The flags that choose what is frozen, shared by precompute_dino.py and train.py --online."""
    add = group.add_argument
    add("--image_size", type=positive_int, default=256, help="side of the images in pixels (4.1)")
    add(
        "--encoder",
        default=DINOV2,
        help="a timm ViT (3.3; CLIP for Zero-1-to-3's baseline)",
    )
    add(
        "--weights",
        default="pretrained",
        help="encoder's weights: pretrained, random, or a file, folder or hub name",
    )
    add(
        "--encoder_size",
        type=positive_int,
        default=224,
        help="the encoder's input in pixels: 16x16 patches",
    )
    add(
        "--layers",
        type=nonnegative_int,
        nargs="*",
        default=[5, 11, 17, 23],
        help="encoder blocks whose patch features are kept, from 0, shallow to deep "
        "(3.3 gives no numbers; ours)",
    )
    add(
        "--codec",
        choices=["sd", "pixels"],
        default="sd",
        help="SD's VAE, or lossless space-to-depth",
    )
    add(
        "--pixels_factor",
        type=positive_int,
        default=4,
        help="downsampling of --codec pixels",
    )
    add(
        "--vae",
        help="weights of --codec sd: any Stable Diffusion checkpoint or VAE, or a hub name",
    )
    add(
        "--val_fraction",
        type=fraction,
        default=0.01,
        help="share of objects held out, the last (4.1)",
    )


def open_frozen(
    args: argparse.Namespace, device: torch.device, tensors: dict[str, Tensor] | None = None
) -> tuple[ImageEncoder, nn.Module]:
    """(encoder, codec) that the flags of `add_encoder_flags` and --compile describe.

    tensors: what no public file holds, as `own_tensors` gives it. Both are on the device, the codec
    channels-last. Raises InputError.
    """
    codec = load_codec(args.codec, args.vae, args.pixels_factor)
    if args.image_size % codec.factor:
        raise InputError(
            f"--image_size {args.image_size} is not a multiple of the codec's factor {codec.factor}"
        )
    if args.codec == "sd" and codec.scale != AutoencoderKL.scale:
        say_scale(args.vae, codec.scale)
    saved, pca = split_own(tensors or {})
    weights = saved if args.weights == "random" and saved else args.weights
    encoder = ImageEncoder(args.encoder, weights, tuple(args.layers), args.encoder_size, pca)
    encoder = encoder.to(device)
    codec = codec.to(device, memory_format=torch.channels_last)
    if args.compile:
        compile_frozen(encoder, codec)
    return encoder, codec


@functools.cache
def say_scale(vae: str, scale: float) -> None:
    """Prints that a VAE has a scale of its own: once a process, and once a job of several ranks."""
    if is_rank_0():
        print(
            f"--vae {vae}: latents are multiplied by its own scaling_factor {scale:g}, "
            f"not by Stable Diffusion 1.x's {AutoencoderKL.scale}"
        )


def compile_frozen(encoder: ImageEncoder, codec: nn.Module | None = None) -> None:
    """Compiles the methods that are called, in place."""
    encoder.features = torch.compile(encoder.features)
    if codec is not None:
        codec.encode = torch.compile(codec.encode)


FROZEN_PREFIXES = ("encoder.", "pca.")


def own_tensors(encoder: ImageEncoder, pca: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What no public file holds of an encoder: random weights (encoder.*) and the PCA (pca.*).

    A checkpoint and an archive keep them under these names, those of FROZEN_PREFIXES.
    """
    tensors = {}
    if encoder.source == "random":
        for name, value in encoder.vit.state_dict().items():
            tensors[f"encoder.{name}"] = value.cpu().contiguous()
    if pca:
        for name, value in pca.items():
            tensors[f"pca.{name}"] = value.cpu().contiguous()
    return tensors


def split_own(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """(an encoder's weights or {}, its PCA or None) from `own_tensors`; other names are ignored."""
    weights, pca = (with_prefix(tensors, prefix) for prefix in FROZEN_PREFIXES)
    return weights, pca or None


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without the prefix."""
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def open_encoder(
    spec: dict, source: str | None = None, tensors: dict[str, Tensor] | None = None
) -> ImageEncoder:
    """The encoder of a spec: from --encoder_weights, else `own_tensors`, else where it came from.

    Raises InputError, also where it is another encoder than the spec's.
    """
    saved, pca = split_own(tensors or {})
    weights = str(source) if source else saved or spec["weights"]
    with hint("" if source else "; give the weights by --encoder_weights"):
        encoder = ImageEncoder(
            spec["name"], weights, tuple(spec["layers"]), spec["image_size"], pca
        )
    for key, value in encoder.spec().items():
        if key != "weights" and value != spec.get(key):
            raise InputError(
                f"--encoder_weights {source or spec['weights']}: not the {spec['name']} that the "
                "model was trained with"
            )
    return encoder


def open_codec(spec: dict, source: str | None = None, advice: str = "") -> nn.Module:
    """The codec of a spec: from --vae, else where it came from.

    The model knows latents of the spec's scale, whatever a folder says. Raises InputError, with the
    advice, also where it is another codec than the spec's.
    """
    weights = source or spec.get("source")
    with hint("" if source else f"; give the VAE by --vae{advice}"):
        codec = load_codec(spec["name"], weights, spec["factor"])
    if spec["name"] == "sd":
        codec.scale = spec["scale"]
    for key, value in codec_spec(codec).items():
        if key != "source" and value != spec.get(key):
            raise InputError(f"--vae {weights}: not the VAE that the model was trained with")
    return codec


# ---------------------------------------------------------------------------- opening checkpoints


def load_checkpoint(
    path: str,
    device="cpu",
    encoder_weights: str | None = None,
    vae: str | None = None,
    pose: str | None = None,
) -> tuple[NovelViewModel, ImageEncoder, nn.Module, dict]:
    """(model with EMA weights in eval mode, encoder, codec, meta) of a --ckpt: ours, or zero123's.

    encoder_weights, vae: where these weights are, unless the checkpoint knows. pose: --pose, the
    pose encoding of a checkpoint that is not ours ("zero123" unless it is given). meta: at least
    "image_size", "val_fraction", "encoder" and "codec". Raises InputError.
    """
    file = find_weights(path)
    found = read_model(file) if file.suffix == ".safetensors" and file.is_file() else None
    if found is None:
        model, encoder, codec, meta = open_foreign(path, encoder_weights, vae, pose)
    else:
        meta, tensors, model = found
        if pose not in (None, model.pose_encoding):
            raise InputError(f"--pose {pose}: {file} was trained with {model.pose_encoding}")
        with naming(f"{file}: its image encoder or codec cannot be built"):
            encoder = open_encoder(meta["encoder"], encoder_weights, tensors)
            codec = open_codec(meta["codec"], vae)
    model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    encoder = encoder.to(device)
    codec = codec.to(device, memory_format=torch.channels_last)
    return model, encoder, codec, meta


@contextlib.contextmanager
def naming(what: str):
    """Turns any error inside the block into an InputError that begins with `what`.

    The values in a damaged file can cause any error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({one_line(error)})") from None


def read_model(path: Path) -> tuple[dict, dict[str, Tensor], NovelViewModel] | None:
    """(metadata, all tensors, the model) that `save_model` wrote; None for a file of others.

    Raises InputError where the file is damaged, or its parts do not fit together.
    """
    found = read_checkpoint(path)
    if found is None:
        return None
    meta, tensors = found
    check_finite(tensors, path)
    # tools.convert can write them in half precision.
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    with naming(f"{path}: its weights do not fit its metadata"):
        check_values(meta)
        model = NovelViewModel(**meta["model"])
        own = {name: v for name, v in tensors.items() if not name.startswith(FROZEN_PREFIXES)}
        model.load_state_dict(own)
    return meta, tensors, model


def check_values(meta: dict) -> None:
    """Raises ValueError, or any other error, where the metadata's values cannot be a model's."""
    args = meta["model"]
    if args["latent_size"] * meta["codec"]["factor"] != meta["image_size"]:
        raise ValueError("latent_size is not the codec's")
    if args["feature_tokens"] != meta["encoder"]["tokens"]:
        raise ValueError("feature_tokens is not the encoder's")
    if not 0 <= meta["val_fraction"] <= 1:
        raise ValueError("val_fraction is not a fraction")
    if not 0 < meta["codec"]["scale"] < math.inf:
        raise ValueError("the codec's scale is not a positive number")
    # A damaged number must not make us build millions of blocks or allocate terabytes.
    if len(args["channel_mult"]) > 16 or args["num_res_blocks"] > 64:
        raise ValueError("absurd sizes")
    for value in args.values():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and number > 2**16 for number in numbers):
            raise ValueError("absurd sizes")


def open_foreign(
    path: str, encoder_weights: str | None, vae: str | None, pose: str | None
) -> tuple[NovelViewModel, ImageEncoder, nn.Module, dict]:
    """`load_checkpoint` of a zero123 checkpoint, whatever holds it."""
    parts = ["unet", "cc_projection"]
    if not vae:
        parts.append("vae")
    fetched = parts if encoder_weights else [*parts, "image_encoder"]
    source = locate(path, tuple(fetched))
    weights = read_weights(source, tuple(parts))
    with naming(f"--ckpt {path}: neither ours nor zero123's"):
        model_args = infer_args(weights, path)
        heads = read_heads(source)
        if heads is not None:
            model_args["num_heads"] = heads
        model = NovelViewModel(**model_args, pose_encoding=pose or "zero123")
    load_pretrained(model, weights, f"ckpt {path}")
    if pose is None and "stable" in str(path).lower():
        print(
            f"WARNING: {path}: by its name a Stable Zero123, whose fourth pose number is the "
            "input's elevation: give --pose elevation --input_elevation DEGREES, or --pose zero123"
        )

    with hint("" if encoder_weights else "; give CLIP by --encoder_weights"):
        encoder = ImageEncoder(CLIP, str(encoder_weights or source), layers=())
    encoder.source = str(encoder_weights or path)
    if encoder.cls_dim != model_args["cls_dim"]:
        raise InputError(
            f"--ckpt {path}: takes a CLS of {model_args['cls_dim']}, CLIP's has {encoder.cls_dim}"
        )
    codec = open_foreign_codec(path, source, weights, vae)
    meta = {
        "image_size": 256,
        "val_fraction": 0.01,
        "encoder": encoder.spec(),
        "codec": codec_spec(codec),
    }
    return model, encoder, codec, meta


def open_foreign_codec(
    path: str, source: Path, weights: dict[str, Tensor], vae: str | None
) -> AutoencoderKL:
    """The VAE of --vae, else the checkpoint's own, at the checkpoint's scale. Raises InputError."""
    scale = read_scale(source) or AutoencoderKL.scale
    if vae:
        codec = load_codec("sd", vae)
        theirs = read_scale(locate(vae, ("vae",)))
        if theirs not in (None, scale):
            raise InputError(
                f"--vae {vae}: its scaling_factor is {theirs:g}, that of --ckpt {path} is {scale:g}"
            )
    else:
        with hint("; give the VAE by --vae"):
            codec = load_autoencoder(weights, f"--ckpt {path}")
    codec.scale = scale
    return codec


@torch.no_grad()
def load_pretrained(model: NovelViewModel, weights: dict[str, Tensor], flag: str = "init") -> None:
    """Fills the model's UNet, cc_projection and pose MLP from `read_weights`'s tensors; reports.

    A conv_in without the condition's channels is extended with zeros, so that the network starts
    as the pretrained one (Zero-1-to-3). flag: where the weights come from, for messages: "init", or
    "ckpt FILE". Raises InputError, before anything is changed, where shapes disagree, the pose MLP
    has other layers, or a tenth of the UNet is missing.
    """
    own = model.state_dict()
    given = own_names(weights)
    given = extend_conv_in(given, own, flag)
    given = without_other_encoders(given, own, flag)
    wrong = [name for name in sorted(given) if name in own and given[name].shape != own[name].shape]
    if wrong:
        shapes = []
        for name in wrong[:3]:
            shapes.append(f"{name} {tuple(given[name].shape)} for {tuple(own[name].shape)}")
        raise InputError(f"--{flag}: {len(wrong)} tensors are of other shapes: {', '.join(shapes)}")
    missing = [name for name in own if name not in given]
    unused = [name for name in given if name not in own]
    # One layer more or less, and what fits in shape would be another layer's.
    other_layers = [name for name in missing + unused if name.startswith(POSE_MLP)]
    if other_layers and any(name in own for name in given if name.startswith(POSE_MLP)):
        raise InputError(
            f"--{flag}: its pose MLP has other layers ({', '.join(other_layers[:2])}); "
            "is it of another version of this code?"
        )
    covered = unet_share(own, given)
    if covered < 0.9:
        raise InputError(
            f"--{flag}: holds {covered:.0%} of the UNet, no {', '.join(missing[:3])}; is it SD 1.x?"
        )
    for name in own:
        if name in given:
            own[name].copy_(given[name])
    loaded = len(given) - len(unused)
    print(f"{flag}: loaded {loaded} tensors, {covered:.1%} of the UNet's parameters")
    print_names(flag, "missing, left as initialised", missing)
    print_names(flag, "left over, unused", unused)


def own_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of `read_weights`'s tensors that are the model's, under NovelViewModel's names."""
    given = {}
    for name, tensor in weights.items():
        if not name.startswith((PREFIX["unet"], PREFIX["cc_projection"], POSE_MLP)):
            continue
        own_name = name.replace(PREFIX["unet"], "unet.")
        # Some conversions hold LDM's 1x1 convolutions as linear layers.
        projection = own_name.endswith((".proj_in.weight", ".proj_out.weight"))
        given[own_name] = tensor[:, :, None, None] if projection and tensor.ndim == 2 else tensor
    return given


def extend_conv_in(given: dict, own: dict, flag: str) -> dict[str, Tensor]:
    """The given tensors, with zeros for the condition's input channels where conv_in lacks them."""
    name = "unet.input_blocks.0.0.weight"
    if name not in given or 2 * given[name].shape[1] != own[name].shape[1]:
        return given
    extended = torch.cat([given[name], torch.zeros_like(given[name])], dim=1)
    channels = extended.shape[1]
    print(f"{flag}: extended {name} to {channels} channels: those of the condition are zero")
    return {**given, name: extended}


def without_other_encoders(given: dict, own: dict, flag: str) -> dict[str, Tensor]:
    """The given tensors, without layers whose shapes show that they are for another encoder."""
    kept = dict(given)
    for part in ("unet.amalgamation.", "cc_projection."):
        names = [name for name in given if name.startswith(part)]
        if any(name in own and given[name].shape != own[name].shape for name in names):
            print(f"{flag}: {part}* left as initialised: the checkpoint's is another encoder's")
            for name in names:
                del kept[name]
    return kept


def unet_share(own: dict[str, Tensor], given: dict[str, Tensor]) -> float:
    """The share of the UNet's parameters, without the amalgamation, that are given."""
    total = 0
    covered = 0
    for name, tensor in own.items():
        if name.startswith("unet.") and "amalgamation" not in name:
            total += tensor.numel()
            if name in given:
                covered += tensor.numel()
    return covered / total


def print_names(flag: str, what: str, names: list[str]) -> None:
    """One line with the number of tensors and the first four; nothing where there is none."""
    if names:
        dots = " ..." if len(names) > 4 else ""
        print(f"{flag}: {len(names)} tensors {what}: {', '.join(names[:4])}{dots}")


def own_meta(path: str) -> dict | None:
    """The metadata of a checkpoint of ours; None for any other checkpoint. Raises InputError."""
    file = find_weights(path)
    return read_meta(file) if file.suffix == ".safetensors" and file.is_file() else None


def image_size(path: str) -> int:
    """The side in pixels of the images that a --ckpt makes: its own, or Zero-1-to-3's 256.

    Raises InputError.
    """
    meta = own_meta(path)
    if meta is None:
        return 256
    size = meta["image_size"]
    if type(size) is not int or not 0 < size <= 4096:
        raise InputError(f"{path}: malformed metadata, image_size {str(size)[:50]}")
    return size


def check_init(model: NovelViewModel, source: str, encoder: dict) -> None:
    """Raises InputError where an --init differs from the model in something that no shape shows.

    encoder: the spec of the model's encoder. Prints a line where --init is a checkpoint of ours
    that was trained with other features.
    """
    meta = own_meta(source)
    other_features = other_pose = False
    if meta is None:
        theirs = {"num_heads": read_heads(locate(source, ("unet", "cc_projection")))}
    else:
        with naming(f"--init {source}: malformed metadata"):
            theirs = {key: meta["model"][key] for key in ("prediction", "num_heads")}
            # tools.convert rounds an encoder's own weights, and notes what they were.
            features = meta["encoder"]
            hashes = features["sha256"], features.get("exact_sha256")
            other_features = (
                encoder["sha256"] not in hashes or encoder["layers"] != features["layers"]
            )
            other_pose = meta["model"].get("pose_encoding", "zero123") != model.pose_encoding
    for key, value in theirs.items():
        if value is not None and value != model.args[key]:
            raise InputError(f"--init {source}: its {key} is {value}, here it is {model.args[key]}")
    if other_features:
        print(f"init: {source} was trained with another image encoder, or other layers of it")
    if other_pose:
        print(f"init: {source} was trained with another pose encoding than --pose asks for")
