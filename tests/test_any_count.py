"""The count of `Any` that `make lint` lets only fall."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.harness import any_count


def test_every_use_counts_and_imports_do_not() -> None:
    source = "import typing\nfrom typing import Any\nx: Any\ndef f(a: dict[str, Any], *b: typing.Any) -> Any: ...\n"
    assert any_count.uses(source) == 4 and any_count.uses("any = 'Any'") == 0


def test_rooms_are_counted_once_and_links_are_not_followed(tmp_path: Path) -> None:
    for name, text in {"passes/one.py": "x: Any", "mpq_compiler/ir/two.py": "x: list[Any]\ny: Any"}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "mpq_compiler" / "passes").symlink_to(tmp_path / "passes")
    (tmp_path / "mpq_compiler" / "three.py").write_text("x: Any")
    assert any_count.by_room(tmp_path) == {"passes": 1, "ir": 2, "mpq_compiler": 1}


@pytest.mark.parametrize(("most", "wrong", "said"), [(4, "1 more use", ""), (5, "", ""), (6, "", "1 fewer: keep it")])
def test_the_number_may_only_fall(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    most: int,
    wrong: str,
    said: str,
) -> None:
    number = tmp_path / "number"
    monkeypatch.setattr(any_count, "NUMBER", number)
    monkeypatch.setattr(any_count, "by_room", lambda: Counter({"ir": 3, "driver": 2}))
    number.write_text(f"{most}\n")
    assert (any_count.main([]) or "").startswith(wrong) and said in capsys.readouterr().out
    any_count.main(["--write"])
    assert number.read_text() == "5\n" and any_count.main([]) is None
