"""Labels of plots: Chinese with an installed font, else numbers that match the report's rows."""

import warnings

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from buddygpt.cli import fonts


@pytest.fixture(autouse=True)
def no_fonts_but_matplotlibs(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    with matplotlib.rc_context():
        yield


def test_names_that_no_font_can_draw_become_numbers():
    assert fonts.plot_labels(["books", "网页", "法律"]) == ["books", "source 2", "source 3"]


def test_a_chinese_font_draws_the_names(monkeypatch):
    entry = font_manager.FontEntry(fname="simhei.ttf", name="SimHei")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [entry])
    assert fonts.plot_labels(["books", "网页"]) == ["books", "网页"]
    assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "SimHei"]


def test_ascii_names_are_drawn_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axis = Figure().subplots()
        axis.set_yticks([0], fonts.plot_labels(["books"]))
