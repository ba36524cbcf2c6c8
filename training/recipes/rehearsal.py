"""Tiny random checkpoints in the published forms, to rehearse a recipe where the hub cannot be reached.

    python -m training.recipes.rehearsal whisper --language vi --out FOLDER

They have the right files, names and shapes and know nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.data.synthetic import WORDS
from training.text import alphabet
from training.tokenizer import load_tokenizer, train_tokenizer


def tiny_whisper(folder: Path, language: str, *, width: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """A WhisperForConditionalGeneration with tokenizer and feature extractor in `folder`."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    train_tokenizer([WORDS[language], " ".join(alphabet(language))], folder)
    tokenizer = load_tokenizer(str(folder))
    end = tokenizer.pad_token_id
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_target_positions=64,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


def tiny_wav2vec2(folder: Path, *, width: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """A Wav2Vec2Model of XLSR's kind (layer norm in the feature encoder, pre-norm layers) in `folder`."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        conv_dim=(32,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
    )
    torch.manual_seed(seed)
    Wav2Vec2Model(config).save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)  # type: ignore[no-untyped-call]
    extractor.save_pretrained(folder)
    return folder


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["whisper", "wav2vec2"])
    parser.add_argument("--language", choices=sorted(WORDS), default="en")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    print(tiny_whisper(given.out, given.language) if given.kind == "whisper" else tiny_wav2vec2(given.out))


if __name__ == "__main__":
    main()
