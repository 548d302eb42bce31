"""A complete quantization method: symmetric int8 with one scale per row. This module is cheap to import."""

from quantcore.sdk import Backend, hookimpl


@hookimpl
def quantcore_backends():
    return [Backend("rowint8", "rowint8.method:RowInt8Config", "rowint8.method:RowInt8Quantizer")]
