"""One training loop in a process of its own, for 09_training.ipynb.

The first line of the input is a JSON object: loop (the name of a function here) and threads. The answer is
{"version": ...}. Each further line is one too: model ("tiny", settings of a GPT2Config, or the folder of a model),
batches (a file of torch.save), steps, skip, precision, clip and compile. The loop trains that model anew, the same each
time, for so many steps; the answer is what a step took after those skipped, {"processor": seconds of all threads,
"clock": seconds, "loss": of the first batch in the end}. The clocks are read where a batch is fetched, which every loop
does once a step, so that what comes before the first step and after the last is not in it.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import version

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, set_seed
from transformers.modeling_outputs import CausalLMOutput

RATE, BETAS = 1e-3, (0.9, 0.999)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


class Tiny(torch.nn.Module):
    "A network of a few thousand weights that is called like a language model of transformers."

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Embedding(64, 32)
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 64)

    def forward(self, input_ids, labels=None, use_cache=False):
        logits, loss = self.down(F.gelu(self.up(self.inner(input_ids)))), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class Timed(Dataset):
    "Batches, over and over, that look at the clocks when the first one that counts and the last one are fetched."

    def __init__(self, batches, steps, skip):
        self.batches, self.steps, self.skip, self.seen = batches, steps, skip, {}

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        if step in (self.skip, self.steps - 1):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            self.seen[step] = time.process_time(), time.perf_counter()
        return self.batches[step % len(self.batches)]

    def taken(self):
        (begun, at), (ended, until) = self.seen[self.skip], self.seen[self.steps - 1]
        steps = self.steps - 1 - self.skip
        return {"processor": (ended - begun) / steps, "clock": (until - at) / steps}


class Kept(DataLoader):
    "A loader with a state, which a run with checkpoints asks for."

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Work:
    "What every loop is given."

    def __init__(self, asked):
        set_seed(0)
        self.model = made(asked["model"]).to(DEVICE).train()
        self.compile, self.precision, self.clip = asked["compile"], asked["precision"], asked["clip"]
        self.batches, self.steps = torch.load(asked["batches"]), asked["steps"]
        self.timed = Timed(self.batches, asked["steps"], asked["skip"])
        self.loader = Kept(self.timed, batch_size=None)

    def optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)

    def autocast(self):
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(DEVICE, TYPES[self.precision])

    @torch.no_grad()
    def loss(self):
        with self.autocast():
            return float(self.model.eval()(**on_device(self.batches[0])).loss)


def made(what):
    if what == "tiny":
        return Tiny()
    if isinstance(what, str):
        return AutoModelForCausalLM.from_pretrained(what, dtype=torch.float32)
    return GPT2LMHeadModel(GPT2Config(**what))


def on_device(batch):
    return {name: value.to(DEVICE, non_blocking=True) for name, value in batch.items()}


def bare(work):
    "What one writes by hand, and nothing else."
    model, optimizer = work.model, work.optimizer()
    if work.compile:
        model.compile()
    for batch in work.loader:
        with work.autocast():
            loss = model(**on_device(batch)).loss
        loss.backward()
        if work.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), work.clip)
        optimizer.step()
        optimizer.zero_grad()


def accelerate(work):
    "The loop of accelerate's own documentation, with its scheduler."
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16" if work.precision == "bf16" else "no", cpu=DEVICE == "cpu")
    optimizer = work.optimizer()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, optimizer, loader, scheduler = accelerator.prepare(work.model, optimizer, work.loader, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if work.clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), work.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def transformers(work):
    "transformers' Trainer."
    from transformers import Trainer, TrainingArguments

    class Given(Trainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(work.loader)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=work.steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=work.clip or 0.0,
            bf16=work.precision == "bf16",
            torch_compile=work.compile,
            use_cpu=DEVICE == "cpu",
            report_to="none",
            save_strategy="no",
        )
        Given(work.model, arguments, train_dataset=work.timed).train()


def fabric(work):
    "Lightning's Fabric: a loop written by hand over what it sets up."
    from lightning.fabric import Fabric

    precision = "bf16-mixed" if work.precision == "bf16" else "32-true"
    tool = Fabric(accelerator=DEVICE, devices=1, precision=precision)
    model, optimizer = tool.setup(work.model, work.optimizer())
    for batch in tool.setup_dataloaders(work.loader):
        loss = model(**batch).loss
        tool.backward(loss)
        if work.clip:
            tool.clip_gradients(model, optimizer, max_norm=work.clip)
        optimizer.step()
        optimizer.zero_grad()


def lightning(work):
    "Lightning's Trainer."
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.network = work.model

        def training_step(self, batch, number):
            return self.network(**batch).loss

        def configure_optimizers(self):
            return work.optimizer()

    precision = "bf16-mixed" if work.precision == "bf16" else "32-true"
    plain = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    clip = {"gradient_clip_val": work.clip} if work.clip else {}
    trainer = Trainer(max_steps=work.steps, accelerator=DEVICE, devices=1, precision=precision, **plain, **clip)
    trainer.fit(Module(), work.loader)


def ours(work, folder=None):
    "The Trainer of this package, as it comes: progress bar, guard, records."
    from truthgpt_nb.trainer import Trainer

    settings = {"learning_rate": RATE, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "beta2": BETAS[1]}
    settings |= {"steps": work.steps, "precision": work.precision, "compile": work.compile, "clip": work.clip or 0.0}
    Trainer(work.model, work.loader, folder=folder, **settings).fit()


def ours_kept(work):
    "The same with a folder for checkpoints; the one that is saved at the end is not in the time of a step."
    with tempfile.TemporaryDirectory() as folder:
        ours(work, folder)


LOOPS = {loop.__name__: loop for loop in (bare, accelerate, transformers, fabric, lightning, ours, ours_kept)}
PACKAGES = {"bare": "torch", "fabric": "lightning", "ours": "truthgpt_nb", "ours_kept": "truthgpt_nb"}


def main():
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # what a loop prints is no answer
    warnings.simplefilter("ignore")
    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    loop = LOOPS[setup["loop"]]
    print(json.dumps({"version": version(PACKAGES.get(setup["loop"], setup["loop"]))}), file=answers, flush=True)
    for line in sys.stdin:
        work = Work(json.loads(line))
        loop(work)
        print(json.dumps(work.timed.taken() | {"loss": work.loss()}), file=answers, flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
