"""What a server takes, by what a backend says of its method."""

from __future__ import annotations

import pytest

from quantcore.plugins.backend import Backend, Guide, Refusal
from quantcore.plugins.serving import check_served, refusals, renamed

READ = {"vllm": "tested", "sglang": "by its source"}


def backend(*refused: Refusal, method: str = "own") -> Backend:
    return Backend(method, "m:Config", "m:Quantizer", guide=Guide(served_by=READ, refused=refused))


def test_setting_that_a_server_refuses_is_named_with_one_that_works() -> None:
    own = backend(Refusal("vllm", {"sym": (False,)}, {"sym": True}))
    with pytest.raises(ValueError, match=r"^vllm does not take own with sym=False; use sym=True$"):
        check_served(own, {"sym": False}, "vllm")


@pytest.mark.parametrize(("server", "config"), [("sglang", {"sym": False}), ("vllm", {"sym": True}), ("vllm", {})])
def test_what_no_refusal_is_about_is_taken(server: str, config: dict[str, object]) -> None:
    check_served(backend(Refusal("vllm", {"sym": (False,)}, {"sym": True})), config, server)


def test_a_refusal_applies_where_all_of_its_settings_hold() -> None:
    guide = backend(Refusal("vllm", {"bits": (2, 3), "sym": (False,)}, {"bits": 4})).guide
    assert refusals(guide, {"bits": 3, "sym": False}, "vllm")
    assert not refusals(guide, {"bits": 3, "sym": True}, "vllm")


def test_what_stands_under_unless_lifts_a_refusal() -> None:
    guide = backend(Refusal("vllm", {"order": (True,)}, {"order": False}, unless={"group": (-1,)})).guide
    assert refusals(guide, {"order": True, "group": 64}, "vllm")
    assert refusals(guide, {"order": True}, "vllm")
    assert not refusals(guide, {"order": True, "group": -1}, "vllm")


def test_no_values_stand_for_any_value_that_is_given() -> None:
    guide = backend(Refusal("vllm", {"mode": ()}, {"mode": None})).guide
    assert refusals(guide, {"mode": "fast"}, "vllm")
    assert not refusals(guide, {}, "vllm")


def test_a_name_with_dots_leads_into_every_dict() -> None:
    guide = backend(Refusal("vllm", {"groups.*.weights.order": ("group",)}, {"order": "weight"})).guide
    assert refusals(guide, {"groups": {"a": {"weights": None}, "b": {"weights": {"order": "group"}}}}, "vllm")
    assert not refusals(guide, {"groups": {"a": {"weights": {"order": "weight"}}}}, "vllm")


def test_one_is_not_true() -> None:
    assert not refusals(backend(Refusal("vllm", {"bits": (1,)}, {"bits": 4})).guide, {"bits": True}, "vllm")


def test_names_that_a_server_reads_are_set_and_numbers_are_not() -> None:
    guide = backend(
        Refusal("vllm", {"layout": ("a",)}, {"layout": "auto_a"}, renames=True),
        Refusal("vllm", {"sym": (False,)}, {"sym": True}),
    ).guide
    assert renamed(guide, {"layout": "a", "sym": False}, "vllm") == {"layout": "auto_a"}
    assert renamed(guide, {"layout": "a"}, "sglang") == {}


def test_server_that_does_not_read_a_method_is_told_with_those_that_it_reads() -> None:
    stranger = Backend("stranger", "m:Config", "m:Quantizer")
    with pytest.raises(ValueError, match=r"^vllm does not read what stranger writes; .*: own, second$"):
        check_served(stranger, {}, "vllm", [backend(method="second"), backend(), stranger])


def test_refusal_of_a_program_that_reads_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"served_by; got 'mlx'"):
        Guide(served_by=READ, refused=[Refusal("mlx", {"bits": (3,)}, {"bits": 4})])
