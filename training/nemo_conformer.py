"""Conformer and FastConformer of a NeMo archive: a CTC model, or the CTC half of a hybrid one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from training.conformer import ConformerConfig, ConformerCtc, Subsampling
from training.errors import CheckpointError
from training.frontend import FrontendConfig
from training.nemo_archive import (
    CONFORMER,
    NemoArchive,
    NemoError,
    check_filters,
    frontend_of,
    section,
    vocabulary_of,
)
from training.pretrained import fill

_CTC_HEADS = ("ctc_decoder.decoder_layers.0.", "decoder.decoder_layers.0.")
"""Of a hybrid model, whose `decoder` is the transducer's, and of a plain one."""
_COMPUTED = ("preprocessor.", "encoder.pos_enc.")
_TRANSDUCER = ("decoder.", "joint.")
_PLACES = {
    "pre_encode.conv.": "subsampling.layers.",
    "pre_encode.out.": "subsampling.linear.",
}
_PARTS = {
    "self_attn.linear_q.": "self_attn.q_proj.",
    "self_attn.linear_k.": "self_attn.k_proj.",
    "self_attn.linear_v.": "self_attn.v_proj.",
    "self_attn.linear_out.": "self_attn.o_proj.",
    "self_attn.linear_pos.": "self_attn.relative_k_proj.",
    "self_attn.pos_bias_u": "self_attn.bias_u",
    "self_attn.pos_bias_v": "self_attn.bias_v",
    "conv.batch_norm.": "conv.norm.",
}


@dataclass(frozen=True)
class NemoConformer:
    """A network in evaluation mode and its tokens without the blank, which is the last output."""

    model: ConformerCtc
    vocabulary: tuple[str, ...]


def conformer_of(archive: NemoArchive) -> NemoConformer:
    """The network of an open archive. Raises NemoError on anything unknown."""
    if archive.encoder != CONFORMER:
        raise NemoError(f"{archive.name}: encoder._target_: {archive.encoder}, expected {CONFORMER}")
    vocabulary = vocabulary_of(archive.config)
    frontend: FrontendConfig = archive.configured(frontend_of)
    config = archive.configured(_config)
    check_filters(archive.state, frontend)
    model = archive.configured(lambda given: ConformerCtc(config, len(vocabulary) + 1, frontend)).eval()
    counters = tuple(name for name in model.network.state_dict() if name.endswith("num_batches_tracked"))
    try:
        fill(model.network, _renamed(archive), optional=counters)
    except CheckpointError as error:
        raise NemoError(f"{archive.name}: model_weights.ckpt: {error}") from error
    return NemoConformer(model, vocabulary)


def _config(config: Mapping[str, Any]) -> ConformerConfig:
    given = section(config, "encoder")
    expected: dict[str, Sequence[Any]] = {
        "self_attention_model": ("rel_pos",),
        "att_context_style": ("regular",),
        "causal_downsampling": (False,),
        "conv_norm_type": ("batch_norm",),
        "conv_context_style": ("regular",),
        "reduction": (None,),
        "global_tokens": (0,),
        "feat_out": (-1, given["d_model"]),
        "subsampling": get_args(Subsampling),
    }
    for name, known in expected.items():
        if given.get(name, known[0]) not in known:
            listed = " or ".join(repr(value) for value in known)
            raise NemoError(f"encoder.{name}: {given[name]!r}, only {listed} is known")
    _check_context(given)
    width, kernel = int(given["d_model"]), int(given["conv_kernel_size"])
    if given.get("conv_context_size") not in (None, [(kernel - 1) // 2] * 2):
        raise NemoError(
            f"encoder.conv_context_size: {given['conv_context_size']!r}, only equal sides are known"
        )
    channels = int(given.get("subsampling_conv_channels", -1))
    return ConformerConfig(
        features=int(given["feat_in"]),
        width=width,
        layers=int(given["n_layers"]),
        heads=int(given["n_heads"]),
        inner=width * int(given.get("ff_expansion_factor", 4)),
        kernel=kernel,
        subsampling=given.get("subsampling", "striding"),
        subsampling_factor=int(given.get("subsampling_factor", 4)),
        subsampling_channels=width if channels < 0 else channels,
        scale_input=bool(given.get("xscaling", True)),
        bias=bool(given.get("use_bias", True)),
    )


def _check_context(encoder: Mapping[str, Any]) -> None:
    """Only attention over the whole recording: [-1, -1], alone or the first of a list of such."""
    context = encoder.get("att_context_size") or [-1, -1]
    first = context[0] if isinstance(context[0], Sequence) else context
    if list(first) != [-1, -1]:
        raise NemoError(
            f"encoder.att_context_size: {context!r}, only [-1, -1] is known: attention over the whole "
            "recording, not that of streaming models"
        )


def _renamed(archive: NemoArchive) -> dict[str, Tensor]:
    """NeMo's names as `transformers` has them, without a hybrid's transducer and what is computed here."""
    head = next((head for head in _CTC_HEADS if f"{head}weight" in archive.state), None)
    if head is None:
        raise NemoError(f"{archive.name}: no CTC head in it; a transducer alone is not served here")
    dropped = _COMPUTED if head.startswith("decoder.") else (*_COMPUTED, *_TRANSDUCER)
    renamed: dict[str, Tensor] = {}
    for name, value in archive.state.items():
        if name.startswith(head):
            renamed["ctc_head." + name.removeprefix(head)] = value
        elif name.startswith(dropped):
            continue
        elif name.startswith("encoder."):
            renamed["encoder." + _encoder_name(name.removeprefix("encoder."))] = value
        else:  # such as a prompt's or a speaker's projection between encoder and head
            raise NemoError(f"{archive.name}: model_weights.ckpt: unknown tensor {name}")
    return renamed


def _encoder_name(name: str) -> str:
    for theirs, ours in _PLACES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    for theirs, ours in _PARTS.items():
        before, found, rest = name.partition(f".{theirs}")
        if found:
            return f"{before}.{ours}{rest}"
    return name
