"""Tokenizers: between the metadata of files and tokenizer.json with what stands beside it, chat template included.

Files know two kinds that are served here: "gpt2", byte-level BPE by a list of merges, and "llama", BPE that joins what
gives the token of the highest score, with bytes for what no token spells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from quantcore.sdk import CheckpointError
from quantcore_misc.gguf.container import Contents
from quantcore_misc.gguf.metadata import Value

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # kinds of tokens
_SPACE = "\u2581"  # stands for a blank in tokens
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LATER = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(endings: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{endings}|{start}{_UPPER}+{_LOWER}*{endings}"


# How text is cut before merges, by the names of files; what is not here is cut as GPT-2 does.
_CUTS = {
    "llama-bpe": f"{_ENDINGS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}",
    "qwen2": f"{_ENDINGS}|{_WORDS}|\\p{{N}}|{_REST}",
    "gpt-4o": f"{_cased(f'{_ENDINGS}?')}|\\p{{N}}{{1,3}}|{_LATER}",
    "tekken": f"{_cased('')}|\\p{{N}}|{_LATER}",
}
_GPT2 = ("gpt-2", "gpt2", "default")
_COMPOSED = ("qwen2",)  # names of those that bring text into Unicode's composed form first


def files(contents: Contents, path: Path) -> dict[str, Callable[[], Any]]:
    """What makes the content of each file of a tokenizer, by name; none where the model has no tokenizer."""
    if contents.get(f"{_PREFIX}model") in (None, "no_vocab"):
        return {}
    return {
        "tokenizer.json": partial(_checked, _tokenizer_json, contents, path),
        "tokenizer_config.json": partial(_checked, _tokenizer_config, contents, path),
    }


def _checked(make: Callable[[Contents], Any], contents: Contents, path: Path) -> Any:
    try:
        return make(contents)
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be made: {error}") from error


def _tokenizer_json(contents: Contents) -> dict[str, Any]:
    kind, tokens = contents.get(f"{_PREFIX}model"), list(contents.get(f"{_PREFIX}tokens", ()))
    if kind not in _READERS:
        raise ValueError(f"tokenizer.ggml.model {kind!r:.40} is none of {', '.join(_READERS)}")
    if not tokens or len(set(tokens)) != len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens holds {len(tokens)} tokens, {len(set(tokens))} of them different")
    kinds = contents.get(f"{_PREFIX}token_type") or [_NORMAL] * len(tokens)
    added = [
        _added(number, token, kinds[number] == _CONTROL)
        for number, token in enumerate(tokens)
        if kinds[number] in (_CONTROL, _USER)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **_READERS[kind](contents, {token: number for number, token in enumerate(tokens)}),
        "post_processor": _post_processor(contents, tokens),
    }


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": number, "content": token, **flags}


def _read_bytes(contents: Contents, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    cut = contents.get(f"{_PREFIX}pre", "default")
    if cut not in _CUTS and cut not in _GPT2:
        known = ", ".join((*_CUTS, *_GPT2))
        raise ValueError(f"tokenizer.ggml.pre {cut!r:.40} is none of {known}; put the model's own tokenizer.json there")
    merges = [merge.split(" ", 1) for merge in contents.get(f"{_PREFIX}merges", ())]
    return {
        "normalizer": {"type": "NFC"} if cut in _COMPOSED else None,
        "pre_tokenizer": _cut_json(_CUTS.get(cut)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": _bpe(vocabulary, merges),
    }


def _cut_json(pattern: str | None) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": pattern is None}
    if pattern is None:
        return level
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def _bpe(vocabulary: Mapping[str, int], merges: list[Any], **changes: Any) -> dict[str, Any]:
    usual = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {"type": "BPE", **usual, **changes, "vocab": dict(vocabulary), "merges": merges}


def _read_scores(contents: Contents, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    tokens, scores = list(vocabulary), contents.get(f"{_PREFIX}scores", ())
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} numbers for {len(tokens)} tokens")
    kinds = contents.get(f"{_PREFIX}token_type") or [_NORMAL] * len(tokens)
    joined = sorted(
        (token for token, kind in zip(tokens, kinds, strict=True) if kind == _NORMAL and len(token) > 1),
        key=lambda token: -scores[vocabulary[token]],
    )
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    prefixed = contents.get(f"{_PREFIX}add_space_prefix", True)
    before = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    blanks = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    merges = [[token[:cut], token[cut:]] for token in joined for cut in _cuts(token, vocabulary)]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [blanks, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in kinds),
    }


def _cuts(token: str, vocabulary: Mapping[str, int]) -> Iterable[int]:
    """Where a token falls into two others."""
    return (cut for cut in range(1, len(token)) if token[:cut] in vocabulary and token[cut:] in vocabulary)


_READERS = {"gpt2": _read_bytes, "llama": _read_scores}


def _post_processor(contents: Contents, tokens: list[str]) -> dict[str, Any] | None:
    """What puts the first and the last token around a text, where the file asks for them."""
    adds = {
        "bos": contents.get(f"{_PREFIX}add_bos_token", contents.get(f"{_PREFIX}model") == "llama"),
        "eos": contents.get(f"{_PREFIX}add_eos_token", False),
    }
    ids = {role: contents.get(f"{_PREFIX}{role}_token_id") for role, wanted in adds.items() if wanted}
    if not any(number is not None for number in ids.values()):
        return None
    named = {role: tokens[number] for role, number in ids.items() if number is not None}
    special = {name: {"id": name, "ids": [tokens.index(name)], "tokens": [name]} for name in named.values()}

    def template(sequences: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for sequence, number in sequences:
            marks = {role: {"SpecialToken": {"id": name, "type_id": number}} for role, name in named.items()}
            body = {"Sequence": {"id": sequence, "type_id": number}}
            found += [part for part in (marks.get("bos"), body, marks.get("eos")) if part is not None]
        return found

    single, pair = template([("A", 0)]), template([("A", 0), ("B", 1)])
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _tokenizer_config(contents: Contents) -> dict[str, Any]:
    tokens = contents.get(f"{_PREFIX}tokens", ())
    ids = {role: contents.get(f"{_PREFIX}{name}_token_id") for role, name in _ROLES.items()}
    named = {role: tokens[number] for role, number in ids.items() if number is not None}
    template = contents.get(_TEMPLATE)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **named,
        **({} if template is None else {"chat_template": template}),
    }


# Into files


def write_tokenizer(side_files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, Value]:
    """The metadata of a tokenizer for the files beside a checkpoint; of none where there is no tokenizer.json.

    config: config.json. Raises ValueError for a tokenizer that files cannot hold.
    """
    if "tokenizer.json" not in side_files:
        return {f"{_PREFIX}model": Value("string", "no_vocab")}
    found = json.loads(side_files["tokenizer.json"])
    beside = json.loads(side_files["tokenizer_config.json"]) if "tokenizer_config.json" in side_files else {}
    model = found["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"tokenizer.json: a model of the type {model.get('type')!r:.40} has no form in GGUF files")
    added = {token["content"]: token for token in found.get("added_tokens", ())}
    tokens = _listed(model["vocab"], added, int(config.get("vocab_size") or 0))
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    is_bytes = _byte_level(found)
    values = (_write_bytes if is_bytes else _write_scores)(found, tokens, merges)
    kinds = [_kind_of(token, added, model.get("unk_token"), not is_bytes) for token in tokens]
    return {
        **values,
        f"{_PREFIX}tokens": Value("array", tokens, "string"),
        f"{_PREFIX}token_type": Value("array", kinds, "int32"),
        **_written_roles(found, beside, config, tokens),
        **_written_template(side_files, beside),
    }


def _listed(vocabulary: Mapping[str, int], added: Mapping[str, Mapping[str, Any]], count: int) -> list[str]:
    """Every token by its number; numbers without one get a name that no text has."""
    numbers = {**{number: token for token, number in vocabulary.items()}}
    numbers |= {int(token["id"]): name for name, token in added.items()}
    size = max(count, max(numbers, default=-1) + 1)
    return [numbers.get(number, f"[PAD{number}]") for number in range(size)]


def _kind_of(token: str, added: Mapping[str, Mapping[str, Any]], unknown: str | None, has_bytes: bool) -> int:
    if token == unknown:
        return _UNKNOWN
    if token in added:
        return _CONTROL if added[token].get("special") else _USER
    if has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return _BYTE
    return _UNUSED if token.startswith("[PAD") and token.endswith("]") else _NORMAL


def _byte_level(found: Mapping[str, Any]) -> bool:
    parts = found.get("pre_tokenizer") or {}
    return any(part.get("type") == "ByteLevel" for part in (parts, *parts.get("pretokenizers", ())))


def _write_bytes(found: Mapping[str, Any], tokens: list[str], merges: list[list[str]]) -> dict[str, Value]:
    joined = [" ".join(merge) for merge in merges]
    return {
        f"{_PREFIX}model": Value("string", "gpt2"),
        f"{_PREFIX}pre": Value("string", _cut_of(found["pre_tokenizer"])),
        f"{_PREFIX}merges": Value("array", joined, "string"),
    }


def _cut_of(parts: Mapping[str, Any]) -> str:
    splits = [part for part in parts.get("pretokenizers", (parts,)) if part.get("type") == "Split"]
    if not splits:
        return "gpt-2"
    pattern = splits[0]["pattern"].get("Regex")
    name = next((name for name, known in _CUTS.items() if known == pattern), None)
    if name is None:
        raise ValueError(
            f"tokenizer.json cuts text by {pattern!r:.60}, which no GGUF file can say; known: {list(_CUTS)}"
        )
    return name


def _write_scores(found: Mapping[str, Any], tokens: list[str], merges: list[list[str]]) -> dict[str, Value]:
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    before = json.dumps(found.get("normalizer") or {}) + json.dumps(found.get("pre_tokenizer") or {})
    prefixed = '"Prepend"' in before or '"prepend_scheme": "first"' in before or '"prepend_scheme": "always"' in before
    return {
        f"{_PREFIX}model": Value("string", "llama"),
        f"{_PREFIX}pre": Value("string", "default"),
        f"{_PREFIX}scores": Value("array", scores, "float32"),
        f"{_PREFIX}add_space_prefix": Value("bool", prefixed),
    }


def _written_roles(
    found: Mapping[str, Any], beside: Mapping[str, Any], config: Mapping[str, Any], tokens: list[str]
) -> dict[str, Value]:
    numbers = {token: number for number, token in enumerate(tokens)}
    values = {}
    for role, name in _ROLES.items():
        number = config.get(f"{role}_id")
        number = number[0] if isinstance(number, list) and number else number
        named = beside.get(role)
        named = named.get("content") if isinstance(named, Mapping) else named
        number = numbers.get(named) if number is None and named is not None else number
        if isinstance(number, int) and 0 <= number < len(tokens):
            values[f"{_PREFIX}{name}_token_id"] = Value("uint32", number)
    single = (found.get("post_processor") or {}).get("single") or []
    adds = [part["SpecialToken"]["id"] for part in single if isinstance(part, Mapping) and "SpecialToken" in part]
    for role in ("bos", "eos"):
        number = values.get(f"{_PREFIX}{role}_token_id")
        wanted = number is not None and tokens[number.data] in adds
        values[f"{_PREFIX}add_{role}_token"] = Value("bool", bool(beside.get(f"add_{role}_token", wanted)))
    return values


def _written_template(side_files: Mapping[str, bytes], beside: Mapping[str, Any]) -> dict[str, Value]:
    template = beside.get("chat_template")
    if "chat_template.jinja" in side_files:
        template = side_files["chat_template.jinja"].decode()
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, Mapping)}
        template = named.get("default") or next(iter(named.values()), None)
    return {_TEMPLATE: Value("string", template)} if isinstance(template, str) else {}
