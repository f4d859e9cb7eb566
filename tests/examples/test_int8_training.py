"""The example, shortened."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


def test_int8_follows_float(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("int8_training", ROOT / "examples" / "int8_training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    held_out = module.main(["--steps", "30", "--layers", "1", "--plot", str(tmp_path / "plot.png")])
    assert held_out["float"] < 4.5  # of ln 256 = 5.5 at the start
    assert abs(held_out["int8"] - held_out["float"]) < 0.05
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "step 29" in capsys.readouterr().out
