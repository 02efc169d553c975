"""SentencePiece models (tokenizer.model of Llama 2, Mistral, Phi-3) as a tokenizers.Tokenizer.

Source: transformers 5.24, convert_slow_tokenizer.py, build_tokenizer_from_spm_proto.
"""

import re

from plumbing.errors import UserError

SPACE = "\u2581"  # as SentencePiece writes one


def read_sentencepiece(path, config, class_name):
    """The tokenizers.Tokenizer that encodes as a SentencePiece model of type BPE does.

    config: tokenizer_config.json. class_name: of a class with steps of its own, "" for none. Raises UserError for
    another type, and for a missing package.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(f"{path} is a SentencePiece model, which needs: pip install sentencepiece protobuf") from error
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from error
    pieces, trainer, normalizer = proto.pieces, proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise UserError(f"{path} is a SentencePiece model of another type than BPE: use a tokenizer.json made of it")
    scores = {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}
    merges = [(text[:i], text[i:]) for text in sorted(scores, key=scores.get, reverse=True)
              for i in range(1, len(text)) if text[:i] in scores and text[i:] in scores]
    control = [piece.piece for piece in pieces if piece.type in (piece.UNKNOWN, piece.CONTROL)]
    words = sorted((piece.piece for piece in pieces if piece.type == piece.USER_DEFINED), key=len, reverse=True)
    full = Tokenizer(models.BPE({piece.piece: i for i, piece in enumerate(pieces)}, merges, fuse_unk=True,
                                unk_token=trainer.unk_piece, byte_fallback=trainer.byte_fallback,
                                ignore_merges=bool(words)))
    legacy = config.get("legacy", True)  # a space goes before the text between added tokens, too
    replaced = [(r"\A +| +\z", ""), (" {2,}", " ")] if normalizer.remove_extra_whitespaces else []
    replaced += [(" ", SPACE)] + [(rf"\A{SPACE}", SPACE * 2)] * bool(normalizer.add_dummy_prefix and legacy)
    steps = [normalizers.Replace(Regex(pattern), text) for pattern, text in replaced]
    if normalizer.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(normalizer.precompiled_charsmap))
    prefix = pre_tokenizers.Metaspace(prepend_scheme="always" if legacy else "first", split=False)
    split = pre_tokenizers.Split(Regex("|".join(map(re.escape, words))), "isolated")
    full.normalizer = normalizers.Sequence(steps)
    full.pre_tokenizer = pre_tokenizers.Sequence([prefix] * normalizer.add_dummy_prefix + [split] * bool(words))
    if not config.keys() & {"extra_special_tokens", "additional_special_tokens"}:  # which replace the model's own
        full.add_special_tokens(control)
        full.add_tokens([AddedToken(word, normalized=False) for word in words if class_name])
    return full
