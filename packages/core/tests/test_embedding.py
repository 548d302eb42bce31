"""QuantizedEmbedding: the rows it gives, what it stores, and how a model with one is saved and loaded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_int8 import TinyInt8
from torch import Tensor, nn

import quantcore
from quantcore.checkpoints.read import Checkpoint
from quantcore.checkpoints.write import write_tensors
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedEmbedding
from quantcore.nn.embedding import view_embedding
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import replace_module
from quantcore.quantizers.weight import WeightQuantizer
from quantcore.testing.models import SmallModel, filled, token_ids
from quantcore.testing.subjects import normal

ROWS, WIDTH = 13, 24
IDS = torch.tensor([[0, 12, 5], [5, 1, 0]])


class CountingInt8(TinyInt8):
    """Notes how many rows were dequantized."""

    rows_apart = True
    seen: list[int] = []  # noqa: RUF012 - shared on purpose

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        self.seen.append(len(tensors["weight"]))
        return super().dequantize(tensors, shape, dtype)


def embedding(dtype: torch.dtype = torch.float32, padding_idx: int | None = None) -> nn.Embedding:
    module = nn.Embedding(ROWS, WIDTH, padding_idx, dtype=dtype)
    module.weight.data = normal((ROWS, WIDTH)).to(dtype)
    return module


def layer(dtype: torch.dtype = torch.float32) -> QuantizedEmbedding:
    return QuantizedEmbedding.from_embedding(embedding(dtype), TinyInt8())


@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS[0, 0], IDS[:0], IDS.int()], ids=["2d", "1d", "0d", "empty", "int32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_those_of_the_dequantized_weight(ids: Tensor, dtype: torch.dtype) -> None:
    quantized = layer(dtype)
    found = quantized(ids)
    assert found.dtype == dtype
    assert torch.equal(found, quantized.dequantize(dtype)[ids.long()])


def test_only_the_rows_asked_for_are_dequantized() -> None:
    quantized = QuantizedEmbedding.from_embedding(embedding(), CountingInt8())
    CountingInt8.seen.clear()
    found = quantized(IDS)
    assert CountingInt8.seen == [IDS.numel()]
    assert torch.equal(found, quantized.dequantize()[IDS])


def test_padding_row_is_kept(tmp_path: Path) -> None:
    source = embedding(padding_idx=3)
    with torch.no_grad():
        source.weight[3] = 0
    quantized = QuantizedEmbedding.from_embedding(source, TinyInt8())
    assert quantized.padding_idx == 3
    assert torch.equal(quantized(torch.tensor(3)), torch.zeros(WIDTH))
    assert quantized.to_dense().padding_idx == 3


@pytest.mark.parametrize("ids", [[ROWS], [-1]], ids=["above", "negative"])
def test_row_that_does_not_exist_is_an_index_error(ids: list[int]) -> None:
    with pytest.raises(IndexError):
        layer()(torch.tensor(ids))


def test_float_ids_are_refused() -> None:
    with pytest.raises(TypeError, match="expected integer ids, got float32"):
        layer()(torch.zeros(2))


def test_state_dict_has_the_suffixes_of_the_format() -> None:
    assert {name: tensor.dtype for name, tensor in layer().state_dict().items()} == {
        "weight": torch.int8,
        "weight.scale": torch.float32,
    }


def test_state_dict_loads_into_another() -> None:
    source, target = embedding(), embedding()
    target.weight.data.neg_()
    quantized = QuantizedEmbedding.from_embedding(target, TinyInt8())
    quantized.load_state_dict(QuantizedEmbedding.from_embedding(source, TinyInt8()).state_dict())
    assert torch.equal(quantized(IDS), layer()(IDS))


def test_embedding_of_stored_tensors_is_equal() -> None:
    expected = layer()
    again = QuantizedEmbedding.from_tensors(
        TinyInt8(), expected.state_dict(), num_embeddings=ROWS, embedding_dim=WIDTH, padding_idx=2
    )
    assert torch.equal(again(IDS), expected(IDS))
    assert again.padding_idx == 2


def test_misfitting_tensors_are_all_named() -> None:
    with pytest.raises(CheckpointError, match=r"tokens: .*weight\.scale: missing.*weight: expected int8 \[13, 24\]"):
        QuantizedEmbedding.from_tensors(
            TinyInt8(), {"weight": torch.zeros(3, 2)}, num_embeddings=ROWS, embedding_dim=WIDTH, name="tokens"
        )


def test_cast_changes_what_it_gives_and_not_what_it_stores() -> None:
    quantized = layer()
    before = copy.deepcopy(quantized.state_dict())
    assert quantized.to(torch.bfloat16)(IDS).dtype == torch.bfloat16
    assert quantized.to("cpu")(IDS).dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantized.state_dict().items())


def test_copies_and_pickles_give_the_same_rows() -> None:
    quantized = layer(torch.bfloat16)
    again = pickle.loads(pickle.dumps(quantized))  # noqa: S301 - bytes of this test
    assert torch.equal(copy.deepcopy(quantized)(IDS), quantized(IDS))
    assert torch.equal(again(IDS), quantized(IDS))


def test_float_embedding_again_has_the_dequantized_weight() -> None:
    dense = layer(torch.bfloat16).to_dense()
    assert type(dense) is nn.Embedding
    assert dense.weight.dtype == torch.bfloat16
    assert torch.equal(dense(IDS), layer(torch.bfloat16)(IDS))
    assert layer().to_dense(torch.float16).weight.dtype == torch.float16


def test_compiled_embedding_gives_the_same_rows() -> None:
    quantized = layer()
    torch._dynamo.reset()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS), quantized(IDS))


def test_embedding_op_passes_opcheck() -> None:
    quantized = layer()
    arguments = (IDS, quantized.operands, repr(quantized.format), list(quantized.shape), torch.bfloat16)
    torch.library.opcheck(torch.ops.quantcore.embedding.default, arguments)


@pytest.mark.parametrize(
    "module", [nn.Linear(2, 3), nn.Embedding(2, 3, max_norm=1.0), type("Scaled", (nn.Embedding,), {})(2, 3)], ids=str
)
def test_module_of_another_kind_is_refused(module: nn.Module) -> None:
    assert view_embedding(module) is None
    with pytest.raises(TypeError, match=r"tokens: expected nn\.Embedding"):
        QuantizedEmbedding.from_embedding(module, TinyInt8(), name="tokens")


def test_weight_with_nan_is_refused_by_name() -> None:
    source = embedding()
    with torch.no_grad():
        source.weight[4, 1] = torch.nan
    with pytest.raises(ValueError, match=r"tokens: weight holds NaN or inf, first in row 4"):
        QuantizedEmbedding.from_embedding(source, TinyInt8(), name="tokens")


def test_shape_that_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="tokens: in_features 24 is not a multiple of 7"):
        QuantizedEmbedding.from_embedding(embedding(), TinyInt8(multiple=7), name="tokens")


def test_config_that_says_nothing_of_embeddings_gives_the_format_of_a_linear_layer(tiny: None) -> None:
    quantized = QuantizedEmbedding.from_embedding(embedding(), {"quant_method": "tiny-int8"})
    assert quantized.format == TinyInt8()


# In a model


def untied_model(dtype: torch.dtype = torch.float32) -> SmallModel:
    model = SmallModel(64, dtype)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return filled(model)


@pytest.fixture
def with_embeddings(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method tiny-int8, asked for embeddings too."""
    monkeypatch.setattr(WeightQuantizer, "embedding_format_for", lambda *args: TinyInt8())


def test_embeddings_stay_float_unless_asked_for(tiny: None) -> None:
    model = quantcore.quantize(untied_model(), "tiny-int8")
    assert type(model.model.embed_tokens) is nn.Embedding


def test_embedding_that_is_asked_for_is_quantized(with_embeddings: None) -> None:
    model = quantcore.quantize(untied_model(), "tiny-int8")
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    torch.testing.assert_close(model(token_ids()), untied_model()(token_ids()), atol=0.1, rtol=0.1)


def test_tied_embedding_stays_float_with_its_head(with_embeddings: None) -> None:
    model = quantcore.quantize(filled(SmallModel(64)), "tiny-int8")
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture
def tied(with_embeddings: None) -> SmallModel:
    """A quantized model whose head shares the weight of its embedding; nothing is skipped."""
    return quantcore.quantize(filled(SmallModel(64)), {"quant_method": "tiny-int8", "modules_to_not_convert": []})


def test_tied_head_is_quantized_with_its_embedding(tied: SmallModel) -> None:
    head, tokens = tied.lm_head, tied.model.embed_tokens
    assert isinstance(head, QuantizedLinear)
    assert all(tensor is tokens.stored[suffix] for suffix, tensor in head.stored.items())
    torch.testing.assert_close(tied(token_ids()), filled(SmallModel(64))(token_ids()), atol=0.1, rtol=0.1)


def test_tied_head_is_stored_once_and_loads_tied(tied: SmallModel, tmp_path: Path) -> None:
    quantcore.save(tied, tmp_path / "saved")
    names = set(Checkpoint(tmp_path / "saved").headers)
    assert {name for name in names if name.startswith("lm_head")} == set()
    loaded = quantcore.load(tmp_path / "saved", lambda: SmallModel(64))
    assert torch.equal(loaded(token_ids()), tied(token_ids()))
    tensors = loaded.model.embed_tokens.stored
    assert all(tensor is tensors[suffix] for suffix, tensor in loaded.lm_head.stored.items())


def test_tied_head_stays_tied_when_moved_copied_and_dequantized(tied: SmallModel) -> None:
    expected = tied(token_ids())
    copied = copy.deepcopy(tied).to("cpu")
    assert all(tensor is copied.lm_head.stored[name] for name, tensor in copied.model.embed_tokens.stored.items())
    dense = quantcore.dequantize(copied)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    torch.testing.assert_close(dense(token_ids()), expected)


def test_tied_head_is_quantized_from_file_to_file(with_embeddings: None, tmp_path: Path) -> None:
    quantcore.save(filled(SmallModel(64)), tmp_path / "float")
    (tmp_path / "float" / "config.json").write_text('{"model_type": "small"}')
    config = {"quant_method": "tiny-int8", "modules_to_not_convert": []}
    factory = lambda: SmallModel(64)  # noqa: E731
    quantcore.quantize_checkpoint(tmp_path / "float", tmp_path / "q", config, model=factory)
    expected = quantcore.quantize(filled(SmallModel(64)), config)
    assert torch.equal(quantcore.load(tmp_path / "q", factory)(token_ids()), expected(token_ids()))


def test_embedding_stays_float_with_a_head_that_is_skipped(with_embeddings: None) -> None:
    config = {"quant_method": "tiny-int8", "modules_to_not_convert": ["lm_head"]}
    model = quantcore.quantize(filled(SmallModel(64)), config)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_skip_pattern_leaves_an_embedding_float(with_embeddings: None) -> None:
    config = {"quant_method": "tiny-int8", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    model = quantcore.quantize(untied_model(), config)
    assert type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_embedding_loads_whatever_the_config_says(tiny: None, tmp_path: Path, dtype: torch.dtype) -> None:
    model = quantcore.quantize(untied_model(dtype), "tiny-int8")
    replace_module(model, "model.embed_tokens", QuantizedEmbedding.from_embedding(model.model.embed_tokens, TinyInt8()))
    quantcore.save(model, tmp_path / "q")
    loaded = quantcore.load(tmp_path / "q", untied_model)
    assert isinstance(loaded.model.embed_tokens, QuantizedEmbedding)
    assert torch.equal(loaded(token_ids()), model(token_ids()))


def test_loading_with_a_dtype_casts_what_the_embedding_gives(with_embeddings: None, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(untied_model(), "tiny-int8"), tmp_path / "q")
    loaded = quantcore.load(tmp_path / "q", untied_model, dtype=torch.bfloat16)
    assert loaded.model.embed_tokens(token_ids()).dtype == torch.bfloat16
    assert loaded(token_ids()).dtype == torch.bfloat16


def test_dequantized_model_has_a_float_embedding(with_embeddings: None) -> None:
    model = quantcore.quantize(untied_model(), "tiny-int8")
    expected = model(token_ids())
    dense = quantcore.dequantize(model)
    assert type(dense.model.embed_tokens) is nn.Embedding
    torch.testing.assert_close(dense(token_ids()), expected)


def test_damaged_embedding_is_named(with_embeddings: None, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(untied_model(), "tiny-int8"), tmp_path / "q")
    tensors = dict(Checkpoint(tmp_path / "q").stream())
    del tensors["model.embed_tokens.weight.scale"]
    write_tensors(tensors, tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens: .*weight\.scale: missing"):
        quantcore.load(tmp_path / "q", untied_model)
