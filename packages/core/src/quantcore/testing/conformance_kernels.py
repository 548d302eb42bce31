"""Theme kernels: each decoder in the skeletons, in Triton's interpreter and compiled for GPUs that need not be here."""

from __future__ import annotations

from quantcore.testing.decoders import Decoding, Faults, compile_faults


def test_decoder_gives_the_numbers_of_the_format(decoding: Decoding, decoder_check: str, interpreted: Faults) -> None:
    found = interpreted[decoding.example.backend.method][decoding.number]
    assert found.get(decoder_check) is None, found[decoder_check]


def test_skeletons_compile_with_the_decoder_and_spill_nothing(compiled_decoding: Decoding, gpu_target: str) -> None:
    assert compile_faults(compiled_decoding, gpu_target) == []
