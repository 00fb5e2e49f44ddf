"""What in the pose MLP matters: train.py and evaluate.py with another `make_pose_mlp`.

    python -m studies.pose_mlp no_sines train.py @presets/small.txt --archive A --out runs/no_sines
    python -m studies.pose_mlp no_sines evaluate.py --ckpt runs/no_sines --data DIR

studies/poses.sh runs those that its VARIANTS names. A run of a variant is loaded by this script
only: its checkpoint does not say what it is.
"""

import argparse
import runpy
import sys

import torch
from torch import Tensor, nn

import data
import model
from lib.cli import ArgumentParser, run_script
from model import NovelViewModel, without_autocast, zero_init


def as_it_is() -> None:
    """One hidden layer; sines, cosines of 1, 2, 4, 8 times the numbers; beside the token."""


def no_sines() -> None:
    """The four numbers alone."""
    use_frequencies()


def one_frequency() -> None:
    """Sines and cosines of the numbers themselves."""
    use_frequencies(1)


def two_hidden_layers() -> None:
    model.make_pose_mlp = lambda width: nn.Sequential(
        nn.Linear(model.POSE_FEATURES, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        zero_init(nn.Linear(width, width)),
    )


def no_hidden_layer() -> None:
    """A linear map of the features."""
    model.make_pose_mlp = lambda width: nn.Sequential(
        zero_init(nn.Linear(model.POSE_FEATURES, width))
    )


def linear() -> None:
    """A linear map of the four numbers alone."""
    use_frequencies()
    no_hidden_layer()


def no_token() -> None:
    """The MLP alone: the context token holds the image's [CLS] and no camera move."""
    give_token(torch.zeros_like)


def absolute() -> None:
    """The MLP is also given the input view's own polar angle and distance."""
    relative_pose = data.relative_pose

    def with_own_camera(cond: Tensor, target: Tensor, encoding: str = "zero123") -> Tensor:
        theta, _, radius = data.spherical(cond)
        own = torch.stack([theta, radius], dim=-1).float()
        move = relative_pose(cond, target, encoding)
        return torch.cat([move, own.expand(*move.shape[:-1], 2)], dim=-1)

    data.relative_pose = with_own_camera
    give_token(lambda pose: pose[:, :4])
    model.POSE_FEATURES = model.POSE_FEATURES * 6 // 4


def give_token(part_of) -> None:
    """The context token gets part_of(pose), (B, 4); the MLP gets all of the pose."""

    def embed_condition(self, cls: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(cls.device):
            token = self.cc_projection(torch.cat([cls, part_of(pose)], dim=1).float())
            return token[:, None], self.pose_mlp(model.pose_features(pose.float()))

    NovelViewModel.embed_condition = embed_condition


def use_frequencies(*frequencies: int) -> None:
    model.POSE_FREQUENCIES = frequencies
    model.POSE_FEATURES = 4 * (1 + 2 * len(frequencies))
    if not frequencies:
        model.pose_features = lambda pose: pose


VARIANTS = {
    function.__name__: function
    for function in (
        as_it_is,
        no_sines,
        one_frequency,
        two_hidden_layers,
        no_hidden_layer,
        linear,
        no_token,
        absolute,
    )
}


def main() -> None:
    parser = ArgumentParser(__doc__, prog="python -m studies.pose_mlp")
    parser.add_argument("variant", choices=VARIANTS, help="which change")
    parser.add_argument("script", choices=["train.py", "evaluate.py"], help="what to run")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the script's own")
    args = parser.parse_args()
    VARIANTS[args.variant]()
    sys.argv = [args.script, *args.flags]
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    run_script(main)
