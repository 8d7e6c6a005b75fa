"""Greedy text generation on ONNX Runtime.

With a key-value cache in the graph, each step computes one token for each row, and the cache stays in ONNX
Runtime's memory: each step's cache output is bound as the next step's input (IO binding). Without a cache,
the whole prefix runs again for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from qcompress.errors import UsageError
from qcompress.models.architecture import PAST, PRESENT
from qcompress.parity.runners import complete, empty_past, fed, open_session


class Generator:
    """Continues rows of token ids; `optimized` as in `runners.OnnxRunner`."""

    def __init__(self, file: Path, family: str, threads: int, *, optimized: bool = True) -> None:
        self.family = family
        self.session = open_session(file, threads, optimized)
        self.cached = any(item.name.startswith(PAST) for item in self.session.get_inputs())

    def __call__(
        self, prompts: Sequence[Sequence[int]], tokens: int, end: int | None = None
    ) -> list[list[int]]:
        """Generate at most `tokens` new tokens for each prompt; a row stops after the token `end`.

        Shorter prompts are padded on the left. Among equal logits the first token is chosen.
        """
        if not prompts or not all(prompts):
            raise UsageError("a prompt has no tokens", fix="give at least one token")
        longest = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        step = _Cached(self) if self.cached else _Whole(self)
        generated: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for _ in range(tokens):
            best = step(ids, mask)
            for row in list(running):
                generated[row].append(int(best[row]))
                if generated[row][-1] == end:
                    running.remove(row)
            if not running:
                break
            ids = best[:, None]
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        return generated


class _Whole:
    """Next token of each row, computed from the whole prefix."""

    def __init__(self, owner: Generator) -> None:
        self.owner, self.ids = owner, None

    def __call__(self, new: np.ndarray, mask: np.ndarray) -> np.ndarray:
        self.ids = new if self.ids is None else np.concatenate([self.ids, new], axis=1)
        inputs = complete(self.owner.family, {"input_ids": self.ids, "attention_mask": mask})
        feed = fed(self.owner.session, {name: tensor.numpy() for name, tensor in inputs.items()})
        return self.owner.session.run(["logits"], feed)[0][:, -1].argmax(-1)


class _Cached:
    """Next token of each row, computed from the new tokens and the cache."""

    def __init__(self, owner: Generator) -> None:
        self.owner = owner
        self.names = [item.name for item in owner.session.get_outputs()]
        self.past: dict[str, onnxruntime.OrtValue] = {}

    def __call__(self, new: np.ndarray, mask: np.ndarray) -> np.ndarray:
        session = self.owner.session
        past = mask.shape[1] - new.shape[1]
        inputs = complete(self.owner.family, {"input_ids": new, "attention_mask": mask}, past)
        binding = session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(tensor.numpy()))
        if not self.past:
            empty = empty_past(session, len(new))
            self.past = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in empty.items()
            }
        for name, value in self.past.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.names:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        outputs = dict(zip(self.names, binding.get_outputs(), strict=True))
        self.past = {name: outputs[PRESENT + name.removeprefix(PAST)] for name in self.past}
        return outputs["logits"].numpy()[:, -1].argmax(-1)
