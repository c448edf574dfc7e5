"""A font with Chinese characters for matplotlib, whose own font draws boxes instead."""

import logging

CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti SC",
    "Microsoft YaHei",
    "SimHei",
    "Droid Sans Fallback",
)


def use_chinese_font() -> bool:
    """Let matplotlib draw Chinese with an installed font; return False if none of `CHINESE_FONTS` is installed."""
    from matplotlib import font_manager, rcParams

    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:  # installed after matplotlib wrote its list of fonts
            manager.addfont(path)
    installed = {font.name for font in manager.ttflist}
    for name in CHINESE_FONTS:
        if name in installed:
            rcParams["font.family"] = ["DejaVu Sans", name]  # matplotlib takes a character from the first that has it
            logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it warns about every other weight
            return True
    return False


def plot_labels(names: list[str]) -> list[str]:
    """Return names that can be drawn: `source 2` for the second if it is not ASCII and no Chinese font is installed.

    Reports number their rows in the same order.
    """
    if all(name.isascii() for name in names) or use_chinese_font():
        return names
    return [name if name.isascii() else f"source {number}" for number, name in enumerate(names, 1)]
