"""The example, shortened."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


def test_it_compares_and_draws(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("qat_digits", ROOT / "examples" / "qat_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    short = ["--steps", "40", "--qat-steps", "20", "--seeds", "1", "--bits", "2"]
    results = module.main([*short, "--plot", str(tmp_path / "plot.png")])
    assert set(results) == {"NNX", "Linen"}
    for found in results.values():
        assert found["float"] > 60
        assert found["QAT int2"] > found["PTQ int2"]
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "QAT int2" in capsys.readouterr().out
