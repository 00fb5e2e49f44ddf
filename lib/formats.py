"""Foreign checkpoints: files, folders and hub repositories of Stable Diffusion, zero123, diffusers and transformers.

`read_weights` brings them all to LDM's names (and timm's, for CLIP), which are ours; `tools/convert.py` writes with the
same tables. Nothing here is needed to understand the method.
"""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lib.cli import InputError

# diffusers' folders: LDM's prefixes
PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "cc_projection": "cc_projection.",
}
PREFIX["image_encoder"] = "cond_stage_model."
# What Lightning and numpy leave in a checkpoint beside tensors. None of it is wanted, and none of it is run.
LEFTOVERS = [
    *(
        f"pytorch_lightning.callbacks.{name}"
        for name in ("base.Callback", "early_stopping.EarlyStopping")
    ),
    *(
        f"{pl}.callbacks.model_checkpoint.ModelCheckpoint"
        for pl in ("pytorch_lightning", "lightning.pytorch")
    ),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace"),
]


class Inert:
    """Stands for all of LEFTOVERS: takes any arguments and state, does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def count(names, pattern: str) -> int:
    """How many different values the pattern's group takes at the start of the names."""
    return len({match[1] for match in map(re.compile(pattern).match, names) if match})


# transformers and timm: CLIP

CLIP_NAMES = [line.split() for line in """
    conv1                   embeddings.patch_embedding            patch_embed.proj
    positional_embedding    embeddings.position_embedding.weight  pos_embed
    class_embedding         embeddings.class_embedding            cls_token
    transformer.resblocks.  encoder.layers.                       blocks.
    ln_pre.                 pre_layrnorm.                         norm_pre.
    ln_post.                post_layernorm.                       norm.
    ln_1.                   layer_norm1.                          norm1.
    ln_2.                   layer_norm2.                          norm2.
    attn.in_proj_           self_attn.qkv_proj.                   attn.qkv.
    attn.out_proj.          self_attn.out_proj.                   attn.proj.
    mlp.c_fc.               mlp.fc1.                              mlp.fc1.
    mlp.c_proj.             mlp.fc2.                              mlp.fc2.""".strip().splitlines()]  # fmt: skip
"""CLIP's vision tower in OpenAI's names (`visual.`), transformers' (`vision_model.`) and timm's."""


def clip_to_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIP names -> timm's. All else passes unchanged: timm itself converts OpenAI's CLIP and DINOv2."""
    if "visual_projection.weight" not in tensors:
        return dict(tensors)
    head = tensors["visual_projection.weight"]
    result = {"head.weight": head, "head.bias": torch.zeros(len(head))}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            tensor = torch.cat(
                [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            )
            name = name.replace("q_proj", "qkv_proj")
        elif "class_embedding" in name or "position_embedding.weight" in name:
            tensor = tensor.reshape(1, -1, tensor.shape[-1])
        for _, theirs, timms in CLIP_NAMES:
            name = name.replace(f"vision_model.{theirs}", timms).replace(f".{theirs}", f".{timms}")
        result[name] = tensor
    return result


# diffusers: UNet and VAE


def pairs(ours: str, theirs: str) -> list[tuple[str, str]]:
    return list(zip(ours.split(), theirs.split(), strict=True))


UNET_FIXED = pairs(
    "time_embed.0 time_embed.2 input_blocks.0.0",
    "time_embedding.linear_1 time_embedding.linear_2 conv_in",
)
UNET_FIXED += pairs("middle_block.0 middle_block.1", "mid_block.resnets.0 mid_block.attentions.0")
UNET_FIXED += pairs("middle_block.2 out.0 out.2", "mid_block.resnets.1 conv_norm_out conv_out")
UNET_LAYERS = pairs("in_layers.0 in_layers.2 emb_layers.1", "norm1 conv1 time_emb_proj")
UNET_LAYERS += pairs("out_layers.0 out_layers.3 skip_connection", "norm2 conv2 conv_shortcut")
VAE_LAYERS = pairs(
    "nin_shortcut norm q k v proj_out", "conv_shortcut group_norm to_q to_k to_v to_out.0"
)
VAE_LAYERS += pairs("q k v proj_out", "query key value proj_attn")  # old diffusers'


def translate(names, prefixes, layers, back: bool) -> dict[str, str]:
    """{name: translation} by (LDM, diffusers) prefixes and layers behind them, dots left out; unknown names stay."""
    order, result = -1 if back else 1, {name: name for name in names}
    prefixes, layers = (
        [[f"{part}." for part in pair[::order]] for pair in table] for table in (prefixes, layers)
    )
    for name in result:
        for old, new in (pair for pair in prefixes if name.startswith(pair[0])):
            rest = name.removeprefix(old)
            layer = next((pair for pair in layers if rest.startswith(pair[0])), ("", ""))
            result[name] = new + layer[1] + rest.removeprefix(layer[0])
    return result


def unet_names(names, back: bool = False) -> dict[str, str]:
    """{LDM's name: diffusers'} of a UNet's parameters, of any shape; back: {diffusers': LDM's}."""
    levels = (
        count(names, r"up_blocks\.(\d+)")
        if back
        else 1 + count(names, r"input_blocks\.(\d+)\.0\.op")
    )
    decoder = (
        count(names, r"up_blocks\.(\d+\.resnets\.\d+)")
        if back
        else count(names, r"output_blocks\.(\d+)")
    )
    blocks, table = decoder // max(levels, 1), list(UNET_FIXED)  # blocks a level, in the decoder
    for i in range(decoder):
        level, j = divmod(i, blocks)
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        table += [
            (f"output_blocks.{i}.0", f"{up}.resnets.{j}"),
            (f"output_blocks.{i}.1", f"{up}.attentions.{j}"),
        ]
        table += [(f"input_blocks.{i + 1}.0", f"{down}.resnets.{j}")]
        table += [(f"input_blocks.{i + 1}.1", f"{down}.attentions.{j}")]
        if j == blocks - 1:  # the upsampling comes behind the transformer, if there is one
            k = (
                2
                if {f"{up}.attentions.0.norm.weight", f"output_blocks.{i}.1.norm.weight"}
                & set(names)
                else 1
            )
            table += [(f"output_blocks.{i}.{k}.conv", f"{up}.upsamplers.0.conv")]
            table += [(f"input_blocks.{i + 1}.0.op", f"{down}.downsamplers.0.conv")]
    return translate(names, table, UNET_LAYERS, back)


def vae_names(names, back: bool = False) -> dict[str, str]:
    """{LDM's name: diffusers'} of an autoencoder's parameters, of any shape; back: {diffusers', new or old: LDM's}."""
    levels, table = count(names, r"encoder\.down(?:_blocks)?\.(\d+)"), []
    blocks = count(names, r"decoder\.up(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)")
    for side, way in (("encoder", "down"), ("decoder", "up")):
        table += [(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}") for i in (0, 1)]
        table += [(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")]
        table += [(f"{side}.norm_out", f"{side}.conv_norm_out")]
        for i in range(levels):  # LDM numbers the decoder's levels from fine to coarse
            ours, theirs = (
                f"{side}.{way}.{i if way == 'down' else levels - 1 - i}",
                f"{side}.{way}_blocks.{i}",
            )
            table += [(f"{ours}.block.{j}", f"{theirs}.resnets.{j}") for j in range(blocks)]
            table += [(f"{ours}.{way}sample", f"{theirs}.{way}samplers.0")]
    return translate(names, table, VAE_LAYERS, back)


# whole checkpoints


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one file, safetensors or torch's, memory-mapped where the format allows.

    A pickle runs nothing: InputError names the first global in it that is neither torch's own nor in LEFTOVERS.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(Inert, name) for name in LEFTOVERS]):
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # whatever a damaged file provokes in the parsers
        unsafe = (
            re.search(r"GLOBAL ([\w.]+)", str(error))
            if isinstance(error, pickle.UnpicklingError)
            else None
        )
        if unsafe:
            raise InputError(
                f"{path}: refused, its pickle asks for {unsafe[1]}, which weights do not need"
            ) from None
        if "TorchScript" in str(error):  # OpenAI's own CLIP file
            raise InputError(
                f"{path}: a program (TorchScript), not weights; take those that timm publishes"
            ) from None
        raise InputError(
            f"{path}: truncated, or no checkpoint that reads safely ({type(error).__name__})"
        ) from None
    for key in ("state_dict", "model"):
        loaded = (
            loaded[key]
            if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)
            else loaded
        )
    tensors = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {k: v for k, v in tensors if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors")
    return tensors


def find_weights(path: str | Path) -> Path:
    """The weights file of a run (its latest checkpoint), of a step folder, or the path itself. Raises InputError."""
    path = Path(path)
    if (path / "latest").is_file():
        name = (path / "latest").read_text(errors="replace").strip()
        if not re.fullmatch(r"step_\d{7}", name):
            raise InputError(f"{path / 'latest'}: names no checkpoint, {name[:20]!r}")
        path = path / name
    if (path / "model.safetensors").exists():
        return path / "model.safetensors"
    if path.is_dir() and not (path / "unet").exists():
        raise InputError(f"--ckpt {path}: no checkpoint in this folder")
    return path


def to_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A single model's tensors under LDM's names and prefix, told by the names; a whole LDM checkpoint unchanged."""
    if "unet.time_embed.0.weight" in tensors:  # our own
        return {
            re.sub("^unet\\.", PREFIX["unet"], name): tensor for name, tensor in tensors.items()
        }
    marks = {
        "time_embedding.linear_1.weight": "unet",
        "time_embed.0.weight": "unet",
        "encoder.conv_in.weight": "vae",
    }
    marks |= {
        "visual_projection.weight": "image_encoder",
        "projection.weight": "cc_projection",
    }  # zero123-hf's
    kind = next((kind for mark, kind in marks.items() if mark in tensors), None)
    names = {k: k.removeprefix("projection.") for k in tensors}
    if "time_embedding.linear_1.weight" in tensors:
        names = unet_names(tensors, back=True)
    elif "encoder.conv_norm_out.weight" in tensors:
        names = vae_names(tensors, back=True)
    result = {PREFIX.get(kind, "") + names[k]: v for k, v in tensors.items()}
    for (
        name,
        tensor,
    ) in (
        result.items()
    ):  # diffusers' attention in the autoencoder is linear, LDM's 1x1 convolutions
        if ".mid.attn_1." in name and tensor.ndim == 2:
            result[name] = tensor[:, :, None, None]
    return result


def infer_args(weights: dict[str, Tensor]) -> dict:
    """NovelViewModel's arguments from a zero123 checkpoint's shapes; the number of heads leaves none: SD 1.x's 8."""
    shapes = {k.removeprefix(PREFIX["unet"]): tuple(v.shape) for k, v in weights.items()}
    projection = shapes.get("cc_projection.weight")
    if "input_blocks.0.0.weight" not in shapes or not projection:
        raise InputError("--ckpt: neither ours nor zero123's: no UNet with a cc_projection in it")
    width, channels = shapes["input_blocks.0.0.weight"][:2]
    stages = 1 + count(shapes, r"input_blocks\.(\d+)\.0\.op")
    blocks = count(shapes, r"output_blocks\.(\d+)") // stages - 1
    first = [
        1 + stage * (blocks + 1) for stage in range(stages)
    ]  # the first residual block of each stage
    return dict(
        cls_dim=projection[1] - 4,
        context_dim=projection[0],
        in_channels=channels,
        out_channels=shapes["out.2.weight"][0],
        model_channels=width,
        channel_mult=tuple(
            shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] // width for i in first
        ),
        num_res_blocks=blocks,
        attention_resolutions=tuple(
            2**s for s, i in enumerate(first) if f"input_blocks.{i}.1.norm.weight" in shapes
        ),
    )


def read_weights(source: str | Path, parts: tuple[str, ...] = tuple(PREFIX)) -> dict[str, Tensor]:
    """Weights of Stable Diffusion 1.x, zero123 or their like under LDM's names, whatever holds them.

    source: a file (.safetensors, .ckpt, .pt, .pth, .bin; LDM's or diffusers' names), a diffusers folder, or the name
    of a hub repository, where there is no folder of its owner's name; parts: which of PREFIX. zero123's EMA replaces
    the raw UNet. Raises InputError, in one line, for what is absent, damaged, unsafe, or another model (SD 2.x, SDXL).
    """
    path = Path(source)
    hub = (
        re.fullmatch(r"[\w.-]+/[\w-][\w.-]*", str(source))
        and not path.exists()
        and not path.parent.is_dir()
    )
    if (path / "latest").is_file():  # a run of ours
        path = find_weights(path)
    if hub and path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        wanted = list(parts)
        for suffix in ("safetensors", "bin"):  # the latter for what there is no other of
            stems = [
                f"{part}/{'*' if part == 'image_encoder' else 'diffusion_pytorch_'}model"
                for part in wanted
            ]
            stems += ["diffusion_pytorch_model"] * ("vae" in wanted)  # a repository of a VAE alone
            path = from_hub(str(source), [f"{stem}.{suffix}" for stem in stems], "its path")
            wanted = [part for part in wanted if not any((path / part).glob(f"*.{suffix}"))]
            if not wanted or any(path.glob(f"*.{suffix}")):
                break
    tensors = {} if path.is_dir() else to_ldm(read_tensors(path))
    for folder in ("", *parts) if path.is_dir() else ():
        files = [*(path / folder).glob("*.safetensors")] or [*(path / folder).glob("*.bin")]
        if files:  # the shortest name is the plain one, before .fp16 and .non_ema
            tensors |= to_ldm(read_tensors(min(files, key=lambda file: len(file.name))))
    if not tensors:
        raise InputError(
            f"{source}: no weights in this folder, nor in any of {', '.join(parts)} in it"
        )
    context = {v.shape[1] for k, v in tensors.items() if k.endswith("attn2.to_k.weight")}
    linear = any(k.endswith("proj_in.weight") and v.ndim == 2 for k, v in tensors.items())
    other = (
        "XL"
        if 2048 in context
        else "2.x"
        if linear and 1024 in context and "unet" in parts
        else None
    )
    if other:
        raise InputError(
            f"{source}: a Stable Diffusion {other} checkpoint (context {max(context)}); 1.x is needed"
        )
    # zero123's LitEma keeps `model.diffusion_model.a.b` as `model_ema.diffusion_modelab`
    ema = {
        k: "model_ema." + k[6:].replace(".", "") for k in tensors if k.startswith(PREFIX["unet"])
    }
    if "unet" in parts and ema and all(name in tensors for name in ema.values()):
        print(f"{source}: taking the EMA of the UNet (model_ema.*), not its raw weights")
        tensors |= {k: tensors[name] for k, name in ema.items()}
    return {k: v for k, v in tensors.items() if k.startswith(tuple(PREFIX[part] for part in parts))}


def from_hub(repo: str, patterns: list[str], flag: str) -> Path:
    """The folder of a hub repository's snapshot, with the files that match. Raises InputError."""
    import huggingface_hub as hub
    from huggingface_hub.utils import get_session

    try:
        get_session().head(
            hub.constants.ENDPOINT, timeout=10
        )  # its client would retry for half a minute a file
        offline = hub.constants.HF_HUB_OFFLINE
    except Exception:  # of whichever HTTP library it uses
        offline = True
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # of whichever HTTP library it uses
        what = f"{repo}: neither here nor to be had from the hub ({type(error).__name__})"
        names = ", ".join(patterns[:: max(1, len(patterns) // 4)])
        raise InputError(
            f"{what}: fetch https://huggingface.co/{repo} ({names}) and give {flag}"
        ) from None
