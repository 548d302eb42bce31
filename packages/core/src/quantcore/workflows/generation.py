"""Text from a model: what a user looks at first after quantizing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantcore._optional import require

# What leaves unlikely tokens out, by its key in a model's generation_config.json: the value where there is none, and
# its class. 0 leaves out none, and so does 1 for a share of the probability.
_NARROWING = {
    "top_k": (50, "TopKLogitsWarper"),
    "top_p": (1.0, "TopPLogitsWarper"),
    "min_p": (0.0, "MinPLogitsWarper"),
    "typical_p": (1.0, "TypicalLogitsWarper"),
}


@dataclass(frozen=True)
class Generation:
    """A continuation, and how long it took.

    first_seconds: to the first token, the reading of the prompt among them. seconds: from there to the last token.
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, each of which takes one step; 0 where there are none."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else 0.0


def prompt_ids(tokenizer: Any, messages: Sequence[tuple[str, str]], *, as_chat: bool) -> list[int]:
    """Token ids of a conversation, (role, text) pairs under the chat template, or of the last text as it is."""
    if as_chat:
        conversation = [{"role": role, "content": text} for role, text in messages]
        found = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    else:
        found = tokenizer(messages[-1][1], verbose=False)
    ids: list[int] = list(found["input_ids"])
    return ids


def generate(
    model: nn.Module,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    show: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue token ids by at most max_tokens tokens, up to the model's end token or the end of its context.

    temperature: 0 takes the likeliest token each time; above it they are drawn, the same ones for the same seed, from
    a generator that nothing else uses.
    show: called with each piece of the text as it comes. Needs the extra transformers.
    Raises ValueError for a model that generates no text, and for ids that are none or fill its context.
    """
    transformers = require("transformers", "transformers")
    write, ends = _writer(model), _end_tokens(model)
    config = transformers.GenerationConfig(
        max_new_tokens=min(max_tokens, _room(model, len(ids))),
        eos_token_id=ends or None,
        pad_token_id=next(iter(ends), 0),  # one text at a time has no padding; transformers warns without one
        do_sample=False,  # torch's own draws come from a generator that every thread shares
    )
    prompt = torch.tensor([list(ids)], device=next(model.parameters()).device)
    times: list[float] = []
    streamer = _streamer(transformers, tokenizer, show, times)
    out = write(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        streamer=streamer,
        logits_processor=[_Draw(_narrowed(transformers, model, temperature), seed)] if temperature else [],
    )
    start, first, last = times[0], times[1], times[-1]
    new = out[0, len(ids) :]
    return Generation(tokenizer.decode(new, skip_special_tokens=True), len(ids), len(new), first - start, last - first)


def written_rows(model: nn.Module, rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Token ids [rows, length at most] that a language model writes by itself, for what needs a text and has none.

    Each row begins with a token drawn from the whole vocabulary, and goes on with those drawn by their probability.
    Raises ValueError for a model that generates no text.
    """
    transformers = require("transformers", "transformers")
    config = transformers.GenerationConfig(
        max_new_tokens=min(length - 1, _room(model, 1)), do_sample=False, eos_token_id=None, pad_token_id=0
    )
    first = torch.Generator("cpu").manual_seed(seed)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    start = torch.randint(embedding.num_embeddings, (rows, 1), generator=first).to(embedding.weight.device)
    with torch.no_grad():
        found: Tensor = _writer(model)(
            start,
            attention_mask=torch.ones_like(start),
            generation_config=config,
            logits_processor=[_Draw([], seed)],
        )
    return found


def _writer(model: nn.Module) -> Callable[..., Tensor]:
    write: Any = getattr(model, "generate", None)
    if write is None:
        raise ValueError(f"{type(model).__name__} generates no text: it has no language-model head")
    found: Callable[..., Tensor] = write
    return found


class _Draw:
    """Leaves one token possible, drawn by its probability with a generator of its own."""

    def __init__(self, narrow: Sequence[Callable[[Tensor, Tensor], Tensor]], seed: int) -> None:
        self._narrow, self._generator = narrow, torch.Generator("cpu").manual_seed(seed)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token [B, V], -inf for all but the drawn one. ids: [B, T], what stands before it."""
        narrowed = scores.float()
        for narrow in self._narrow:
            narrowed = narrow(ids, narrowed)
        drawn = torch.multinomial(narrowed.cpu().softmax(-1), 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.to(scores.device), 0.0)


def _narrowed(transformers: Any, model: Any, temperature: float) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """What changes scores before a token is drawn: the temperature, and what the model's own settings leave out."""
    found = [transformers.TemperatureLogitsWarper(temperature)]
    for key, (usual, warper) in _NARROWING.items():
        value = getattr(model.generation_config, key, None)
        value = usual if value is None else value
        if value and (key == "top_k" or value < 1):
            found.append(getattr(transformers, warper)(value))
    return found


def _streamer(transformers: Any, tokenizer: Any, show: Callable[[str], None], times: list[float]) -> Any:
    """What transformers hands tokens to: the prompt first, then each token as it is chosen."""

    class Streamer(transformers.TextStreamer):  # type: ignore[misc]
        def put(self, value: Tensor) -> None:
            times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _end_tokens(model: Any) -> list[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = model.config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _room(model: Any, taken: int) -> int:
    """Tokens that the context still holds."""
    if not taken:
        raise ValueError("an empty prompt gives nothing to continue; write some text")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return 1 << 30
    if taken >= limit:
        raise ValueError(f"the prompt has {taken} tokens, and the model's context holds {limit}; shorten it")
    return int(limit - taken)
