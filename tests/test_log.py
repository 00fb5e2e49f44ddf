"""What train.py says while it runs: log.jsonl and the progress bar."""

import json

import torch

import train


def test_a_line_of_the_log_is_json_whatever_the_numbers(tmp_path):
    """json.dumps writes NaN and Infinity, which other programs cannot read."""
    state = train.State(1, torch.zeros(2, train.BINS), torch.zeros((), dtype=torch.int64), step=3)
    log = train.Log(tmp_path / "log.jsonl", state, steps=5, global_batch=4, flops=1, rank=0)
    nan = float("nan")
    log.write_held_out(state, [nan] * train.BINS, [0.5] * 9 + [float("inf")])
    log.bar.close()

    def refuse(constant: str):
        raise ValueError(constant)

    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert line["val_loss"] is None
    assert line["val_loss_ema"] is None
    assert line["val_loss_ema_by_t"] == [0.5] * 9 + [None]


def test_the_bar_says_what_takes_time_and_then_the_loss_again(tmp_path):
    state = train.State(1, torch.zeros(2, train.BINS), torch.zeros((), dtype=torch.int64))
    log = train.Log(tmp_path / "log.jsonl", state, steps=5, global_batch=4, flops=1, rank=0)
    state.step = 1
    state.seconds = 2.0
    log.write_step(state, {"loss": 0.25, "lr": 1e-4, "skipped": 0})
    with log.doing("saving"):
        assert "saving ..." in str(log.bar)
    assert "loss 0.2500" in str(log.bar)
    log.bar.close()
