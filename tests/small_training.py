"""A small model and data that know their place, for test_trainer.py and the programs that it starts."""

import os

import numpy as np
import torch
import transformers as hf

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Data:
    "Rows of random tokens with labels here and there; each process takes its share of every batch."

    def __init__(self, batches=12, size=8):
        self.batches, self.size, self.epoch, self.place = batches, size, 0, 0

    def __len__(self):
        return self.batches

    def __iter__(self):
        while self.place < self.batches:
            rng = np.random.default_rng((self.epoch, self.place))
            ids = torch.from_numpy(rng.integers(29, size=(self.size, 10)))
            labels = ids.masked_fill(torch.from_numpy(rng.random(ids.shape) < 0.5), -100)
            self.place += 1
            yield {"input_ids": ids[RANK::WORLD], "labels": labels[RANK::WORLD]}
        self.epoch, self.place = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state):
        self.epoch, self.place = state["epoch"], state["place"]


def model(dropout=0.0):
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=29,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return hf.GPT2LMHeadModel(config)
