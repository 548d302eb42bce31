"""How methods are found: lazily, one failure apart from the rest, each kind of failure with its own error."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantcore
from quantcore import distribution
from quantcore.distribution import DISTRIBUTION
from quantcore.errors import (
    BackendBrokenError,
    BackendConflictError,
    BackendNotInstalledError,
    BackendVersionError,
    UnknownMethodError,
)
from quantcore.kernels import dispatch
from quantcore.kernels.kernel import Problem
from quantcore.plugins import Backend, hookimpl, manager
from quantcore.plugins.known import KNOWN_METHODS, KnownMethod
from quantcore.plugins.manager import plugins
from quantcore.quantizers.auto import AutoQuantizationConfig, config_class, unregister

KERNEL_SOURCE = """
    from quantcore.kernels.kernel import Kernel
    from quantcore.kernels import reference
    from quantcore.plugins import hookimpl

    @hookimpl
    def quantcore_kernels():
        linear, linear_input_grad = reference.linear, reference.linear_input_grad
        return [Kernel("made_up", "cpu", lambda problem: None, linear, linear_input_grad, priority=5)]
"""


def disable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Add a name to those that are disabled, and look anew."""
    monkeypatch.setenv("QUANTCORE_DISABLE_PLUGINS", name, prepend=",")
    manager.reset()


def name_plugins(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    monkeypatch.setenv("QUANTCORE_PLUGINS", ",".join(modules))
    manager.reset()


def installed() -> dict[str, tuple[str, ...]]:
    return {info.method: info.distributions for info in quantcore.methods() if info.installed}


def problem() -> Problem:
    from tiny_int8 import TinyInt8

    return Problem("linear", TinyInt8(), "cpu", torch.float32, 1, 2, 3)


# Discovery


def test_methods_lists_an_installed_distribution(site: Any, plugin: Callable[..., str]) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")}, version="2.5")
    assert installed() == {"rows": ("made-up 2.5",)}


def test_methods_imports_no_plugin(site: Any, plugin: Callable[..., str]) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")})
    quantcore.methods()
    assert "made_up_rows" not in sys.modules


def test_asking_for_a_method_imports_only_its_plugin(site: Any, plugin: Callable[..., str]) -> None:
    site.install("one", {"one": "made_up_one"}, {"made_up_one": plugin("one")})
    site.install("two", {"two": "made_up_two"}, {"made_up_two": plugin("two")})
    plugins().backend("one")
    assert "made_up_one" in sys.modules
    assert "made_up_two" not in sys.modules


def test_methods_lists_every_known_method() -> None:
    listed = {info.method for info in quantcore.methods()}
    assert listed >= {member.value for member in quantcore.QuantizationMethod}


def test_methods_is_sorted_by_name() -> None:
    listed = [info.method for info in quantcore.methods()]
    assert listed == sorted(listed)


def test_known_method_that_is_absent_carries_its_extra() -> None:
    extras = {info.method: info.extra for info in quantcore.methods()}
    assert (extras["gptq"], extras["bitsandbytes"], extras["sinq"]) == ("gptq", "bnb", "hqq")


@pytest.mark.parametrize(
    ("published", "line"), [(True, "pip install 'quantcore-hub[gptq]'"), (False, "pip install ./packages/backend-gptq")]
)
def test_absent_method_says_how_to_install_it(monkeypatch: Any, published: bool, line: str) -> None:
    monkeypatch.setattr(distribution, "PUBLISHED", published)
    with pytest.raises(BackendNotInstalledError, match=rf"'gptq' is known but not installed; {re.escape(line)}"):
        plugins().backend("gptq")


def test_method_that_no_backend_has_gets_no_line_to_install_it(monkeypatch: Any) -> None:
    monkeypatch.setitem(KNOWN_METHODS, "vptq", KnownMethod("misc", "vector codebooks", is_available=False))
    with pytest.raises(BackendNotInstalledError, match="'vptq' is known but not available yet") as caught:
        plugins().backend("vptq")
    assert "pip" not in str(caught.value)


def test_no_hint_names_the_package_of_a_stranger() -> None:
    """`quantcore` on the index is another project."""
    lines = [distribution.install_line(extra) for extra in (*distribution.BACKENDS, "transformers")]
    assert not [line for line in lines if "'quantcore[" in line or line.endswith(" quantcore")]


def test_one_distribution_may_serve_two_methods_from_one_module(site: Any, plugin: Callable[..., str]) -> None:
    site.install("pair", {"left": "made_up_pair", "right": "made_up_pair"}, {"made_up_pair": plugin("left", "right")})
    assert [plugins().backend(name).method for name in ("left", "right")] == ["left", "right"]


def test_same_distribution_seen_twice_is_no_conflict(site: Any, plugin: Callable[..., str]) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")})
    site.install("Made_Up", {"rows": "made_up_rows"}, version="1.0+build")
    assert plugins().backend("rows").method == "rows"


def test_leftover_metadata_hides_no_other_method(site: Any, plugin: Callable[..., str]) -> None:
    site.install("gone", {"gone": "made_up_gone"})
    (site.folder / "gone-1.0.dist-info" / "METADATA").unlink()
    site.install("good", {"good": "made_up_good"}, {"made_up_good": plugin("good")})
    assert plugins().backend("good").method == "good"


def test_malformed_entry_point_hides_no_other_method(site: Any, plugin: Callable[..., str]) -> None:
    site.install("bad", {"bad": "not a module !!"})
    site.install("good", {"good": "made_up_good"}, {"made_up_good": plugin("good")})
    assert plugins().backend("good").method == "good"


def test_reset_sees_what_was_installed_meanwhile(site: Any, plugin: Callable[..., str]) -> None:
    assert installed() == {}
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")})
    assert list(installed()) == ["rows"]


# Absent and unknown


def test_known_method_without_backend_names_the_pip_line() -> None:
    with pytest.raises(
        BackendNotInstalledError, match=r"'gptq' is known but not installed; pip install ./packages/backend-gptq"
    ):
        plugins().backend("gptq")


def test_known_method_that_an_installed_backend_lacks_says_so(site: Any, plugin: Callable[..., str]) -> None:
    site.install("made-up", {"awq": "made_up"}, {"made_up": plugin("awq")}, version="2.5")
    with pytest.raises(BackendNotInstalledError, match=r"not in made-up 2\.5; upgrade made-up\. Installed"):
        plugins().backend("gptq")


def test_disabled_method_is_not_said_to_be_lacking(
    site: Any, plugin: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("made-up", {"awq": "made_up", "gptq": "made_up"}, {"made_up": plugin("awq")})
    monkeypatch.setenv("QUANTCORE_DISABLE_PLUGINS", "gptq")
    with pytest.raises(
        BackendNotInstalledError, match=r"pip install ./packages/backend-gptq in a checkout of quantcore. Installed"
    ):
        plugins().backend("gptq")


def test_absent_backend_error_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="Installed: none"):
        plugins().backend("awq")


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UnknownMethodError, match="'bitsandbites' is unknown; did you mean 'bitsandbytes'"):
        plugins().backend("bitsandbites")


def test_unknown_method_without_a_near_one_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'zzzz' is unknown\. Known: .*gptq.*hqq"):
        plugins().backend("zzzz")


def test_unknown_method_near_an_installed_one_names_it(site: Any, plugin: Callable[..., str]) -> None:
    site.install("made-up", {"rowwise": "made_up_rows"}, {"made_up_rows": plugin("rowwise")})
    with pytest.raises(UnknownMethodError, match="did you mean 'rowwise'"):
        plugins().backend("rowwize")


# Too old


@pytest.mark.parametrize(("api", "old"), [(0, "made-up"), (99, DISTRIBUTION)], ids=["plugin", "core"])
def test_other_interface_version_names_who_is_too_old(
    site: Any, plugin: Callable[..., str], api: int, old: str
) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows", api=api)})
    with pytest.raises(BackendVersionError, match=f"{old} is too old: upgrade {old}"):
        plugins().backend("rows")


def test_requirement_on_a_newer_core_is_a_version_error(site: Any, plugin: Callable[..., str]) -> None:
    site.install(
        "made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")}, requires=(f"{DISTRIBUTION}>=99",)
    )
    with pytest.raises(BackendVersionError, match=rf"made-up 1.0 needs {DISTRIBUTION}>=99"):
        plugins().backend("rows")


def test_plugin_that_needs_a_newer_core_is_not_imported(site: Any, plugin: Callable[..., str]) -> None:
    site.install(
        "made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")}, requires=(f"{DISTRIBUTION}>=99",)
    )
    with pytest.raises(BackendVersionError):
        plugins().backend("rows")
    assert "rows" not in sys.modules


@pytest.mark.parametrize(
    "line", [f"{DISTRIBUTION}>=0.0.1", f"{DISTRIBUTION}>=99; extra == 'dev'", "numpy>=99", f"{DISTRIBUTION}[all]"]
)
def test_requirements_that_hold_or_do_not_apply_are_no_error(site: Any, plugin: Callable[..., str], line: str) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")}, requires=(line,))
    assert plugins().backend("rows").method == "rows"


def test_unreadable_requirement_is_a_broken_backend(site: Any, plugin: Callable[..., str]) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")}, requires=("quantcore ==== 1",))
    with pytest.raises(BackendBrokenError, match=r"(?s)made-up 1.0.*quantcore ==== 1"):
        plugins().backend("rows")


# Broken

BROKEN = {
    "raises": ("raise RuntimeError('no such device')", "RuntimeError: no such device"),
    "imports-what-is-absent": ("import a_package_nobody_has", "No module named 'a_package_nobody_has'"),
    "is-no-python": ("def (", "SyntaxError"),
    "exits": ("import sys; sys.exit(3)", "SystemExit"),
    "unknown-hook": (
        "from quantcore.plugins import hookimpl\n@hookimpl\ndef quantcore_backend(): return []",
        "quantcore_backend",
    ),
    "wrong-argument": (
        "from quantcore.plugins import hookimpl\n@hookimpl\ndef quantcore_backends(model): return []",
        "quantcore_backends",
    ),
    "gives-no-iterable": (
        "from quantcore.plugins import hookimpl\n@hookimpl\ndef quantcore_backends(): return 7",
        "must give an iterable of Backend, got int",
    ),
    "gives-strings": (
        "from quantcore.plugins import hookimpl\n@hookimpl\ndef quantcore_backends(): return ['rows']",
        "must give Backend objects, got str",
    ),
    "hook-raises": (
        "from quantcore.plugins import hookimpl\n@hookimpl\ndef quantcore_backends(): raise KeyError('lost')",
        "KeyError: 'lost'",
    ),
    "wrong-field": (
        "from quantcore.plugins import Backend, hookimpl\n"
        "@hookimpl\ndef quantcore_backends(): return [Backend('rows', 'rows:Config', 'rows:Quantizer', default=7)]",
        "Backend('rows').default must be Mapping, got int: 7",
    ),
    "no-hook": ("", "no backend"),
}


@pytest.mark.parametrize(("source", "cause"), BROKEN.values(), ids=BROKEN)
def test_broken_plugin_names_distribution_and_cause(site: Any, source: str, cause: str) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": source}, version="3.1")
    with pytest.raises(BackendBrokenError) as caught:
        plugins().backend("rows")
    assert "made-up 3.1" in str(caught.value)
    assert cause in str(caught.value)


def test_missing_module_is_a_broken_backend(site: Any) -> None:
    site.install("made-up", {"rows": "made_up_nowhere"})
    with pytest.raises(BackendBrokenError, match=r"made-up 1.0 is installed but broken.*made_up_nowhere"):
        plugins().backend("rows")


def test_plugin_that_provides_another_method_is_broken(site: Any, plugin: Callable[..., str]) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("columns")})
    with pytest.raises(
        BackendBrokenError, match="claims method 'rows', but its module 'made_up_rows' provides columns"
    ):
        plugins().backend("rows")


@pytest.mark.parametrize("source", [source for source, _ in BROKEN.values()], ids=BROKEN)
def test_broken_plugin_leaves_other_methods_alone(site: Any, plugin: Callable[..., str], source: str) -> None:
    site.install("bad", {"bad": "made_up_bad"}, {"made_up_bad": source})
    site.install("good", {"good": "made_up_good"}, {"made_up_good": plugin("good")})
    with pytest.raises(BackendBrokenError):
        plugins().backend("bad")
    assert plugins().backend("good").method == "good"


def test_failure_is_kept_and_raised_again(site: Any) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": "raise RuntimeError('once')"})
    with pytest.raises(BackendBrokenError) as first:
        plugins().backend("rows")
    with pytest.raises(BackendBrokenError) as second:
        plugins().backend("rows")
    assert second.value is first.value is plugins().failures["rows"]


def test_cause_of_a_broken_plugin_is_chained(site: Any) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": "raise RuntimeError('deep')"})
    with pytest.raises(BackendBrokenError) as caught:
        plugins().backend("rows")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "target",
    ["made_up_absent:Config", "tiny_int8:Absent", "tiny_int8", "tiny_int8:torch"],
    ids=["module", "name", "form", "kind"],
)
def test_class_that_cannot_be_resolved_is_a_broken_backend(site: Any, target: str) -> None:
    source = f"""
        from quantcore.plugins import Backend, hookimpl

        @hookimpl
        def quantcore_backends():
            return [Backend("rows", {target!r}, {target!r})]
    """
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": source})
    with pytest.raises(BackendBrokenError, match=r"made-up 1.0"):
        config_class("rows")


def test_config_module_that_raises_is_a_broken_backend(site: Any) -> None:
    source = """
        from quantcore.plugins import Backend, hookimpl

        @hookimpl
        def quantcore_backends():
            return [Backend("rows", "made_up_config:Config", "made_up_config:Quantizer")]
    """
    modules = {"made_up_rows": source, "made_up_config": "raise RuntimeError('no such library')"}
    site.install("made-up", {"rows": "made_up_rows"}, modules)
    with pytest.raises(BackendBrokenError, match=r"made-up 1.0.*no such library"):
        AutoQuantizationConfig.from_dict({"quant_method": "rows"})


# Claimed twice


def install_rivals(site: Any, plugin: Callable[..., str]) -> None:
    site.install("first-owner", {"rows": "made_up_first"}, {"made_up_first": plugin("rows")})
    site.install("second-owner", {"rows": "made_up_second"}, {"made_up_second": plugin("rows")}, version="2.0")


def test_method_claimed_twice_names_both_owners(site: Any, plugin: Callable[..., str]) -> None:
    install_rivals(site, plugin)
    with pytest.raises(BackendConflictError) as caught:
        plugins().backend("rows")
    assert "first-owner 1.0" in str(caught.value)
    assert "second-owner 2.0" in str(caught.value)
    assert "QUANTCORE_DISABLE_PLUGINS" in str(caught.value)


@pytest.mark.parametrize("name", ["first-owner", "made_up_first"], ids=["distribution", "module"])
def test_disabling_one_owner_resolves_the_conflict(
    site: Any, plugin: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    install_rivals(site, plugin)
    disable(monkeypatch, name)
    plugins().backend("rows")
    assert "made_up_second" in sys.modules


def test_disabled_method_counts_as_absent(
    site: Any, plugin: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("made-up", {"hqq": "made_up_rows"}, {"made_up_rows": plugin("hqq")})
    disable(monkeypatch, "made-up")
    with pytest.raises(BackendNotInstalledError):
        plugins().backend("hqq")


def test_conflict_is_listed_with_both_owners(site: Any, plugin: Callable[..., str]) -> None:
    install_rivals(site, plugin)
    assert installed() == {"rows": ("first-owner 1.0", "second-owner 2.0")}


# Plugins named by the environment


def test_named_plugin_serves_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    name_plugins(monkeypatch, "tiny_int8")
    assert config_class("tiny-int8").__name__ == "TinyInt8Config"


def test_named_plugin_is_listed_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    name_plugins(monkeypatch, "tiny_int8")
    assert installed() == {"tiny-int8": ("tiny_int8 (QUANTCORE_PLUGINS)",)}


def test_named_plugin_that_fails_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name_plugins(monkeypatch, "a_module_nobody_has", " tiny_int8 ", "")
    assert plugins().backend("tiny-int8").method == "tiny-int8"
    assert "a_module_nobody_has" in caplog.text


@pytest.mark.parametrize("module", ["a_module_nobody_has", "a_package_nobody_has.plugin"])
def test_named_plugin_that_is_nowhere_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    name_plugins(monkeypatch, module)
    assert str(plugins().failures[module]).startswith(f"no module {module!r}, which QUANTCORE_PLUGINS names; check")


def test_named_plugin_that_imports_what_is_absent_is_said_to_fail_and_where(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("unused", {}, {"made_up_importer": "import sys\nimport a_module_nobody_has"})
    name_plugins(monkeypatch, "made_up_importer")
    said = str(plugins().failures["made_up_importer"])
    assert "which QUANTCORE_PLUGINS names, fails: ModuleNotFoundError: No module named 'a_module_nobody_has'" in said
    assert "made_up_importer.py, line 2)" in said  # for who is writing it
    assert said.endswith("mend it, or take it out of QUANTCORE_PLUGINS")


def test_named_plugin_that_fails_is_named_to_who_misses_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    name_plugins(monkeypatch, "a_module_nobody_has")
    with pytest.raises(BackendNotInstalledError, match="plugin a_module_nobody_has failed"):
        plugins().backend("gptq")


def test_method_of_two_named_plugins_is_a_conflict(
    site: Any, plugin: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("unused", {}, {"made_up_first": plugin("rows"), "made_up_second": plugin("rows")})
    name_plugins(monkeypatch, "made_up_first", "made_up_second")
    with pytest.raises(BackendConflictError, match=r"made_up_first.* and made_up_second"):
        plugins().backend("rows")


def test_naming_an_installed_plugin_is_no_conflict(
    site: Any, plugin: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")})
    name_plugins(monkeypatch, "made_up_rows")
    assert plugins().backend("rows").method == "rows"


# Groups of their own


def test_match_group_recognises_a_dict_without_method(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
        from quantcore.plugins import hookimpl

        @hookimpl
        def quantcore_match_config(config_dict):
            return "tiny-int8" if "tiny" in config_dict else None
    """
    site.install("matcher", {"tiny": "made_up_matcher"}, {"made_up_matcher": source}, group="quantcore.match")
    name_plugins(monkeypatch, "tiny_int8")
    assert AutoQuantizationConfig.from_dict({"tiny": True}).quant_method == "tiny-int8"


def test_dict_that_no_plugin_recognises_asks_for_a_method() -> None:
    with pytest.raises(ValueError, match="has no quant_method; add one"):
        AutoQuantizationConfig.from_dict({"bits": 4})


def test_match_plugin_that_raises_is_kept_apart(site: Any) -> None:
    source = """
        from quantcore.plugins import hookimpl

        @hookimpl
        def quantcore_match_config(config_dict):
            raise RuntimeError("cannot look")
    """
    site.install("matcher", {"tiny": "made_up_matcher"}, {"made_up_matcher": source}, group="quantcore.match")
    with pytest.raises(ValueError, match="has no quant_method"):
        AutoQuantizationConfig.from_dict({"bits": 4})
    failure = plugins().failures["made_up_matcher:quantcore_match_config"]
    assert "matcher 1.0 is installed but broken: RuntimeError: cannot look" in str(failure)


def test_kernel_group_adds_a_kernel(site: Any) -> None:
    site.install("kernels", {"fast": "made_up_kernels"}, {"made_up_kernels": KERNEL_SOURCE}, group="quantcore.kernels")
    assert dispatch.choose(problem()).kernel.name == "made_up"


def test_kernels_are_forgotten_with_the_plugins(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("kernels", {"fast": "made_up_kernels"}, {"made_up_kernels": KERNEL_SOURCE}, group="quantcore.kernels")
    dispatch.choose(problem())
    disable(monkeypatch, "kernels")
    assert dispatch.choose(problem()).kernel.name == "reference"


@pytest.mark.parametrize(
    ("body", "cause"),
    [("raise OSError('no driver')", "no driver"), ("return 7", "int"), ("return ['fast']", "str")],
    ids=["raises", "no-iterable", "strings"],
)
def test_kernel_plugin_that_fails_leaves_the_reference(site: Any, body: str, cause: str) -> None:
    source = f"from quantcore.plugins import hookimpl\n@hookimpl\ndef quantcore_kernels(): {body}"
    site.install("kernels", {"fast": "made_up_kernels"}, {"made_up_kernels": source}, group="quantcore.kernels")
    assert dispatch.choose(problem()).kernel.name == "reference"
    failure = plugins().failures["made_up_kernels:quantcore_kernels"]
    assert "kernels 1.0" in str(failure)
    assert cause in str(failure)


def test_backend_kernels_that_fail_leave_other_methods_alone(site: Any) -> None:
    source = """
        from quantcore.plugins import Backend, hookimpl

        @hookimpl
        def quantcore_backends():
            classes = "tiny_int8:TinyInt8Config", "tiny_int8:TinyInt8Quantizer"
            return [Backend("rows", *classes, kernels=("made_up_rows:absent",))]
    """
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": source})
    plugins().backend("rows")
    assert dispatch.choose(problem()).kernel.name == "reference"
    assert "made_up_rows" in str(plugins().failures["made_up_rows:absent"])


def test_format_brings_the_kernels_of_its_package(site: Any) -> None:
    """As in a process that was handed a pickled layer, and asked for no method."""
    source = (
        KERNEL_SOURCE.replace("@hookimpl\n    def quantcore_kernels", "def kernels")
        + """
    from quantcore.plugins import Backend
    from tiny_int8 import TinyInt8

    class Rows(TinyInt8):
        pass

    @hookimpl
    def quantcore_backends():
        return [Backend("rows", "nowhere:Config", "nowhere:Quantizer", kernels=("made_up_rows:kernels",))]
"""
    )
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": source})
    site.install("other", {"other": "made_up_other"}, {"made_up_other": "raise RuntimeError('not asked for')"})
    rows = importlib.import_module("made_up_rows").Rows()
    assert dispatch.choose(problem()._replace(weight_format=rows)).kernel.name == "made_up"
    assert plugins().failures == {}


def test_package_of_a_format_that_fails_leaves_the_reference(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    site.install("made-up", {"rows": "tiny_int8"})
    assert [dispatch.choose(problem()).kernel.name for _ in range(2)] == ["reference"] * 2
    assert [record.getMessage() for record in caplog.records] == [str(plugins().failures["rows"])]
    assert "claims method 'rows'" in caplog.text


# Life-cycle observers


class Observer:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    @hookimpl
    def quantcore_before_weight_loading(self, quantizer: Any, model: Any) -> None:
        self.calls.append(("before", quantizer, model, model.norm.weight.device.type))

    @hookimpl
    def quantcore_after_weight_loading(self, quantizer: Any, model: Any) -> None:
        self.calls.append(("after", quantizer, model, model.norm.weight.device.type))

    @hookimpl
    def quantcore_weight_quantized(self, name: str, before: Any, after: Any) -> None:
        self.calls.append((name, before, after))


@pytest.fixture
def observer() -> Observer:
    watching = Observer()
    plugins().register(watching)
    return watching


def test_observer_sees_each_quantized_weight(tiny: None, build_model: Callable[[], Any], observer: Observer) -> None:
    model = build_model()
    weights = {"first": model.first.weight.detach().clone(), "second": model.second.weight.detach().clone()}
    quantcore.quantize(model, "tiny-int8")
    assert [name for name, _, _ in observer.calls] == ["first", "second"]
    for name, before, after in observer.calls:
        assert torch.equal(before, weights[name])
        assert torch.equal(after.dequantize(), model.get_submodule(name).dequantize())


def test_observer_is_called_around_a_load(
    tiny: None, build_model: Callable[[], Any], observer: Observer, tmp_path: Any
) -> None:
    quantcore.save(quantcore.quantize(build_model(), "tiny-int8"), tmp_path / "out")
    observer.calls.clear()
    model = quantcore.load(tmp_path / "out", build_model)
    quantizer = model.hf_quantizer
    assert observer.calls == [("before", quantizer, model, "meta"), ("after", quantizer, model, "cpu")]


RAISING = """
    from quantcore.plugins import Backend, hookimpl

    @hookimpl
    def quantcore_backends():
        return [Backend("made-up", "tiny_int8:TinyInt8Config", "tiny_int8:TinyInt8Quantizer")]

    @hookimpl
    def quantcore_weight_quantized(name):
        raise RuntimeError("of a weight")

    @hookimpl
    def quantcore_before_weight_loading(model):
        raise SystemExit("before")

    @hookimpl
    def quantcore_after_weight_loading(model):
        raise RuntimeError("after")
"""


def test_life_cycle_hooks_that_raise_leave_other_methods_alone(
    tiny: None, site: Any, build_model: Callable[[], Any], tmp_path: Path
) -> None:
    site.install("made-up", {"made-up": "made_up"}, {"made_up": RAISING})
    plugins().backend("made-up")
    observer = Observer()
    plugins().register(observer)
    quantcore.save(quantcore.quantize(build_model(), "tiny-int8"), tmp_path / "out")
    quantcore.load(tmp_path / "out", build_model)
    assert {call[0] for call in observer.calls} >= {"before", "after", "first"}
    kept = "\n".join(str(error) for error in plugins().failures.values())
    for cause in ("RuntimeError: of a weight", "SystemExit: before", "RuntimeError: after"):
        assert f"plugin module 'made_up' of made-up 1.0 is installed but broken: {cause}" in kept


def test_observer_of_this_program_that_raises_is_heard(tiny: None, build_model: Callable[[], Any]) -> None:
    class Raises:
        @hookimpl
        def quantcore_weight_quantized(self, name: str) -> None:
            raise RuntimeError("of this program")

    plugins().register(Raises())
    with pytest.raises(RuntimeError, match="of this program"):
        quantcore.quantize(build_model(), "tiny-int8")


@pytest.mark.parametrize(
    "field",
    [
        "method=None",
        "method=''",
        "config=3",
        "quantizer=int",
        "summary=None",
        "kernels='a:b'",
        "kernels=[3]",
        "kernels=7",
        "example_configs=3",
        "example_configs=['a']",
        "needs_calibration='no'",
        "solver=print",
        "upstream=1.5",
        "api='1'",
        "api=True",
    ],
)
def test_backend_with_a_field_of_another_type_is_broken_alone(
    site: Any, plugin: Callable[..., str], field: str
) -> None:
    source = f"""
        import dataclasses
        from quantcore.plugins import Backend, hookimpl

        @hookimpl
        def quantcore_backends():
            return [dataclasses.replace(Backend("made-up", "a:b", "a:b"), {field})]
    """
    site.install("made-up", {"made-up": "made_up"}, {"made_up": source})
    site.install("sound", {"sound": "sound"}, {"sound": plugin("sound")})
    with pytest.raises(
        BackendBrokenError, match=rf"made-up 1\.0 is installed but broken: \w+: .*{field.split('=')[0]}"
    ):
        plugins().backend("made-up")
    assert plugins().backend("sound").method == "sound"


def test_observer_is_silent_once_unregistered(tiny: None, build_model: Callable[[], Any], observer: Observer) -> None:
    plugins().unregister(observer)
    quantcore.quantize(build_model(), "tiny-int8")
    assert observer.calls == []


# Registration in a program


def test_registered_classes_serve_a_method(tiny: None) -> None:
    assert type(quantcore.AutoHfQuantizer.from_config("tiny-int8")).__name__ == "TinyInt8Quantizer"


@pytest.mark.parametrize("kind", ["quantizer", "quantization_config"])
def test_taken_name_is_a_value_error(tiny: None, kind: str) -> None:
    import tiny_int8

    cls = tiny_int8.TinyInt8Quantizer if kind == "quantizer" else tiny_int8.TinyInt8Config
    with pytest.raises(ValueError, match=f"'tiny-int8' is registered already, as {cls.__name__}; pass override=True"):
        getattr(quantcore, f"register_{kind}")("tiny-int8")(cls)


def test_name_of_an_installed_backend_is_taken(site: Any, plugin: Callable[..., str]) -> None:
    from tiny_int8 import TinyInt8Config

    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")})
    with pytest.raises(ValueError, match=r"'rows' is served by made-up 1.0; pass override=True"):
        quantcore.register_quantization_config("rows")(TinyInt8Config)


def test_override_replaces_a_registered_class(tiny: None) -> None:
    from tiny_int8 import TinyInt8Config

    class Other(TinyInt8Config):
        pass

    quantcore.register_quantization_config("tiny-int8", override=True)(Other)
    assert config_class("tiny-int8") is Other


@pytest.mark.parametrize("cls", [int, lambda: None, object()], ids=["class", "function", "object"])
@pytest.mark.parametrize("kind", ["quantizer", "quantization_config"])
def test_wrong_class_is_a_type_error(kind: str, cls: object) -> None:
    with pytest.raises(TypeError, match=r"'mine': expected a subclass of (HfQuantizer|QuantizationConfigMixin)"):
        getattr(quantcore, f"register_{kind}")("mine")(cls)


def test_unregistered_method_is_unknown_again(tiny: None) -> None:
    unregister("tiny-int8")
    with pytest.raises(UnknownMethodError):
        config_class("tiny-int8")


def test_registered_name_is_normalised(tiny: None) -> None:
    from tiny_int8 import TinyInt8Config

    quantcore.register_quantization_config("GPTQ")(TinyInt8Config)
    assert config_class("gptq") is TinyInt8Config


def test_solver_that_a_backend_shares_is_given_to_other_methods(monkeypatch: pytest.MonkeyPatch, tiny: None) -> None:
    from quantcore.calibration.solvers import shared_solver

    found = Backend("rows", "a:B", "a:C", solver="quantcore.calibration.statistics:Hessian")
    monkeypatch.setitem(plugins()._backends, "rows", found)
    assert shared_solver("rows").__name__ == "Hessian"
    monkeypatch.setitem(plugins()._backends, "rows", Backend("rows", "a:B", "a:C"))
    with pytest.raises(ValueError, match="'rows' offers no solver to other methods; leave it out"):
        shared_solver("rows")


def test_backend_descriptor_is_immutable() -> None:
    backend = Backend("rows", "a:B", "a:C")
    with pytest.raises(AttributeError, match="method"):
        backend.method = "columns"  # type: ignore[misc]


def test_observer_of_a_hook_that_does_not_exist_is_refused() -> None:
    class Misspelt:
        @hookimpl
        def quantcore_weights_quantized(self, name: str) -> None:
            raise AssertionError(name)

    with pytest.raises(ValueError, match="quantcore_weights_quantized"):
        plugins().register(Misspelt())
