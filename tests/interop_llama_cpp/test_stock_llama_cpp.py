"""What we save as GGUF runs in llama.cpp, with our tokens and our logits. Needs llama-cpp-python; run by name.

llama.cpp multiplies float32 as we do; to the blocks of a quantized matrix it brings inputs rounded to 8 bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import pytest
import torch
from gguf_models import MODELS, float_folder
from torch import Tensor

import quantcore
from quantcore.integrations.transformers import load_tokenizer
from quantcore_misc.gguf.container import read_contents, read_tensors
from quantcore_misc.gguf.mixes import MIXES
from quantcore_misc.gguf.quantize import QUANTIZERS

STDLIB = Path(__file__).parents[2] / "examples" / "stdlib-lm"
PROMPT = 'def read(self, size=-1):\n    """Return'
MADE = [
    name for name, mix in MIXES.items() if {mix.base, mix.output, *(rule.type for rule in mix.rules)} <= {*QUANTIZERS}
]
ALIKE = [name for name in MODELS if name != "gpt-oss-yarn"]  # llama.cpp rounds where YaRN begins and ends
NEEDS_IMPORTANCE = ("Q2_K_S",)  # llama.cpp makes it with an imatrix alone
FLOAT = 1e-3  # of logits' norm: 3e-4 under the tables of gelu in float16, 1e-6 elsewhere
ROUNDED = 0.03  # of logits' norm, on the bundled model: 0.020 under TQ2_0, 0.010 under all others
TIE = 0.3  # logits: what rounding may bring from the second place to the first
NEW = 24


@contextmanager
def running(file: Path, context: int = 256) -> Iterator[llama_cpp.Llama]:
    """A file in llama.cpp, with keys and values in float32."""
    plain = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(file), n_ctx=context, n_threads=1, logits_all=True, verbose=False, type_k=plain, type_v=plain
    )
    try:
        yield model
    finally:
        model.close()


def continued(file: Path, ids: Sequence[int], count: int, context: int = 256) -> tuple[list[int], Tensor]:
    """What llama.cpp writes after a prompt, always its best token, and its logits at every place before."""
    with running(file, context) as model:
        model.eval(ids)
        written = [int(model.scores[model.n_tokens - 1].argmax())]
        while len(written) < count:
            model.eval(written[-1:])
            written.append(int(model.scores[model.n_tokens - 1].argmax()))
        return written, torch.from_numpy(model.scores[: model.n_tokens].copy())


def our_logits(file: Path, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = quantcore.load(file)(torch.tensor([ids])).logits[0].float()
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def ids() -> list[int]:
    """More tokens than the windows of the models are wide."""
    found: list[int] = torch.randint(3, 128, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    return found


@pytest.mark.parametrize("name", ALIKE)
def test_float_model_writes_the_same_text(name: str, ids: list[int], tmp_path: Path) -> None:
    quantcore.save(quantcore.load(float_folder(name, tmp_path / "float")), tmp_path / "model.gguf")
    written, theirs = continued(tmp_path / "model.gguf", ids, NEW)
    ours = our_logits(tmp_path / "model.gguf", [*ids, *written[:-1]])
    assert difference(theirs, ours) < FLOAT
    assert ours[len(ids) - 1 :].argmax(1).tolist() == written


def test_long_text_takes_the_long_factors(tmp_path: Path) -> None:
    ids = torch.randint(3, 128, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    quantcore.save(quantcore.load(float_folder("phi3-long", tmp_path / "float")), tmp_path / "model.gguf")
    written, theirs = continued(tmp_path / "model.gguf", ids, 1, context=512)
    ours = our_logits(tmp_path / "model.gguf", ids)
    assert difference(theirs, ours) < FLOAT
    assert ours[-1].argmax().tolist() == written[0]


@pytest.mark.parametrize("name", ALIKE)
def test_quantized_model_has_our_logits(name: str, ids: list[int], tmp_path: Path) -> None:
    folder, file = float_folder(name, tmp_path / "float"), tmp_path / "model.gguf"
    quantcore.quantize_checkpoint(folder, file, {"quant_method": "gguf", "type": "Q8_0"})
    found, expected = continued(file, ids, 1)[1], our_logits(file, ids)
    apart = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert apart.median() < 0.1  # random models double every error, and a router may choose another expert


@pytest.mark.parametrize("name", sorted({*QUANTIZERS, *MADE}))
def test_bundled_model_writes_the_same_text(name: str, tmp_path: Path) -> None:
    quantcore.quantize_checkpoint(STDLIB, tmp_path / "model.gguf", {"quant_method": "gguf", "type": name})
    ids = load_tokenizer(STDLIB)(PROMPT)["input_ids"]
    written, theirs = continued(tmp_path / "model.gguf", ids, NEW)
    ours = our_logits(tmp_path / "model.gguf", [*ids, *written[:-1]])
    assert difference(theirs, ours) < ROUNDED
    best = ours[len(ids) - 1 :]
    assert (best.amax(1) - best.gather(1, torch.tensor(written)[:, None])[:, 0]).max() < TIE


@pytest.mark.parametrize("name", [name for name in MADE if name not in NEEDS_IMPORTANCE])
def test_mixes_are_those_of_llama_cpp_byte_for_byte(name: str, tmp_path: Path) -> None:
    quantcore.save(quantcore.load(STDLIB).float(), tmp_path / "float.gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = MIXES[name].number, 1
    files = [str(tmp_path / file).encode() for file in ("float.gguf", "theirs.gguf")]
    assert llama_cpp.llama_model_quantize(*files, ctypes.byref(settings)) == 0
    quantcore.quantize_checkpoint(STDLIB, tmp_path / "ours.gguf", {"quant_method": "gguf", "type": name})
    ours, theirs = (read_contents(tmp_path / f"{file}.gguf") for file in ("ours", "theirs"))
    assert {each: entry.kind.name for each, entry in ours.entries.items()} == {
        each: entry.kind.name for each, entry in theirs.entries.items()
    }
    expected = dict(read_tensors(theirs))
    assert [each for each, tensor in read_tensors(ours) if not torch.equal(tensor, expected[each])] == []
