"""Foreign checkpoints: of Stable Diffusion, zero123, diffusers and transformers, and of the hub.

They are files, folders or hub repositories. `read_weights` brings them all to LDM's names, which
are ours. tools/convert.py writes with the same tables. Nothing here is needed to understand the
method.
"""

import functools
import json
import math
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lib.cli import InputError, one_line

# The parts of a checkpoint, and LDM's prefix of each.
PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "cc_projection": "cc_projection.",
    "image_encoder": "cond_stage_model.",
}
# The folders in which diffusers pipelines keep a part. The first one that holds weights is read.
FOLDERS = {
    "unet": ("unet_ema", "unet"),
    "vae": ("vae",),
    "cc_projection": ("cc_projection", "clip_camera_projection"),
    "image_encoder": ("image_encoder",),
}
POSE_MLP = "pose_mlp."  # ours alone: the camera move's other way into the model
WEIGHTS_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def count(names, pattern: str) -> int:
    """How many different values the pattern's group takes at the start of the names."""
    found = set()
    for name in names:
        match = re.match(pattern, name)
        if match:
            found.add(match[1])
    return len(found)


# ---------------------------------------------------------------------------------------- one file

# What training leaves in a pickle beside the tensors. None of it is used, and none of it is run.
LEFTOVERS = [
    "argparse.Namespace",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "builtins.tuple",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "pytorch_lightning.callbacks.base.Callback",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "typing.Any",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Bytes", "Enum", "Float")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Integer", "Path", "String")),
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "PurePosixPath")),
    *(f"pathlib.{kind}" for kind in ("PureWindowsPath", "WindowsPath")),
    *(f"pathlib._local.{kind}" for kind in ("Path", "PosixPath", "PurePosixPath")),
    *(f"pathlib._local.{kind}" for kind in ("PureWindowsPath", "WindowsPath")),
]
LEFTOVER_DICTS = [
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
]


class Inert:
    """Stands for every class of LEFTOVERS: takes any arguments and state, does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class InertDict:
    """Stands for every class of LEFTOVER_DICTS: making one gives an empty dict."""

    def __new__(cls, *args):
        return {}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one file, safetensors or torch's, memory-mapped where the format allows it.

    The prefixes of DistributedDataParallel and torch.compile are taken off the names. No code in a
    pickle is run. Raises InputError where the file is absent, damaged, or asks for a class that is
    neither torch's own nor a leftover.
    """
    path = Path(path)
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file can cause any error in the parsers
        raise InputError(f"{path}: {why_unreadable(error)}") from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    tensors = only_tensors(loaded)
    if not tensors:
        raise InputError(f"{path}: holds no tensors")
    return tensors


def load_pickle(path: Path):
    """What torch.save wrote, with something inert in the place of every leftover."""
    inert = [(Inert, name) for name in LEFTOVERS]
    inert += [(InertDict, name) for name in LEFTOVER_DICTS]
    with torch.serialization.safe_globals(inert):
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )


def why_unreadable(error: Exception) -> str:
    """What to tell about a file that torch or safetensors could not read."""
    unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
    if unsafe and isinstance(error, pickle.UnpicklingError):
        return f"refused, its pickle asks for {unsafe[1]}, which weights do not need"
    if "TorchScript" in str(error):  # OpenAI's own CLIP file
        return "a program (TorchScript), not weights; take those that timm publishes"
    return f"truncated, or no checkpoint that reads safely ({type(error).__name__})"


def only_tensors(loaded) -> dict[str, Tensor]:
    """The tensors of a state dict, under their plain names; {} where it is no dict."""
    tensors = {}
    if isinstance(loaded, dict):
        for name, value in loaded.items():
            if isinstance(name, str) and isinstance(value, Tensor):
                plain = name.replace("_orig_mod.", "").removeprefix("module.")
                tensors[plain] = value
    return tensors


def check_finite(tensors: dict[str, Tensor], source: str | Path) -> None:
    """Raises InputError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        # A sum is finite only if every value is. It takes a 25th of isfinite().all()'s time.
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            raise InputError(f"{source}: {name} holds values that are not finite (NaN or infinity)")


# --------------------------------------------------------------- image encoders: transformers, timm

# CLIP's vision tower in OpenAI's names (behind `visual.`), transformers' (behind `vision_model.`)
# and timm's.
CLIP_NAMES = [
    ("conv1", "embeddings.patch_embedding", "patch_embed.proj"),
    ("positional_embedding", "embeddings.position_embedding.weight", "pos_embed"),
    ("class_embedding", "embeddings.class_embedding", "cls_token"),
    ("transformer.resblocks.", "encoder.layers.", "blocks."),
    ("ln_pre.", "pre_layrnorm.", "norm_pre."),
    ("ln_post.", "post_layernorm.", "norm."),
    ("ln_1.", "layer_norm1.", "norm1."),
    ("ln_2.", "layer_norm2.", "norm2."),
    ("attn.in_proj_", "self_attn.qkv_proj.", "attn.qkv."),
    ("attn.out_proj.", "self_attn.out_proj.", "attn.proj."),
    ("mlp.c_fc.", "mlp.fc1.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2.", "mlp.fc2."),
]
# DINOv2 in transformers' names and in Meta's own, which timm converts itself.
DINOV2_NAMES = [
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),  # cls_token, mask_token, register_tokens
    ("encoder.layer.", "blocks."),
    ("attention.attention.qkv.", "attn.qkv."),
    ("attention.output.dense.", "attn.proj."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in.", "mlp.w12."),
    ("mlp.weights_out.", "mlp.w3."),
    ("layernorm.", "norm."),
]


def clip_to_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of an image encoder, CLIP or DINOv2 -> those that timm reads.

    Other names pass unchanged: timm itself converts OpenAI's CLIP and Meta's DINOv2.
    """
    if "visual_projection.weight" in tensors:
        return transformers_clip_to_timm(tensors)
    tensors = {name.removeprefix("dinov2."): tensor for name, tensor in tensors.items()}
    if "embeddings.cls_token" in tensors:
        return transformers_dinov2_to_meta(tensors)
    return tensors


def transformers_clip_to_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's vision tower in transformers' names -> timm's. The text tower is left out."""
    head = tensors["visual_projection.weight"]
    result = {"head.weight": head, "head.bias": torch.zeros(len(head))}
    tower = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    for name, tensor in merge_qkv(tower, ("q_proj", "k_proj", "v_proj"), "qkv_proj").items():
        timm_name = name.removeprefix("vision_model")
        for _, theirs, timms in CLIP_NAMES:
            timm_name = timm_name.replace(f".{theirs}", f".{timms}")
        result[timm_name.removeprefix(".")] = tensor
    for name in ("cls_token", "pos_embed"):  # timm's have a batch axis
        result[name] = result[name].reshape(1, -1, result[name].shape[-1])
    return result


def transformers_dinov2_to_meta(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 in transformers' names -> Meta's."""
    result = {}
    for name, tensor in merge_qkv(tensors, ("query", "key", "value"), "qkv").items():
        meta_name = name
        for theirs, metas in DINOV2_NAMES:
            meta_name = meta_name.replace(theirs, metas)
        result[meta_name] = tensor
    return result


def merge_qkv(tensors: dict[str, Tensor], parts: tuple, merged: str) -> dict[str, Tensor]:
    """One tensor `merged` in the place of the three that are named after query, key and value."""
    query, key, value = (f".{part}." for part in parts)
    result = {}
    for name, tensor in tensors.items():
        if query in name:
            three = [tensor, tensors[name.replace(query, key)], tensors[name.replace(query, value)]]
            result[name.replace(query, f".{merged}.")] = torch.cat(three)
        elif key not in name and value not in name:
            result[name] = tensor
    return result


# -------------------------------------------------------------------------- diffusers: UNet and VAE

# Modules and layers in LDM's names and in diffusers'. A parameter's name is MODULE.LAYER.weight, or
# MODULE.weight.
UNET_MODULES = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("middle_block.0", "mid_block.resnets.0"),
    ("middle_block.1", "mid_block.attentions.0"),
    ("middle_block.2", "mid_block.resnets.1"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
]
UNET_LAYERS = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
]
VAE_LAYERS = [
    ("nin_shortcut", "conv_shortcut"),
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
    # What diffusers wrote until 2023.
    ("q", "query"),
    ("k", "key"),
    ("v", "value"),
    ("proj_out", "proj_attn"),
]


def unet_names(names, back: bool = False) -> dict[str, str]:
    """{LDM's name: diffusers' name} of a UNet's parameters, of any size.

    back: {diffusers' name: LDM's name}. Unknown names stay.
    """
    if back:
        levels = count(names, r"up_blocks\.(\d+)")
        blocks = count(names, r"up_blocks\.0\.resnets\.(\d+)") - 1
    else:
        levels = 1 + count(names, r"input_blocks\.(\d+)\.0\.op")
        blocks = count(names, r"output_blocks\.(\d+)") // levels - 1
    modules = list(UNET_MODULES)
    for level in range(levels):
        modules += unet_level(names, level, blocks)
    return translate(names, modules, UNET_LAYERS, back)


def unet_level(names, level: int, blocks: int) -> list[tuple[str, str]]:
    """(LDM, diffusers) modules of a level of the encoder, and of the decoder, of a UNet.

    The encoder's level 0 is the finest, the decoder's the coarsest. The encoder has `blocks`
    residual blocks a level and the decoder one more. LDM counts through all levels: a downsampling
    is an input block of its own, an upsampling is part of the level's last output block.
    """
    first = level * (blocks + 1)
    last = first + blocks
    down = f"down_blocks.{level}"
    up = f"up_blocks.{level}"
    modules = [(f"input_blocks.{last + 1}.0.op", f"{down}.downsamplers.0.conv")]
    for j in range(blocks):
        modules.append((f"input_blocks.{first + 1 + j}.0", f"{down}.resnets.{j}"))
        modules.append((f"input_blocks.{first + 1 + j}.1", f"{down}.attentions.{j}"))
    for j in range(blocks + 1):
        modules.append((f"output_blocks.{first + j}.0", f"{up}.resnets.{j}"))
        modules.append((f"output_blocks.{first + j}.1", f"{up}.attentions.{j}"))
    # The upsampling stands behind the transformer, where the level has one.
    norms = (f"{up}.attentions.0.norm.weight", f"output_blocks.{last}.1.norm.weight")
    place = 2 if any(norm in names for norm in norms) else 1
    modules.append((f"output_blocks.{last}.{place}.conv", f"{up}.upsamplers.0.conv"))
    return modules


def vae_names(names, back: bool = False) -> dict[str, str]:
    """{LDM's name: diffusers' name} of an autoencoder's parameters, of any size.

    back: {diffusers' name, new or old: LDM's name}. Unknown names stay.
    """
    levels = count(names, r"encoder\.down(?:_blocks)?\.(\d+)")
    blocks = count(names, r"decoder\.up(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)")
    modules = []
    for side, way in (("encoder", "down"), ("decoder", "up")):
        modules += [
            (f"{side}.mid.block_1", f"{side}.mid_block.resnets.0"),
            (f"{side}.mid.block_2", f"{side}.mid_block.resnets.1"),
            (f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"),
            (f"{side}.norm_out", f"{side}.conv_norm_out"),
        ]
        for level in range(levels):
            # LDM numbers the decoder's levels from fine to coarse, diffusers as they run.
            ldm_level = level if way == "down" else levels - 1 - level
            ours = f"{side}.{way}.{ldm_level}"
            theirs = f"{side}.{way}_blocks.{level}"
            modules.append((f"{ours}.{way}sample", f"{theirs}.{way}samplers.0"))
            for j in range(blocks):
                modules.append((f"{ours}.block.{j}", f"{theirs}.resnets.{j}"))
    return translate(names, modules, VAE_LAYERS, back)


def translate(names, modules: list, layers: list, back: bool) -> dict[str, str]:
    """{name: translation} by pairs (LDM's, diffusers') of modules and of the layers in them.

    back: from diffusers' names to LDM's. Names of no module stay.
    """
    if back:
        modules = [(theirs, ours) for ours, theirs in modules]
        layers = [(theirs, ours) for ours, theirs in layers]
    result = {}
    for name in names:
        matching = [pair for pair in modules if name.startswith(f"{pair[0]}.")]
        if matching:
            # `output_blocks.2.1.conv` is another module than `output_blocks.2.1`.
            old, new = max(matching, key=lambda pair: len(pair[0]))
            result[name] = f"{new}.{translate_layer(name.removeprefix(f'{old}.'), layers)}"
        else:
            result[name] = name
    return result


def translate_layer(name: str, layers: list[tuple[str, str]]) -> str:
    """The name with its first layer translated by pairs (old, new), where one of them fits."""
    for old, new in layers:
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


# ------------------------------------------------------------------------------- whole checkpoints

# A name by which one model alone is recognised, and the part of a checkpoint that the model is.
MARKS = {
    "time_embedding.linear_1.weight": "unet",  # diffusers'
    "time_embed.0.weight": "unet",
    "encoder.conv_in.weight": "vae",
    "visual_projection.weight": "image_encoder",  # transformers' CLIP
    "embeddings.cls_token": "image_encoder",  # transformers' DINOv2
    "projection.weight": "cc_projection",  # zero123-hf's
}


def to_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under LDM's names and prefixes.

    They are those of one model, which is told by its names, or a whole checkpoint of ours or LDM's.
    """
    if "unet.time_embed.0.weight" in tensors:  # ours
        return {re.sub(r"^unet\.", PREFIX["unet"], k): v for k, v in tensors.items()}
    part = which_part(tensors)
    prefix = PREFIX[part] if part else ""
    names = {name: name for name in tensors}
    if "time_embedding.linear_1.weight" in tensors:
        names = unet_names(tensors, back=True)
    elif "encoder.conv_norm_out.weight" in tensors:
        names = vae_names(tensors, back=True)
    elif part == "cc_projection":
        names = {name: name.split(".")[-1] for name in tensors}
    result = {}
    for name, tensor in tensors.items():
        ldm_name = prefix + names[name]
        # The autoencoder's attention is linear in diffusers; in LDM it is made of 1x1 convolutions.
        linear = ".mid.attn_1." in ldm_name and tensor.ndim == 2
        result[ldm_name] = tensor[:, :, None, None] if linear else tensor
    return result


def which_part(tensors: dict[str, Tensor]) -> str | None:
    """Which of PREFIX's parts the tensors of one model are; None for a whole checkpoint."""
    for mark, part in MARKS.items():
        if mark in tensors:
            return part
    if set(tensors) == {
        "proj.weight",
        "proj.bias",
    }:  # clip_camera_projection/ of zero123-xl-diffusers
        return "cc_projection"
    return None


def infer_args(weights: dict[str, Tensor], source: str | Path) -> dict:
    """NovelViewModel's arguments from the shapes in a zero123 checkpoint.

    The number of heads leaves no trace in the shapes. Raises InputError where there is no UNet or
    no cc_projection, and any error where the shapes are not a UNet's.
    """
    shapes = {name.removeprefix(PREFIX["unet"]): tuple(v.shape) for name, v in weights.items()}
    if "input_blocks.0.0.weight" not in shapes or "cc_projection.weight" not in shapes:
        raise InputError(
            f"--ckpt {source}: neither ours nor zero123's: no UNet with a cc_projection in it"
        )
    context_dim, cls_and_pose = shapes["cc_projection.weight"]
    width, in_channels = shapes["input_blocks.0.0.weight"][:2]
    levels = 1 + count(shapes, r"input_blocks\.(\d+)\.0\.op")
    blocks = count(shapes, r"output_blocks\.(\d+)") // levels - 1
    channel_mult = []
    attention_resolutions = []
    for level in range(levels):
        first_block = 1 + level * (blocks + 1)
        channels = shapes[f"input_blocks.{first_block}.0.out_layers.3.weight"][0]
        channel_mult.append(channels // width)
        if f"input_blocks.{first_block}.1.norm.weight" in shapes:
            attention_resolutions.append(2**level)
    return {
        "cls_dim": cls_and_pose - 4,
        "context_dim": context_dim,
        "in_channels": in_channels,
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": width,
        "channel_mult": tuple(channel_mult),
        "num_res_blocks": blocks,
        "attention_resolutions": tuple(attention_resolutions),
    }


def read_weights(source: str | Path, parts: tuple[str, ...] = tuple(PREFIX)) -> dict[str, Tensor]:
    """Weights of Stable Diffusion 1.x, zero123 or their like under LDM's names.

    source: a file (.safetensors, .ckpt, .pt, .pth, .bin; LDM's or diffusers' names), a diffusers
        folder, a checkpoint folder of accelerate, a run of ours, or the name of a hub repository.
    parts: which of PREFIX.

    An EMA of the UNet replaces its raw weights. Raises InputError, in one line, for what is absent,
    damaged, unsafe, not finite, or another model (SD 2.x, SDXL).
    """
    path = locate(source, parts)
    tensors = read_folder(path, parts) if path.is_dir() else to_ldm(read_tensors(path))
    refuse_other_models(tensors, parts, source)
    if "unet" in parts:
        tensors = take_ema(tensors, source)
    prefixes = tuple(PREFIX[part] for part in parts)
    if "cc_projection" in parts:
        prefixes += (POSE_MLP,)
    wanted = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
    check_finite(wanted, source)
    return wanted


def read_image_encoder(source: str | Path) -> dict[str, Tensor]:
    """An image encoder's weights without LDM's prefix.

    source: what `read_weights` reads, or a file of the encoder alone. Raises InputError.
    """
    path = Path(source)
    prefix = PREFIX["image_encoder"]
    if path.is_file():
        tensors = read_tensors(path)
        beside_unet = {name: v for name, v in tensors.items() if name.startswith(prefix)}
        tensors = beside_unet or tensors
        check_finite(tensors, source)
    else:
        tensors = read_weights(source, ("image_encoder",))
    # LDM holds OpenAI's CLIP as `model.`, transformers' as `transformer.`.
    pattern = re.escape(prefix) + r"(model\.|transformer\.)?"
    return {re.sub(f"^{pattern}", "", name): tensor for name, tensor in tensors.items()}


def refuse_other_models(tensors: dict[str, Tensor], parts: tuple, source: str | Path) -> None:
    """Raises InputError where the UNet's context is as wide as that of SD XL or 2.x."""
    widths = {v.shape[1] for k, v in tensors.items() if k.endswith("attn2.to_k.weight")}
    linear = any(k.endswith("proj_in.weight") and v.ndim == 2 for k, v in tensors.items())
    other = None
    if 2048 in widths:
        other = "XL"
    elif 1024 in widths and linear and "unet" in parts:
        other = "2.x"
    if other:
        raise InputError(
            f"{source}: a Stable Diffusion {other} checkpoint (context {max(widths)}); "
            "1.x is needed"
        )


def take_ema(tensors: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The tensors with the UNet's EMA in the place of its raw weights, where the file holds one.

    LDM keeps the EMA of `model.diffusion_model.a.b` as `model_ema.diffusion_modelab`. Where it
    averages some of the tensors only, the others stay raw, as in LDM.
    """
    result = dict(tensors)
    raw = [name for name in tensors if name.startswith(PREFIX["unet"])]
    taken = 0
    for name in raw:
        shadow = "model_ema." + name.removeprefix("model.").replace(".", "")
        if shadow in tensors:
            result[name] = tensors[shadow]
            taken += 1
    if taken:
        print(
            f"{source}: taking the EMA (model_ema.*) of {taken} of the UNet's {len(raw)} tensors, "
            "not their raw weights"
        )
    return result


# ---------------------------------------------------------------------------------------- folders

SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
# Files that end as weights do and are not: what accelerate and transformers save to resume.
NOT_WEIGHTS = ("optimizer", "scheduler", "sampler", "training_args")


def read_folder(folder: Path, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of a diffusers folder, or of a folder of weights files, under LDM's names."""
    tensors = {}
    for models in (weights_files(folder), *(part_files(folder, part) for part in parts)):
        for files in models:
            model = {}
            for file in files:
                model.update(read_tensors(file))
            tensors.update(to_ldm(model))
    if not tensors:
        raise InputError(
            f"{folder}: no weights in this folder, nor in any of {', '.join(parts)} in it"
        )
    return tensors


def part_files(folder: Path, part: str) -> list[list[Path]]:
    """`weights_files` of the part's own folder; [] where there is none."""
    for name in FOLDERS[part]:
        models = weights_files(folder / name)
        if models:
            if name == "unet_ema":
                print(f"{folder}: taking the UNet's EMA of unet_ema/, not the raw weights")
            return models
    return []


def weights_files(folder: Path) -> list[list[Path]]:
    """The weights files in a folder: a list for each model, longer than one where it is sharded.

    There are several models only as accelerate numbers them (model, model_1, ...). Of the same
    model's variants (.fp16, .non_ema) the plain one is taken. Raises InputError where a shard is
    missing.
    """
    models = {}
    for suffix in (".safetensors", ".bin"):
        models = models or group_files(folder, suffix)
    if not models:
        return []
    plain = min(models, key=len)
    numbered = re.compile(re.escape(plain) + r"(_\d+)?")
    return [files for name, files in models.items() if numbered.fullmatch(name)]


def group_files(folder: Path, suffix: str) -> dict[str, list[Path]]:
    """{a model's name: its files of this suffix} in a folder."""
    models = {}
    for file in sorted(folder.glob(f"*{suffix}")):
        shard = SHARD.fullmatch(file.stem)
        if not shard and not file.stem.startswith(NOT_WEIGHTS):
            models[file.stem] = [file]
        elif shard and shard[1] not in models:
            files = sorted(folder.glob(f"{shard[1]}-*-of-{shard[2]}{suffix}"))
            if len(files) != int(shard[2]):
                raise InputError(
                    f"{file}: one of {int(shard[2])} shards, only {len(files)} are in its folder"
                )
            models[shard[1]] = files
    return models


def find_weights(path: str | Path) -> Path:
    """The model.safetensors of a run (its latest checkpoint) or of a step folder.

    Any other path is returned as it is. Raises InputError for a folder without a checkpoint.
    """
    path = Path(path)
    if path.name == "state.pt" and (path.parent / "model.safetensors").exists():
        raise InputError(f"{path}: holds what resuming takes; give its folder, {path.parent}")
    if (path / "latest").is_file():
        name = (path / "latest").read_text(errors="replace").strip()
        if not re.fullmatch(r"step_\d{7}", name):
            raise InputError(f"{path / 'latest'}: names no checkpoint, {name[:20]!r}")
        path = path / name
    if (path / "model.safetensors").exists():
        return path / "model.safetensors"
    if path.is_dir():
        folders = ["", "unet", "unet_ema"]
        if not any(weights_files(path / folder) for folder in folders):
            raise InputError(f"{path}: no checkpoint in this folder")
    return path


def read_config(path: Path) -> dict:
    """A diffusers config.json; {} where there is no such file. Raises InputError."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a diffusers configuration ({one_line(error)})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a diffusers configuration")
    return config


def read_heads(path: str | Path) -> int | None:
    """The attention heads of a diffusers folder's UNet; None where no config.json says."""
    for folder in FOLDERS["unet"]:
        file = Path(path, folder, "config.json")
        if file.is_file():
            return read_config(file).get("attention_head_dim", 8)  # diffusers' misnomer
    return None


def read_scale(path: str | Path) -> float | None:
    """By what a diffusers VAE's latents are multiplied; None where no config.json says.

    path: a pipeline's folder, a VAE's folder, or a weights file in it. Raises InputError.
    """
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    for file in (folder / "vae" / "config.json", folder / "config.json"):
        scale = read_config(file).get("scaling_factor")
        if scale is None:
            continue
        if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise InputError(f"{file}: scaling_factor {scale!r} is no positive number")
        return float(scale)
    return None


# ------------------------------------------------------------------------------------------ the hub

# Names of folders that people give to their own files. `runs/full` that does not exist is a typing
# error, though it reads as a hub's OWNER/NAME.
LOCAL_FOLDERS = ("checkpoints", "ckpt", "ckpts", "data", "logs", "models", "out", "output")
LOCAL_FOLDERS += ("outputs", "results", "runs", "tmp", "weights")
# Full precision first; (".fp16", "bin") means `diffusion_pytorch_model.fp16.bin`.
HUB_VARIANTS = (("", "safetensors"), ("", "bin"), (".fp16", "safetensors"), (".fp16", "bin"))


def is_hub_name(source: str | Path) -> bool:
    """Whether this is the name of a hub repository, OWNER/NAME, and nothing on this disk."""
    path = Path(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        return False
    if path.exists() or path.parent.is_dir():
        return False
    return path.suffix not in WEIGHTS_SUFFIXES and path.parts[0] not in LOCAL_FOLDERS


def may_exist(source: str | Path) -> bool:
    """Whether this is on this disk, or could be on the hub."""
    return Path(source).exists() or is_hub_name(source)


def locate(source: str | Path, parts: tuple[str, ...]) -> Path:
    """The file or folder on this disk that holds the weights. What lies on the hub is fetched.

    Raises InputError.
    """
    path = Path(source)
    if (path / "latest").is_file():  # a run of ours
        return find_weights(path)
    if is_hub_name(source):
        return fetch(str(source), parts)
    if not path.exists():
        raise InputError(f"{source}: no such file or run")
    if path.is_file() and SHARD.fullmatch(path.stem):
        raise InputError(f"{source}: one of several shards; give their folder, {path.parent}")
    return path


def fetch(repo: str, parts: tuple[str, ...]) -> Path:
    """The folder of a hub repository, with the weights of these parts that it has."""
    missing = list(parts)
    for variant, suffix in HUB_VARIANTS:
        patterns = []
        for part in missing:
            patterns += hub_patterns(part, variant, suffix)
        folder = from_hub(repo, patterns, "its path")
        missing = [part for part in missing if not has_part(folder, part)]
        if not missing:
            break
    return folder


def has_part(folder: Path, part: str) -> bool:
    """Whether a repository's folder holds the part, or a model alone, which may be the part."""
    return any(weights_files(folder / name) for name in ("", *FOLDERS[part]))


def hub_patterns(part: str, variant: str, suffix: str) -> list[str]:
    """The files of a hub repository that hold a part: its weights, whole or sharded, and config."""
    stems = ["diffusion_pytorch_model"]
    if part == "image_encoder":
        stems = ["model", "pytorch_model"]
    places = [f"{folder}/" for folder in FOLDERS[part]]
    if part in ("vae", "image_encoder"):
        places.append("")  # a repository of this model alone
    patterns = []
    for place in places:
        for stem in stems:
            patterns.append(f"{place}{stem}{variant}.{suffix}")
            patterns.append(f"{place}{stem}{variant}-*-of-*.{suffix}")
        patterns.append(f"{place}config.json")
    return patterns


def from_hub(repo: str, patterns: list[str], flag: str) -> Path:
    """The folder of a hub repository's snapshot, with the files that match.

    Without the hub, what was fetched before is used. Raises InputError where there is nothing.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo, allow_patterns=patterns, local_files_only=not hub_answers(repo)
        )
    except Exception as error:  # of whichever HTTP library it uses
        names = [name for name in patterns if "*" not in name and not name.endswith(".json")]
        raise InputError(
            f"{repo}: neither here nor to be had from the hub ({type(error).__name__}): "
            f"fetch https://huggingface.co/{repo} ({', '.join(names)}) and give {flag}"
        ) from None
    return Path(folder)


@functools.cache
def hub_answers(repo: str) -> bool:
    """Whether the hub has the repository and says so within ten seconds. Asked once in a process.

    snapshot_download itself waits for ever for a server that accepts the connection and is silent.
    """
    import huggingface_hub

    try:
        huggingface_hub.HfApi().repo_info(repo, timeout=10)
    except Exception:  # of whichever HTTP library it uses
        return False
    return True
