"""A GPT-2 small enough to train in a test, its tokenizer, its text, and the first stages run on it.

Nothing in it is trivial: norms have weights off 1 and biases off 0, every bias differs from 0, logits spread
over several units. Without that, a forgotten bias or a dropped rescaling would pass every test.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, logging

from qcompress.models import describe
from qcompress.models.architecture import Architecture
from qcompress.models.folded import assemble
from qcompress.models.plan import LayerPlan, plan_layers
from qcompress.models.rebuild import rebuild
from qcompress.pipeline.stages.fold import fold
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.pipeline.stages.train import train
from qcompress.schema.recipe import Model, Recipe
from qcompress.system.artifacts import FloatModel, FoldedModel, TrainedModel, read_json
from qcompress.system.reporter import Reporter

VOCABULARY, WIDTH, HEADS, BLOCKS, CONTEXT = 300, 64, 2, 2, 32
OUTLIER = 5
"""The channel that `make_checkpoint(outliers=...)` makes large."""


def write_text(file: Path, words: int = 6000, seed: int = 7) -> Path:
    """Text with something to learn: each word mostly determines the next one."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnoprstuvw"))
    lexicon = ["".join(rng.choice(letters, rng.integers(2, 7))) for _ in range(60)]
    follower = rng.permutation(60)
    text, word = [], 0
    for _ in range(words):
        word = int(follower[word]) if rng.random() < 0.8 else int(rng.integers(60))
        text.append(lexicon[word] + (".\n" if rng.random() < 0.1 else ""))
    file.write_text(" ".join(text), encoding="utf-8")
    return file


def make_tokenizer(folder: Path, text: str) -> None:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens, as GPT-2's is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def make_model(*, tied: bool = True, inner: int | None = None, outliers: float = 1.0,
               seed: int = 0, blocks: int = BLOCKS) -> GPT2LMHeadModel:  # fmt: skip
    """Random weights that mean something. `outliers` multiplies one channel of every norm inside a block and
    divides the weights that read it: the same function, and much harder to quantize.
    """
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=blocks, n_head=HEADS, n_inner=inner,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            if ".ln_" in name and name.endswith(".weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.12 * noise)
        for block in model.transformer.h:
            for norm, reader in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
                norm.weight[OUTLIER] *= outliers
                norm.bias[OUTLIER] *= outliers
                reader.weight[OUTLIER] /= outliers
    return model


def make_checkpoint(folder: Path, text: Path, **options: Any) -> Path:
    """A checkpoint in transformers' layout, with its tokenizer."""
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    make_model(**options).save_pretrained(folder)
    make_tokenizer(folder, text.read_text(encoding="utf-8"))
    return folder


def make_recipe(text: Path, steps: int = 3, **sections: Any) -> Recipe:
    """A small recipe; `sections` replace whole sections. `steps` counts for every phase of the schedule."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"family": "gpt2", "source": "unused"},
        "task": {"name": "causal-lm", "context": CONTEXT},
        "data": {
            "train": {"text": [text.name], "limit": 64},
            "calibration": {"text": [text.name], "limit": 12},
            "evaluate": {"test": {"text": [text.name], "limit": 8}},
        },
        "format": "w8a8",
        **sections,
    }
    values["train"] = {"device": "cpu", "batch_size": 4, **values.get("train", {})}
    untrained = dict.fromkeys(("ptq", "smoothquant", "awq"), ())
    names = {"quadapter": ("calibrate", "finetune"), **untrained}.get(
        values.get("method", "ptq"), ("finetune",)
    )
    if "schedule" not in values:
        values["train"].setdefault("phases", {name: {"steps": steps} for name in names})
    return Recipe.model_validate(values)


@dataclass(frozen=True)
class Line:
    """A recipe on its way through the stages, in one folder."""

    recipe: Recipe
    text: Path
    folder: Path
    source: Path
    float_model: FloatModel
    architecture: Architecture
    plan: tuple[LayerPlan, ...]

    @property
    def trained(self) -> TrainedModel:
        return TrainedModel(self.folder / "train")

    @property
    def folded(self) -> FoldedModel:
        return FoldedModel(self.folder / "fold")

    def train(self, reporter: Reporter | None = None) -> Line:
        """Run the stage, or go on with it."""
        self.trained.path.mkdir(exist_ok=True)
        train(self.float_model, self.recipe, self.text.parent, self.architecture, self.plan,
              self.trained.path, reporter or Reporter(silent=True))  # fmt: skip
        return self

    def fold(self) -> Line:
        """Run the stage."""
        self.folded.path.mkdir(exist_ok=True)
        fold(self.float_model, self.trained, self.folded.path)
        return self

    def facts(self) -> dict[str, Any]:
        """trained.json."""
        return read_json(self.trained.path / "trained.json")

    def tensors(self, stage: str = "train") -> dict[str, Tensor]:
        """trained.safetensors or folded.safetensors."""
        return load_file(
            self.folder / stage / {"train": "trained.safetensors", "fold": "folded.safetensors"}[stage]
        )

    def logits(self, stage: str, ids: Tensor, **inputs: Tensor) -> Tensor:
        """Logits of one of the stages float, train, fold."""
        if stage == "float":
            model = AutoModelForCausalLM.from_pretrained(self.source, attn_implementation="eager").eval()
        elif stage == "train":
            model = rebuild(self.float_model, self.trained).model
        else:
            model = assemble(self.folded)
        with torch.no_grad():
            return model(input_ids=ids, **inputs).logits


def start_line(folder: Path, source: Path, text: Path, recipe: Recipe, family: str = "gpt2") -> Line:
    """Run the stage `load` and lay the recipe's formats over the model."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = folder / "load"
    loaded.mkdir()
    load(Model(family=family, source=str(source)), source, fingerprint(source), loaded)
    architecture = describe(family, source)
    return Line(
        recipe=recipe,
        text=text,
        folder=folder,
        source=source,
        float_model=FloatModel(loaded, source=source),
        architecture=architecture,
        plan=plan_layers(recipe, architecture),
    )


def token_ids(rows: int = 3, length: int = CONTEXT, seed: int = 1) -> Tensor:
    """Random token ids, int64 [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
