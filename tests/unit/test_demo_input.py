"""A demo on a file of another kind ends before it stops or starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_store.errors import PredictFlowError
from predictflow.demo import stage
from predictflow.demo.run import Options, run
from predictflow.settings import Settings


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("wrong.csv", b"a,b\n1,2\n", "InvoiceNo"),
        ("empty.csv", b"", "empty"),
        ("plain.csv.gz", b"InvoiceNo\n", "not a gzip file"),
        ("data.txt", b"x", "takes a .csv or .csv.gz"),
    ],
)
def test_input_of_another_kind_is_refused_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, said: str
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("servers were touched")

    monkeypatch.setattr(stage, "start_services", started)
    (tmp_path / name).write_bytes(content)
    settings = Settings.from_environ({"PREDICTFLOW_HOME": str(tmp_path / "home")})
    with pytest.raises(PredictFlowError, match=said):
        run(settings, Options(tmp_path / name, customers=300, days=200, seed=1, events=100))
    assert not (tmp_path / "home").exists()
