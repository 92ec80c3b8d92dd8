"""Pictures are real PNG files with something drawn on them, and refuse to draw nothing."""

import math
import subprocess
import sys

import pytest
from matplotlib.image import imread

from molora.errors import DataError
from molora.evaluation.routing import Matrix
from molora.report.plots import plot_before_after, plot_heatmap, plot_loss, plot_scores, read_metrics, smooth


def assert_picture(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 150
    assert pixels.std() > 0.02  # a blank page has none


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    lines = [f"{s},{math.exp(-s / 40) + 0.05 * (s % 3)}," for s in range(60)] + ["60,,0.4"]
    path.write_text("step,loss,val_loss\n" + "\n".join(lines) + "\n")
    return path


def test_metrics_skip_empty_cells(metrics):
    curves = read_metrics(metrics)
    assert len(curves["loss"]) == 60
    assert curves["val_loss"] == [(60.0, 0.4)]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "step,loss\n"])
def test_what_is_no_metrics_file_is_a_data_error(tmp_path, text):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=r"metrics\.csv"):
        read_metrics(path)


def test_loss_curve(metrics, tmp_path):
    assert_picture(plot_loss(metrics, tmp_path / "loss.png", ["loss", "val_loss"]))
    with pytest.raises(DataError, match="none of the columns"):
        plot_loss(metrics, tmp_path / "none.png", ["accuracy"])


def test_smoothing_starts_at_the_data_and_skips_nan():
    assert smooth([4.0, 4.0]) == pytest.approx([4.0, 4.0])
    assert smooth([2.0, math.nan, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert math.isnan(smooth([math.nan])[0])


def test_routing_heat_maps(report, tmp_path):
    routing = report.routing
    for name, matrix in (("task", routing.task_expert()), ("layer", routing.layer_expert())):
        out = plot_heatmap(matrix, tmp_path / f"{name}.png", title=name, xlabel="expert", ylabel=name)
        assert_picture(out)


def test_a_big_heat_map_and_an_all_zero_one(tmp_path):
    big = Matrix([str(i) for i in range(48)], [f"expert_{i}" for i in range(32)], [[0.1] * 32] * 48)
    assert_picture(plot_heatmap(big, tmp_path / "big.png", title="big", xlabel="x", ylabel="y"))
    zero = Matrix(["a"], ["b"], [[0.0]])
    plot_heatmap(zero, tmp_path / "zero.png", title="zero", xlabel="x", ylabel="y")
    with pytest.raises(DataError, match="no routing"):
        plot_heatmap(Matrix([], [], []), tmp_path / "no.png", title="none", xlabel="x", ylabel="y")


def test_score_bars(report, tmp_path):
    assert_picture(plot_scores(report, tmp_path / "scores.png"))
    assert_picture(plot_before_after(report, tmp_path / "change.png"))


def test_bars_of_losses_only_are_refused(report, tmp_path):
    report.scores = [s for s in report.scores if s.metric == "loss"]
    with pytest.raises(DataError, match="measured by loss"):
        plot_scores(report, tmp_path / "scores.png")


@pytest.mark.slow
def test_drawing_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys; from pathlib import Path; from molora.report.plots import plot_heatmap;"
        "from molora.evaluation.routing import Matrix;"
        "plot_heatmap(Matrix(['a'], ['b'], [[1.0]]), Path(sys.argv[1]), title='t', xlabel='x', ylabel='y');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.png")]).returncode == 0
