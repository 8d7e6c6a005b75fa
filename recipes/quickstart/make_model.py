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

Shapes: n_embd is d. `c_attn.weight` is [d, 3 d] = [in, q k v], `attn.c_proj.weight` [d, d], `mlp.c_fc.weight`
[d, 4 d]: transformers' Conv1D stores [in, out], so an input channel is a row.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

# Texts.
SHAKESPEARE_TRAIN_SHARE = 0.9
WIKITEXT_EXCERPT_BYTES = 120_000

# Tokenizer. Shakespeare is a tenth of WikiText-2; repeated, it gets its share of the merges.
VOCAB = 2048
END_OF_TEXT = "<|endoftext|>"
SHAKESPEARE_REPEATS = 4

# Training.
CONTEXT = 256
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

# Planted outliers.
PLANT_SEED = 7
LN_CHANNELS = 4
"""Channels planted in the output of every ln_1 and every ln_2."""
LN_FACTORS = (16, 32, 64)
VALUE_CHANNELS = 2
"""Channels planted in the value part of every c_attn."""
VALUE_FACTOR = 8
"""Moderate: attn.c_proj reads no LayerNorm, so methods that fold scales into LayerNorms cannot undo it."""

MODEL_BYTES_LIMIT = 8_000_000
PLANTING_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Texts:
    """The texts as they are used; all but `wikitext_train` and `wikitext_test` are bundled."""

    shakespeare_train: str
    shakespeare_test: str
    wikitext_train: str
    wikitext_test: str
    wikitext_excerpt: str


@dataclass(frozen=True)
class Planted:
    """Channels of one activation that were multiplied, and by what."""

    block: int
    activation: str
    """`ln_1` or `ln_2` (output of that LayerNorm), or `value` (value part of c_attn's output)."""
    channels: tuple[int, ...]
    factors: tuple[int, ...]


# ----------------------------------------------------------------------------------------------- texts


def read_texts(shakespeare: Path, wikitext: Path) -> Texts:
    """Read both texts; split Shakespeare and cut the WikiText-2 excerpt at the end of a line."""
    play = shakespeare.read_bytes()
    split = play.rindex(b"\n", 0, int(len(play) * SHAKESPEARE_TRAIN_SHARE)) + 1
    wikitext_test = (wikitext / "wiki.test.tokens").read_bytes()
    excerpt = wikitext_test[: wikitext_test.rindex(b"\n", 0, WIKITEXT_EXCERPT_BYTES) + 1]
    return Texts(
        shakespeare_train=play[:split].decode("utf-8"),
        shakespeare_test=play[split:].decode("utf-8"),
        wikitext_train=(wikitext / "wiki.train.tokens").read_bytes().decode("utf-8"),
        wikitext_test=wikitext_test.decode("utf-8"),
        wikitext_excerpt=excerpt.decode("utf-8"),
    )


def write_texts(texts: Texts, folder: Path) -> None:
    """Write the bundled texts, byte for byte as they were read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("shakespeare-train.txt", texts.shakespeare_train),
        ("shakespeare-test.txt", texts.shakespeare_test),
        ("wikitext2-test.txt", texts.wikitext_excerpt),
    ):
        (folder / name).write_bytes(text.encode("utf-8"))


# ------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Texts) -> Tokenizer:
    """GPT-2's kind of tokenizer, with 2,048 tokens; `<|endoftext|>` is token 0."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    training = [texts.shakespeare_train] * SHAKESPEARE_REPEATS + [texts.wikitext_train]
    tokenizer.train_from_iterator(training, trainer)
    return tokenizer


def tokens(tokenizer: Tokenizer, text: str) -> Tensor:
    """Token ids of the whole text, [tokens]."""
    return torch.tensor(tokenizer.encode(text).ids)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write it so that transformers' AutoTokenizer, version 4 or 5, loads the folder without a network."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GPT2TokenizerFast",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(config, folder / "tokenizer_config.json")


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
    path = work / "training.pt"
    if not path.exists():
        return 0, 0.0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    print(f"resuming at step {saved['step']}", flush=True)
    return saved["step"], saved["seconds"]


def save_training(
    model: GPT2LMHeadModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    step: int,
    seconds: float,
    work: Path,
) -> None:
    """Save what `resume` needs, and a checkpoint that `--plant-only` can use even before training ends."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "step": step, "seconds": seconds}, work / "training.pt.partial")
    os.replace(work / "training.pt.partial", work / "training.pt")
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


# -------------------------------------------------------------------------------------------- planting


def plant(
    model: GPT2LMHeadModel,
    seed: int = PLANT_SEED,
    ln_channels: int = LN_CHANNELS,
    ln_factors: Sequence[int] = LN_FACTORS,
    value_channels: int = VALUE_CHANNELS,
    value_factor: int = VALUE_FACTOR,
) -> tuple[GPT2LMHeadModel, tuple[Planted, ...]]:
    """A copy of the model with outlier channels that computes the same function; and what was planted.

    All factors have to be powers of two: then every product of an activation and a weight is the same number
    as before, and nothing is rounded.
    """
    for factor in (*ln_factors, value_factor):
        if factor < 1 or factor & (factor - 1):
            raise ValueError(f"factor {factor} is not a power of two, so it would round; use 8, 16, ...")
    draw = random.Random(seed)
    model = copy.deepcopy(model)
    width = model.config.n_embd
    planted = []
    with torch.no_grad():
        for index, block in enumerate(model.transformer.h):
            readers = (("ln_1", block.ln_1, block.attn.c_attn), ("ln_2", block.ln_2, block.mlp.c_fc))
            for name, norm, reader in readers:
                channels = sorted(draw.sample(range(width), ln_channels))
                factors = [draw.choice(ln_factors) for _ in channels]
                scale = torch.tensor(factors, dtype=norm.weight.dtype)
                norm.weight[channels] *= scale
                norm.bias[channels] *= scale
                reader.weight[channels] /= scale[:, None]
                planted.append(Planted(index, name, tuple(channels), tuple(factors)))
            channels = sorted(draw.sample(range(width), value_channels))
            columns = [2 * width + channel for channel in channels]
            block.attn.c_attn.weight[:, columns] *= value_factor
            block.attn.c_attn.bias[columns] *= value_factor
            block.attn.c_proj.weight[channels] /= value_factor
            planted.append(Planted(index, "value", tuple(channels), (value_factor,) * value_channels))
    return model, tuple(planted)


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


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write beside `path`, then put it in its place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


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


def check_tokenizer(tokenizer: Tokenizer, text: str, folder: Path) -> None:
    """Refuse a folder from which transformers reads another tokenizer than the one trained with."""
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(text, verbose=False)["input_ids"]
    if ids != tokenizer.encode(text).ids:
        raise ValueError(f"AutoTokenizer reads another tokenizer from {folder} than the one trained with")


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
