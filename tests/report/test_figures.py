"""Curves: what is drawn of metrics.jsonl, and that the SVG takes its colours from the page."""

import re
import xml.etree.ElementTree

import numpy as np

from alignvlm_jax.report import figures


def lines(patch_loss: bool = True) -> list[dict]:
    found = []
    for step in range(10, 310, 10):
        stage = "read" if step <= 200 else "answer"
        found.append(
            {"step": step, "stage": stage, "answer_loss": 3.0 / step, "token_accuracy": step / 310}
        )
        found[-1] |= {"patch_loss": 2.0 / step} if patch_loss else {}
    found.append(
        {
            "step": 200,
            "stage": "read",
            "validation/answer_loss": 0.1,
            "validation/token_accuracy": 0.4,
        }
    )
    found.append({"step": 300, "stage": "answer", "generated/anls": 0.3})
    return found


def test_points_leave_out_what_cannot_be_drawn():
    found = [
        {"step": 1, "x": 2.0},
        {"step": 2},
        {"step": 3, "x": None},
        {"step": 4, "x": 0.0},
        {"step": 5, "x": 1e999},
    ]
    np.testing.assert_array_equal(figures.points(found, "x", log=False), [[1, 2], [4, 0]])
    np.testing.assert_array_equal(figures.points(found, "x", log=True), [[1, 2]])
    assert figures.points([], "x", log=True).shape == (0, 2)


def test_stages_begin_where_the_one_before_ends():
    assert figures.stage_spans(lines()) == [("read", 0, 200), ("answer", 200, 300)]
    assert figures.stage_spans([]) == []


def test_smoothing_follows_straight_lines_and_flattens_noise():
    # A geometric mean follows what is a straight line on a logarithmic axis, to both ends.
    for line, log in ((np.exp(-np.arange(200) / 50), True), (np.arange(200.0), False)):
        np.testing.assert_allclose(figures._smooth(line, log), line)
    noise = np.random.default_rng(0).normal(size=200)
    assert figures._smooth(noise, log=False)[10:-10].std() < 0.5 * noise.std()
    few = noise[:9]
    np.testing.assert_array_equal(figures._smooth(few, log=False), few)


def test_one_panel_for_each_metric_that_has_values():
    panels = figures.curves(lines())
    assert [re.search('aria-label="([^"]*)"', svg)[1] for svg in panels] == [
        curve.title for curve in figures.CURVES
    ]
    assert len(figures.curves(lines(patch_loss=False))) == 3
    assert figures.curves([]) == []


def test_svg_is_well_formed_and_bears_no_colour_of_text():
    curve = figures.CURVES[0]
    plain = figures._panel(curve, lines(), ())
    compared = figures._panel(curve, lines(), lines())
    for svg in (plain, compared):
        root = xml.etree.ElementTree.fromstring(svg)
        assert "viewBox" in root.attrib
        assert "width" not in root.attrib
        assert "currentColor" in svg
        assert figures.TEXT not in svg
        assert figures.GRID not in svg
    assert figures.OTHER in compared
    assert figures.OTHER not in plain
    assert plain == figures._panel(curve, lines(), ())


def test_the_x_axis_goes_on_to_the_end_of_a_longer_other_run():
    curve = figures.CURVES[0]
    longer = [line | {"step": 4 * line["step"]} for line in lines()]
    for panel, last in (
        (figures._panel(curve, lines(), ()), 300),
        (figures._panel(curve, lines(), longer), 1000),
        (figures._panel(curve, longer, lines()), 1000),
    ):
        # Of 1200 steps the last with a number is 1000. Those of stages are smaller.
        assert max(int(text) for text in re.findall(r">(\d+)</text>", panel)) == last
