"""Known public models: where they are published, under which licence, what converts them to a bundle.

Everything is pinned: a hub file by commit, an archive by the version in its address. Where the commit or the
sha256 was not known when this was written (``None``), the first pull resolves and records it beside the
downloads, and later pulls hold to that record. The bundle's manifest names what was used.

``api/pull.py`` downloads; converting needs torch and happens in another process (``training.convert``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Family = Literal["moonshine", "nemo", "wav2vec2", "whisper"]


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files of a hub repository. ``revision``: the full commit, None to record the one of the first pull.

    ``optional``: files that help where they exist.
    """

    repository: str
    revision: str | None
    files: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Archive:
    """One file at an address that names its version. ``sha256`` None: recorded by the first good pull."""

    url: str
    file: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model to pull. ``sources``: the first holds the weights; the converter finds the others beside it."""

    name: str
    title: str
    languages: tuple[str, ...]
    licence: str
    family: Family
    sources: tuple[HubFiles | Archive, ...]
    page: str
    needs_recordings: bool = False
    """Too many weights for a float32 graph: INT8 is made at once, which wants recordings to accept it on."""

    @property
    def weights(self) -> str:
        """Name of the file that holds the weights: the first file of the first source."""
        first = self.sources[0]
        return first.file if isinstance(first, Archive) else first.files[0]


_NGC = "https://api.ngc.nvidia.com/v2/models/nvidia/nemo"
_WAV2VEC2_FILES = ("config.json", "vocab.json", "preprocessor_config.json")
_WHISPER_FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
_MOONSHINE_FILES = ("model.safetensors", "config.json", "tokenizer.json")
_TOKENS = ("special_tokens_map.json", "tokenizer_config.json")


def _ngc(name: str, title: str, model: str, version: str) -> CatalogEntry:
    """A NeMo archive of NVIDIA's catalogue, whose name begins with the language."""
    return CatalogEntry(
        name=name,
        title=title,
        languages=(name[:2],),
        licence="NGC terms of use",
        family="nemo",
        sources=(Archive(f"{_NGC}/{model}/versions/{version}/files/{model}.nemo", f"{model}.nemo"),),
        page=f"https://catalog.ngc.nvidia.com/orgs/nvidia/teams/nemo/models/{model}",
    )


def _whisper(language: str, size: str, named: str) -> CatalogEntry:
    """OpenAI's Whisper with its decoder, told to write that language."""
    return CatalogEntry(
        name=f"{language}-whisper-{size}",
        title=f"Whisper {size}, {named} (OpenAI)",
        languages=(language,),
        licence="Apache-2.0",
        family="whisper",
        sources=(HubFiles(f"openai/whisper-{size}", None, _WHISPER_FILES, ("added_tokens.json", *_TOKENS)),),
        page=f"https://huggingface.co/openai/whisper-{size}",
    )


def _moonshine(name: str, named: str, repository: str, licence: str) -> CatalogEntry:
    """A Moonshine with its decoder, whose name begins with the language."""
    return CatalogEntry(
        name=name,
        title=f"Moonshine {name.rpartition('-')[2]}, {named} (Moonshine AI)",
        languages=(name[:2],),
        licence=licence,
        family="moonshine",
        sources=(HubFiles(repository, None, _MOONSHINE_FILES, ("generation_config.json",)),),
        page=f"https://huggingface.co/{repository}",
    )


_ENTRIES = (
    _ngc("en-quartznet15x5", "QuartzNet15x5, English (NVIDIA NeMo)", "stt_en_quartznet15x5", "1.0.0rc1"),
    _ngc(
        "en-conformer-small",
        "Conformer-CTC small, English (NVIDIA NeMo)",
        "stt_en_conformer_ctc_small",
        "1.6.0",
    ),
    _ngc(
        "en-fastconformer-large",
        "FastConformer large, English, cased (NVIDIA)",
        "stt_en_fastconformer_hybrid_large_pc",
        "1.21.0",
    ),
    _moonshine("en-moonshine-base", "English", "UsefulSensors/moonshine-base", "MIT"),
    _ngc("ru-quartznet15x5", "QuartzNet15x5, Russian (NVIDIA NeMo)", "stt_ru_quartznet15x5", "1.0.0rc1"),
    CatalogEntry(
        name="ru-fastconformer-large",
        title="FastConformer large, Russian, cased (NVIDIA)",
        languages=("ru",),
        licence="CC-BY-4.0",
        family="nemo",
        sources=(
            HubFiles(
                "nvidia/stt_ru_fastconformer_hybrid_large_pc",
                "9d65ebcc12bedae82b23ceadae4e8abb9fbd27a0",
                ("stt_ru_fastconformer_hybrid_large_pc.nemo",),
            ),
        ),
        page="https://huggingface.co/nvidia/stt_ru_fastconformer_hybrid_large_pc",
    ),
    CatalogEntry(
        name="vi-phowhisper-tiny-ctc",
        title="PhoWhisper-tiny with a CTC head, Vietnamese",
        languages=("vi",),
        licence="MIT (head), BSD-3-Clause (PhoWhisper)",
        family="whisper",
        sources=(
            HubFiles("tuandunghcmut/PhoWhisper-tiny-CTC", None, ("best-val_wer=0.3986.ckpt",)),
            HubFiles(
                "vinai/PhoWhisper-tiny",
                "9d5a7363a62411908c1be19f2423edb986aec2d0",
                ("config.json", "tokenizer.json"),
                _TOKENS,
            ),
        ),
        page="https://huggingface.co/tuandunghcmut/PhoWhisper-tiny-CTC",
    ),
    _moonshine(
        "vi-moonshine-tiny",
        "Vietnamese",
        "UsefulSensors/moonshine-tiny-vi",
        "Moonshine AI Community License (not for companies of more than $1M a year)",
    ),
    CatalogEntry(
        name="vi-parakeet-ctc-0.6b",
        title="Parakeet-CTC 0.6B, Vietnamese (NVIDIA)",
        languages=("vi",),
        licence="NVIDIA Open Model License",
        family="nemo",
        sources=(HubFiles("nvidia/parakeet-ctc-0.6b-Vietnamese", None, ("parakeet-ctc-0.6b-vi.nemo",)),),
        page="https://huggingface.co/nvidia/parakeet-ctc-0.6b-Vietnamese",
        needs_recordings=True,
    ),
    CatalogEntry(
        name="tr-wav2vec2-xls-r-300m",
        title="wav2vec2 XLS-R 300M, Turkish (Common Voice 8)",
        languages=("tr",),
        licence="Apache-2.0",
        family="wav2vec2",
        sources=(
            HubFiles(
                "mpoyraz/wav2vec2-xls-r-300m-cv8-turkish",
                "3b69b6e88b2e2f40c4fa755d9ed315a7498a1564",
                ("model.safetensors", *_WAV2VEC2_FILES),
                _TOKENS,
            ),
        ),
        page="https://huggingface.co/mpoyraz/wav2vec2-xls-r-300m-cv8-turkish",
    ),
    CatalogEntry(
        name="az-wav2vec2-xls-r-300m",
        title="wav2vec2 XLS-R 300M, Azerbaijani",
        languages=("az",),
        licence="Apache-2.0",
        family="wav2vec2",
        sources=(
            HubFiles(
                "menhior/wav2vec2-large-xls-r-300m-azeri-colab-test",
                "1fe2ff1c73ac05383a27d303d6087cb848fc6ad2",
                ("pytorch_model.bin", *_WAV2VEC2_FILES),
                _TOKENS,
            ),
        ),
        page="https://huggingface.co/menhior/wav2vec2-large-xls-r-300m-azeri-colab-test",
    ),
    *(
        _whisper(language, size, named)
        for language, named in (
            ("en", "English"),
            ("vi", "Vietnamese"),
            ("tr", "Turkish"),
            ("az", "Azerbaijani"),
            ("ru", "Russian"),
        )
        for size in ("base", "small")
    ),
)

CATALOG: Mapping[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}
