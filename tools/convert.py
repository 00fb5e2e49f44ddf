"""Write a trained model in another format, or in half the size.

    python -m tools.convert --ckpt runs/zero123 --out zero123.ckpt    # zero123's code, threestudio
    python -m tools.convert --ckpt zero123-xl.ckpt --out folder        # diffusers
    python -m tools.convert --ckpt runs/small --out small.safetensors  # ours, in float16

runs/zero123 was trained with --encoder CLIP's and --no-amalgamate. A model that amalgamates
features, or takes its pose by an MLP, has no place in those codebases and is refused.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

import pretrained
from data import POSE_ENCODINGS
from lib.autoencoder import AutoencoderKL
from lib.checkpoints import read_checkpoint, write_model_file
from lib.cli import ArgumentParser, InputError, run_script
from lib.files import save_tensors, write_atomically
from lib.formats import (
    CLIP_NAMES,
    PREFIX,
    WEIGHTS_SUFFIXES,
    count,
    find_weights,
    unet_names,
    vae_names,
)
from model import NovelViewModel
from pretrained import ImageEncoder

# ---------------------------------------------------------------------------- what can be exported


def check_exportable(model: NovelViewModel, codec: nn.Module, encoder: ImageEncoder) -> None:
    """Raises InputError where zero123's code and diffusers could not represent the model."""
    if encoder.name != pretrained.CLIP:
        raise InputError(
            f"--ckpt: conditioned on {encoder.name}; "
            "zero123's code and pipelines know its CLIP only"
        )
    if model.args.get("pose_embedding", "token") != "token":
        raise InputError(
            "--ckpt: the model takes its pose by an MLP, which zero123's and diffusers' UNets lack"
        )
    amalgamation = model.unet.state_dict().get("amalgamation.weight")
    if amalgamation is not None and amalgamation.any():
        raise InputError(
            "--ckpt: the model amalgamates patch features, "
            "which zero123's and diffusers' UNets cannot"
        )
    if not isinstance(codec, AutoencoderKL) or model.prediction != "eps":
        raise InputError(
            "--ckpt: zero123 and diffusers need Stable Diffusion's codec (not pixels) and eps "
            f"(not {model.prediction})"
        )


def float_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors in float32 on the CPU, without an amalgamation: it is zero."""
    state = {}
    for name, value in module.state_dict().items():
        if name != "amalgamation.weight":
            state[name] = value.float().cpu()
    return state


# ------------------------------------------------------------------------------------ LDM's format


def write_ldm(
    path: str | Path, model: NovelViewModel, codec: nn.Module, encoder: ImageEncoder
) -> None:
    """A .ckpt for zero123's own code and threestudio.

    It holds everything, because their loader leaves random what is missing. They sample with the
    EMA: the weights are the raw ones and the EMA at once, which share their memory on disk.
    Raises InputError where they could not represent the model.
    """
    check_exportable(model, codec, encoder)
    heads = model.args.get("num_heads", 8)
    if heads != 8:
        raise InputError(
            f"--ckpt: {heads} attention heads; a .ckpt doesn't hold the number, "
            "and its readers take 8"
        )
    state = {}
    for name, value in float_state(model.unet).items():
        state[PREFIX["unet"] + name] = value
        state["model_ema.diffusion_model" + name.replace(".", "")] = value
    state["model_ema.decay"] = torch.tensor(0.9999)
    state["model_ema.num_updates"] = torch.tensor(0, dtype=torch.int32)
    for name, value in float_state(codec).items():
        state[PREFIX["vae"] + name] = value
    for name, value in clip_to_openai(encoder.vit.state_dict()).items():
        state[f"cond_stage_model.model.{name}"] = value.cpu()
    for name, value in float_state(model.cc_projection).items():
        state[PREFIX["cc_projection"] + name] = value
    checkpoint = {"state_dict": state, "global_step": 0}
    write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))


def clip_to_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's CLIP names -> OpenAI's, those of zero123's `cond_stage_model.model`."""
    # OpenAI's projection has no bias, and timm's bias is zero.
    result = {"visual.proj": state["head.weight"].T.contiguous()}
    for name, tensor in state.items():
        if name.startswith("head."):
            continue
        openai_name = f".{name}"
        for openai, _, timms in CLIP_NAMES:
            openai_name = openai_name.replace(f".{timms}", f".{openai}")
        shape = tensor.shape
        if name == "pos_embed":  # timm's two have a batch axis
            shape = shape[1:]
        elif name == "cls_token":
            shape = shape[2:]
        result[f"visual{openai_name}"] = tensor.reshape(shape)
    return result


# ------------------------------------------------------------------------------ diffusers' format


def write_diffusers(
    folder: str | Path, model: NovelViewModel, codec: nn.Module, encoder: ImageEncoder
) -> None:
    """Folders unet/, vae/ and zero123-hf's cc_projection/, each with its config.json.

    Raises InputError where diffusers could not represent the model.
    """
    check_exportable(model, codec, encoder)
    unet = diffusers_unet(model)
    vae = diffusers_vae(codec)
    projection = {f"projection.{k}": v for k, v in float_state(model.cc_projection).items()}
    context_dim, cls_and_pose = model.cc_projection.weight.shape
    projection_config = {
        "_class_name": "CCProjection",
        "in_channel": cls_and_pose,
        "out_channel": context_dim,
    }
    write_model(Path(folder, "unet"), unet, unet_config(model, unet))
    write_model(Path(folder, "vae"), vae, vae_config(codec, vae))
    write_model(Path(folder, "cc_projection"), projection, projection_config)


def diffusers_unet(model: NovelViewModel) -> dict[str, Tensor]:
    """The UNet's tensors under diffusers' names."""
    unet = float_state(model.unet)
    return {new: unet[old] for old, new in unet_names(unet).items()}


def diffusers_vae(codec: AutoencoderKL) -> dict[str, Tensor]:
    """The autoencoder's tensors under diffusers' names. Its attention is of linear layers there."""
    vae = float_state(codec)
    result = {}
    for old, new in vae_names(vae).items():
        convolution = ".attentions." in new and vae[old].ndim == 4
        result[new] = vae[old].flatten(1) if convolution else vae[old]
    return result


def unet_config(model: NovelViewModel, unet: dict[str, Tensor]) -> dict:
    """diffusers' config.json of a UNet, from its tensors under diffusers' names."""
    levels = count(unet, r"down_blocks\.(\d+)")
    down_types = []
    for level in range(levels):
        attention = f"down_blocks.{level}.attentions.0.norm.weight" in unet
        down_types.append("CrossAttnDownBlock2D" if attention else "DownBlock2D")
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet["conv_in.weight"].shape[1],
        "out_channels": unet["conv_out.weight"].shape[0],
        "sample_size": 32,
        "cross_attention_dim": model.cc_projection.weight.shape[0],
        "attention_head_dim": model.args.get("num_heads", 8),  # diffusers' misnomer
        "down_block_types": down_types,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down_types)],
        "block_out_channels": level_widths(unet, "down_blocks", levels),
        "layers_per_block": count(unet, r"down_blocks\.0\.resnets\.(\d+)"),
    }


def vae_config(codec: AutoencoderKL, vae: dict[str, Tensor]) -> dict:
    """diffusers' config.json of an autoencoder, from its tensors under diffusers' names."""
    levels = count(vae, r"encoder\.down_blocks\.(\d+)")
    return {
        "_class_name": "AutoencoderKL",
        "latent_channels": codec.channels,
        "scaling_factor": codec.scale,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": level_widths(vae, "encoder.down_blocks", levels),
        "layers_per_block": count(vae, r"encoder\.down_blocks\.0\.resnets\.(\d+)"),
    }


def level_widths(tensors: dict[str, Tensor], prefix: str, levels: int) -> list[int]:
    """The channels of each level of an encoder under diffusers' names."""
    return [len(tensors[f"{prefix}.{i}.resnets.0.conv1.weight"]) for i in range(levels)]


def write_model(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """A folder that diffusers opens. Raises InputError where it cannot be written."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    weights_file = folder / "diffusion_pytorch_model.safetensors"
    write_atomically(weights_file, lambda temporary: save_tensors(contiguous, temporary))
    text = json.dumps(config, indent=2)
    write_atomically(folder / "config.json", lambda temporary: temporary.write_text(text))


# ------------------------------------------------------------------------------------------- ours


def write_half(path: Path, ckpt: str) -> None:
    """A checkpoint of ours with its weights in float16, to publish: training can't resume from it.

    Of the folders that training was given it keeps the last name, not where they lie on this disk.
    Raises InputError where --ckpt is not ours.
    """
    file = find_weights(ckpt)
    found = read_checkpoint(file) if file.suffix == ".safetensors" else None
    if found is None:
        raise InputError(f"--ckpt {ckpt}: not a checkpoint of ours, whose format {path} would have")
    meta, tensors = found
    half = {name: tensor.half() for name, tensor in tensors.items()}
    del meta["sha256"]
    flags = meta.get("args", {})
    for flag in ("archive", "data", "init", "out", "vae"):
        if flags.get(flag):
            flags[flag] = Path(flags[flag]).name
    own_weights, pca = pretrained.split_own({name: value.float() for name, value in half.items()})
    if own_weights or pca:  # its encoder's own weights are rounded, too
        spec = meta["encoder"]
        weights = own_weights or spec["weights"]
        layers = tuple(spec["layers"])
        encoder = ImageEncoder(spec["name"], weights, layers, spec["image_size"], pca)
        exact = {"weights": spec["weights"], "exact_sha256": spec["sha256"]}
        meta["encoder"] = {**encoder.spec(), **exact}
    write_atomically(path, lambda temporary: write_model_file(temporary, meta, half))


# ------------------------------------------------------------------------------------ command line


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="a run, a step folder, or a weights file")
    add(
        "--out",
        required=True,
        help="x.ckpt (zero123's code, threestudio), a folder (diffusers), or x.safetensors (ours, "
        "in float16)",
    )
    add(
        "--encoder_weights",
        help="the image encoder's weights, where the checkpoint's are elsewhere",
    )
    add("--vae", help="the VAE's weights, where the checkpoint's are elsewhere")
    add(
        "--pose",
        choices=POSE_ENCODINGS,
        help="pose encoding of a checkpoint that is not ours; elevation: Stable Zero123's "
        "(default: zero123; ours know theirs)",
    )
    args = parser.parse_args()
    suffix = Path(args.out).suffix
    if suffix not in (".ckpt", ".safetensors") and suffix in WEIGHTS_SUFFIXES:
        raise InputError(f"--out {args.out}: x.ckpt, x.safetensors, or a folder for diffusers")
    if suffix == ".safetensors":
        write_half(Path(args.out), args.ckpt)
        print(f"wrote {args.out}")
        return
    model, encoder, codec, _ = pretrained.load_checkpoint(
        args.ckpt, "cpu", args.encoder_weights, args.vae, args.pose
    )
    if suffix == ".ckpt":
        write_ldm(args.out, model, codec, encoder)
    else:
        write_diffusers(args.out, model, codec, encoder)
    print(f"wrote {args.out}")
    if model.pose_encoding != "zero123":
        print(
            f"note: {args.out} cannot say that its fourth pose number is the input view's "
            f"polar angle: tell what reads it (sample.py: --pose {model.pose_encoding})"
        )


if __name__ == "__main__":
    run_script(main)
