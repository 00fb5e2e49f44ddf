"""Write a trained model for other codebases: zero123's own code and threestudio (.ckpt), or diffusers (a folder).

    python -m tools.convert --ckpt runs/baseline --out zero123.ckpt     # trained with CLIP and --no-amalgamate
    python -m tools.convert --ckpt zero123-xl.ckpt --out folder

A model that amalgamates features has no place there, and is refused.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pretrained
from lib.autoencoder import AutoencoderKL
from lib.cli import HelpFormatter, InputError, run_script
from lib.files import write_atomically
from lib.formats import CLIP_NAMES, PREFIX, count, unet_names, vae_names
from model import NovelViewModel


def clip_to_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's CLIP names -> OpenAI's, those of zero123's `cond_stage_model.model`: the inverse of timm's conversion."""
    result = {
        "visual.proj": state["head.weight"].T.contiguous()
    }  # OpenAI's has no bias, and timm's is zero
    for name in (k for k in state if not k.startswith("head.")):
        tensor, ours = state[name], f"visual..{name}"
        for openai, _, timms in CLIP_NAMES:
            ours = ours.replace(f".{timms}", f".{openai}")
        extra = {
            "pos_embed": tensor.shape[1:],
            "cls_token": tensor.shape[2:],
        }  # timm's have a batch axis
        result[ours.replace("..", ".")] = tensor.reshape(extra.get(name, tensor.shape))
    return result


def exported(
    model: NovelViewModel, codec: nn.Module, encoder: pretrained.ImageEncoder
) -> tuple[dict, ...]:
    """(UNet, codec, cc_projection) for other codebases; InputError where those cannot represent the model."""
    if encoder.name != pretrained.CLIP:
        raise InputError(
            f"--ckpt: conditioned on {encoder.name}; zero123's code and pipelines know its CLIP only"
        )
    parts = (model.unet, codec, model.cc_projection)
    unet, vae, projection = (
        {k: v.float().cpu() for k, v in part.state_dict().items()} for part in parts
    )
    if unet.pop("amalgamation.weight", torch.zeros(1)).any():
        raise InputError(
            "--ckpt: the model amalgamates patch features, which zero123's and diffusers' UNets cannot"
        )
    if not isinstance(codec, AutoencoderKL) or model.prediction != "eps":
        raise InputError(
            "--ckpt: zero123 and diffusers need Stable Diffusion's codec (not pixels) and eps (not v)"
        )
    return unet, vae, projection


def write_ldm(
    path: str | Path, model: NovelViewModel, codec: nn.Module, encoder: pretrained.ImageEncoder
) -> None:
    """A .ckpt for zero123's own code and threestudio: all of it, for their loader leaves random what is missing.

    They sample the EMA: the weights are written as both, once on disk, for the tensors share memory.
    """
    unet, vae, projection = exported(model, codec, encoder)
    if (heads := model.unet.middle_block[1].transformer_blocks[0].attn1.num_heads) != 8:
        raise InputError(
            f"--ckpt: {heads} attention heads; a .ckpt doesn't hold the number, and its readers take 8"
        )
    state = {PREFIX["unet"] + k: v for k, v in unet.items()}
    state |= {f"model_ema.diffusion_model{k.replace('.', '')}": v for k, v in unet.items()}
    state |= {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(0, dtype=torch.int32),
    }
    state |= {PREFIX["vae"] + k: v for k, v in vae.items()}
    state |= {
        f"cond_stage_model.model.{k}": v.cpu()
        for k, v in clip_to_openai(encoder.vit.state_dict()).items()
    }
    state |= {PREFIX["cc_projection"] + k: v for k, v in projection.items()}
    write_atomically(
        Path(path), lambda temporary: torch.save({"state_dict": state, "global_step": 0}, temporary)
    )


def write_diffusers(
    folder: str | Path, model: NovelViewModel, codec: nn.Module, encoder: pretrained.ImageEncoder
) -> None:
    """unet/, vae/ and zero123-hf's cc_projection/, each with the config.json by which diffusers opens it."""
    unet, vae, projection = exported(model, codec, encoder)
    unet = {new: unet[old] for old, new in unet_names(unet).items()}
    vae = {new: vae[old] for old, new in vae_names(vae).items()}
    vae = {k: v.flatten(1) if ".attentions." in k and v.ndim == 4 else v for k, v in vae.items()}
    attn, channels = (
        model.unet.middle_block[1].transformer_blocks[0].attn1,
        unet["conv_in.weight"].shape[1],
    )
    configs = {
        "unet": {"_class_name": "UNet2DConditionModel", "in_channels": channels, "sample_size": 32}
    }
    configs["unet"] |= {
        "out_channels": len(unet["conv_out.weight"]),
        "cross_attention_dim": model.unet.context_dim,
    }
    configs["unet"]["attention_head_dim"] = attn.num_heads  # diffusers' misnomer
    configs["vae"] = {
        "_class_name": "AutoencoderKL",
        "latent_channels": codec.channels,
        "scaling_factor": codec.scale,
    }
    for config, tensors, down in (
        (configs["unet"], unet, "down_blocks"),
        (configs["vae"], vae, "encoder.down_blocks"),
    ):
        levels = [f"{down}.{i}" for i in range(count(tensors, rf"{down}\.(\d+)"))]
        cross = [
            "CrossAttn" if f"{level}.attentions.0.norm.weight" in tensors else ""
            for level in levels
        ]
        ways = ("Down", "Up") if tensors is unet else ("DownEncoder", "UpDecoder")
        config["down_block_types"] = [f"{kind}{ways[0]}Block2D" for kind in cross]
        config["up_block_types"] = [f"{kind}{ways[1]}Block2D" for kind in reversed(cross)]
        config["block_out_channels"] = [
            len(tensors[f"{level}.resnets.0.conv1.weight"]) for level in levels
        ]
        config["layers_per_block"] = count(tensors, rf"{down}\.0\.resnets\.(\d+)")
    out, into = projection["weight"].shape
    configs["cc_projection"] = {
        "_class_name": "CCProjection",
        "in_channel": into,
        "out_channel": out,
    }
    projection = {f"projection.{k}": v for k, v in projection.items()}
    for (name, config), tensors in zip(configs.items(), (unet, vae, projection), strict=True):
        tensors, text = (
            {k: v.contiguous() for k, v in tensors.items()},
            json.dumps(config, indent=2),
        )
        write_atomically(
            Path(folder, name, "diffusion_pytorch_model.safetensors"),
            lambda path, t=tensors: save_file(t, path),
        )
        write_atomically(Path(folder, name, "config.json"), lambda path, t=text: path.write_text(t))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="a run, a step folder, or a weights file")
    parser.add_argument(
        "--out", required=True, help="x.ckpt (zero123's code, threestudio) or a folder (diffusers)"
    )
    parser.add_argument(
        "--encoder_weights",
        help="the image encoder's weights, where the checkpoint's are elsewhere",
    )
    parser.add_argument("--vae", help="the VAE's weights, where the checkpoint's are elsewhere")
    args = parser.parse_args()
    if args.out.endswith((".pt", ".pth", ".bin", ".safetensors")):
        raise InputError(f"--out {args.out}: x.ckpt, or a folder for diffusers")
    model, encoder, codec, _ = pretrained.load_checkpoint(
        args.ckpt, "cpu", args.encoder_weights, args.vae
    )
    if args.out.endswith(".ckpt"):
        write_ldm(args.out, model, codec, encoder)
    else:
        write_diffusers(args.out, model, codec, encoder)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
