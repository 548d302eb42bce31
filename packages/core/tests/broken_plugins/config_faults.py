"""Methods whose config or declaration has one fault each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sound import SoundConfig, SoundQuantizer

from quantcore import option


class HeavyEntryConfig(SoundConfig):
    quant_method = "heavy-entry"


class HeavyEntryQuantizer(SoundQuantizer):
    pass


class ForgetsUnknownKeysConfig(SoundConfig):
    quant_method = "forgets-unknown-keys"

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key not in self.extra_keys}


class ForgetsUnknownKeysQuantizer(SoundQuantizer):
    pass


class ChecksNoTypesConfig(SoundConfig):
    quant_method = "checks-no-types"

    def validate(self) -> None:
        pass


class ChecksNoTypesQuantizer(SoundQuantizer):
    pass


@dataclass(eq=False, repr=False)
class SharesItsListsConfig(SoundConfig):
    quant_method = "shares-its-lists"

    groups: list[int] = option(default_factory=lambda: [1, 2])

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "groups": self.groups}


class SharesItsListsQuantizer(SoundQuantizer):
    pass


class HidesItsCalibrationConfig(SoundConfig):
    quant_method = "hides-its-calibration"


class HidesItsCalibrationQuantizer(SoundQuantizer):
    requires_calibration = True
