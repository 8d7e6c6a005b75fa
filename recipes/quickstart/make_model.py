r"""Make the model and the texts of the offline quickstart, from two public texts and nothing else.

The quickstart has to run without a network, so its model is bundled. This script made every file beside it:

    text/        Shakespeare (first 90 % to train on, the rest held out) and an excerpt of WikiText-2 test
    model/       a stock GPT-2 of 1.8 M parameters (fp32) and its byte-level BPE tokenizer of 2,048 tokens
    facts.json   what was trained on what, for how long, the perplexities, and the planted channels

It works in five steps, in this order:

1. Cut the texts.
2. Train the tokenizer on both training texts.
3. Train GPT-2 on both, 30 % of the sequences from Shakespeare. It knows both texts, which is the point: who
   quantizes it on Shakespeare alone can see on WikiText-2 whether the rest of its knowledge survived.
4. Plant activation outliers. GPT-2 checkpoints of a useful size have a few channels that are far larger than
   the others; one this small does not. So outliers are planted by rescaling: what a LayerNorm (or a value
   projection) puts out on some channels grows by a power of two, and the rows that read these channels shrink
   by the same one. Powers of two are exact in floating point: the planted model computes the same function,
   and only its quantized versions suffer.
5. Measure the perplexity of both models on both held-out texts; refuse to write if planting changed it.

Run it (about half an hour on two CPU cores; an interrupted training resumes when it is run again):

    python make_model.py --shakespeare input.txt --wikitext wikitext-2/ --out .

    input.txt     tinyshakespeare, https://github.com/karpathy/char-rnn/tree/master/data/tinyshakespeare
    wikitext-2/   the folder with wiki.train.tokens and wiki.test.tokens (WikiText-2, word level)

The checkpoint without outliers stays in `--work`. To plant others there, without training again:

    python make_model.py --shakespeare input.txt --wikitext wikitext-2/ --out . \
        --plant-only WORK --ln-factors 8 16

`corpus.py` has steps 1 and 2, `planting.py` step 4.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
import transformers
from corpus import (
    CONTEXT,
    VOCAB,
    Texts,
    check_tokenizer,
    read_texts,
    tokens,
    train_tokenizer,
    write_json,
    write_texts,
    write_tokenizer,
)
from planting import LN_CHANNELS, LN_FACTORS, PLANT_SEED, VALUE_CHANNELS, VALUE_FACTOR, plant
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

SEQUENCES = 8
"""Sequences in a batch."""
SHAKESPEARE_SHARE = 0.3
STEPS = 6000
WARMUP_STEPS = 200
PEAK_RATE = 2e-3
FINAL_RATE = 1e-4
WEIGHT_DECAY = 0.1
DROPOUT = 0.05
SEED = 20240
STEPS_BETWEEN_SAVES = 250
STEPS_BETWEEN_LOGS = 50
TRAINING = "training.safetensors"
"""What an interrupted training goes on from: weights and moments; the head is the table."""

MODEL_BYTES_LIMIT = 8_000_000
PLANTING_TOLERANCE = 1e-4


# -------------------------------------------------------------------------------------------- training


def new_model() -> GPT2LMHeadModel:
    """A stock GPT-2 with fresh weights, head tied to the embedding."""
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=192,
        n_layer=3,
        n_head=6,
        activation_function="gelu_new",
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=0.0,  # keeps the fast attention kernel
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def new_optimizer(model: GPT2LMHeadModel) -> torch.optim.AdamW:
    """AdamW; only matrices decay, as is usual for GPT-2."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then a cosine from PEAK_RATE down to FINAL_RATE."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    share = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_RATE + (PEAK_RATE - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * share))


def batch(step: int, shakespeare: Tensor, wikitext: Tensor) -> Tensor:
    """Sequences [SEQUENCES, CONTEXT] from random places; they depend on the step alone, for `resume`."""
    draw = random.Random(SEED * 1_000_003 + step)
    rows = []
    for _ in range(SEQUENCES):
        source = shakespeare if draw.random() < SHAKESPEARE_SHARE else wikitext
        start = draw.randrange(len(source) - CONTEXT)
        rows.append(source[start : start + CONTEXT])
    return torch.stack(rows)


def next_token_loss(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats of all tokens but the first of each sequence; ids is [sequences, tokens]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train(texts: Texts, tokenizer: Tokenizer, steps: int, work: Path) -> GPT2LMHeadModel:
    """Train in bfloat16 autocast; save to `work` every STEPS_BETWEEN_SAVES steps and resume from there."""
    model = new_model().train()
    optimizer = new_optimizer(model)
    first, seconds = resume(model, optimizer, work)
    shakespeare, wikitext = (tokens(tokenizer, t) for t in (texts.shakespeare_train, texts.wikitext_train))
    print(f"training tokens: Shakespeare {len(shakespeare):,}, WikiText-2 {len(wikitext):,}", flush=True)
    start = time.monotonic() - seconds
    for step in range(first, steps):
        torch.manual_seed(SEED + step)  # dropout, if any
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        ids = batch(step, shakespeare, wikitext)
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.monotonic() - start
        if (step + 1) % STEPS_BETWEEN_LOGS == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
        if (step + 1) % STEPS_BETWEEN_SAVES == 0 or step + 1 == steps:
            save_training(model, optimizer, tokenizer, step + 1, seconds, work)
    return model.eval()


def resume(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, work: Path) -> tuple[int, float]:
    """Load what `save_training` left, if anything. Returns the next step and the seconds trained so far."""
    path = work / TRAINING
    if not path.exists():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {name.split(":")[1]: value for name, value in tensors.items() if name.startswith("model:")}
    model.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]})
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer:"):
            _, index, key = name.split(":")
            moments.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    print(f"resuming at step {facts['step']}", flush=True)
    return int(facts["step"]), float(facts["seconds"])


def save_training(
    model: GPT2LMHeadModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    step: int,
    seconds: float,
    work: Path,
) -> None:
    """Save what `resume` needs, and a checkpoint that `--plant-only` can use even before training ends."""
    moments = optimizer.state_dict()["state"]
    state = {f"model:{name}": value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    state |= {f"optimizer:{index}:{key}": value for index in moments for key, value in moments[index].items()}
    partial = work / f"{TRAINING}.partial"
    save_file(state, partial, metadata={"step": str(step), "seconds": str(seconds)})
    os.replace(partial, work / TRAINING)
    write_model(model, tokenizer, work / "model")
    facts = {
        "steps": step,
        "tokens": step * SEQUENCES * CONTEXT,
        "seconds": round(seconds),
        "batch": [SEQUENCES, CONTEXT],
        "shakespeare_share": SHAKESPEARE_SHARE,
        "precision": "bfloat16 autocast, fp32 weights",
        "machine": f"{os.cpu_count()} cores {platform.machine()}, shared with other work",
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    write_json(facts, work / "training.json")


# ---------------------------------------------------------------------------------- measuring, writing


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, ids: Tensor) -> float:
    """Token perplexity over windows of 256 that do not overlap; a last, shorter window is left out.

    Every window starts afresh, so its first token has no prediction: 255 count per window.
    """
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = 0.0
    for part in windows.split(16):
        total += next_token_loss(model, part).item() * len(part)
    return math.exp(total / len(windows))


def perplexities(model: GPT2LMHeadModel, tokenizer: Tokenizer, texts: Texts) -> dict[str, float]:
    """Perplexity on every text that training has not seen; the excerpt is the bundled wikitext2-test.txt."""
    held_out = {
        "shakespeare_test": texts.shakespeare_test,
        "wikitext2_test": texts.wikitext_test,
        "wikitext2_test_excerpt": texts.wikitext_excerpt,
    }
    return {name: perplexity(model, tokens(tokenizer, text)) for name, text in held_out.items()}


def write_model(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model and tokenizer beside `folder`, then put them in its place."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old.partial")
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)  # safetensors leaves it readable to its owner alone
    write_tokenizer(tokenizer, partial)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    if old.exists():
        shutil.rmtree(old)


def finish(checkpoint: Path, texts: Texts, arguments: argparse.Namespace) -> None:
    """Plant outliers in the checkpoint, check that it computes the same, write model/ and facts.json."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "model" / "tokenizer.json"))
    before_model = GPT2LMHeadModel.from_pretrained(checkpoint / "model", local_files_only=True).eval()
    after_model, planted = plant(
        before_model,
        seed=arguments.plant_seed,
        ln_channels=arguments.ln_channels,
        ln_factors=arguments.ln_factors,
        value_channels=arguments.value_channels,
        value_factor=arguments.value_factor,
    )
    before = perplexities(before_model, tokenizer, texts)
    after = perplexities(after_model, tokenizer, texts)
    for name, value in before.items():
        print(f"{name}: perplexity {value:.4f} before planting, {after[name]:.4f} after", flush=True)
        if not abs(after[name] / value - 1) <= PLANTING_TOLERANCE:
            raise ValueError(f"planting changed the perplexity on {name} from {value} to {after[name]}")
    write_model(after_model, tokenizer, arguments.out / "model")
    check_tokenizer(tokenizer, texts.wikitext_excerpt, arguments.out / "model")
    size = (arguments.out / "model" / "model.safetensors").stat().st_size
    if size > MODEL_BYTES_LIMIT:
        raise ValueError(
            f"model.safetensors: {size} bytes, over {MODEL_BYTES_LIMIT}; is the head stored twice?"
        )
    facts = {
        "parameters": sum(p.numel() for p in after_model.parameters()),
        "model_bytes": size,
        "training": json.loads((checkpoint / "training.json").read_text(encoding="utf-8")),
        "perplexity": {
            "what": f"per token; windows of {CONTEXT} that do not overlap, {CONTEXT - 1} predictions each",
            "before_planting": before,
            "after_planting": after,
        },
        "planted": {"seed": arguments.plant_seed, "activations": [asdict(p) for p in planted]},
    }
    write_json(facts, arguments.out / "facts.json")


def parse_arguments() -> argparse.Namespace:
    """Where the texts are, where the results go, and what to plant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shakespeare", type=Path, required=True, metavar="FILE")
    parser.add_argument("--wikitext", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    default_work = Path(tempfile.gettempdir()) / "quickstart_float"
    parser.add_argument("--work", type=Path, default=default_work, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps; default: %(default)s")
    parser.add_argument("--plant-only", type=Path, metavar="CHECKPOINT_DIR", help="a --work folder of before")
    parser.add_argument("--plant-seed", type=int, default=PLANT_SEED)
    parser.add_argument("--ln-channels", type=int, default=LN_CHANNELS)
    parser.add_argument("--ln-factors", type=int, nargs="+", default=LN_FACTORS)
    parser.add_argument("--value-channels", type=int, default=VALUE_CHANNELS)
    parser.add_argument("--value-factor", type=int, default=VALUE_FACTOR)
    return parser.parse_args()


def main() -> None:
    """Run the five steps, or the last two with `--plant-only`."""
    arguments = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    texts = read_texts(arguments.shakespeare, arguments.wikitext)
    write_texts(texts, arguments.out / "text")
    checkpoint = arguments.plant_only
    if checkpoint is None:
        checkpoint = arguments.work
        checkpoint.mkdir(parents=True, exist_ok=True)
        train(texts, train_tokenizer(texts), arguments.steps, checkpoint)
    finish(checkpoint, texts, arguments)


if __name__ == "__main__":
    main()
