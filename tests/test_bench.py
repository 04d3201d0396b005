# SPDX-License-Identifier: MIT
"""tests/bench.py runs, every part of it, at a tiny size."""
import pytest

import bench


def test_beside_a_folder_without_the_script(here):
    with pytest.raises(SystemExit, match="has no gcrl.py"):
        bench.of_checkout(here)


@pytest.mark.parametrize("part, amp", [*((part, "off") for part in bench.PARTS), ("gcrl", "bf16")])
def test_part(part, amp, tiny, monkeypatch, capsys, here):
    main = bench.simclr.main
    monkeypatch.setattr(bench.simclr, "main", lambda argv: main([*tiny("simclr", "--amp", amp), *argv]))
    monkeypatch.setattr(bench, "MEMORY_OF", "--image-size 8 --width 8 --heads 2 --colours 4 --batch-size 16".split())
    monkeypatch.setattr(bench, "LIKELIHOODS", (((4, 8, 8, 1, 1, 2), 2),))
    monkeypatch.setattr(bench, "SMALL", ((4, 8, 8, 1, 1, 2), 4, 2))
    monkeypatch.setattr(bench, "GCRL", {"cpu": (8, 32, 1)})
    bench.main(["--only", part, "--device", "cpu", "--amp", amp, "--batch-size", "8", "--repeats", "1", "--width", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and not any("nan" in line for line in lines)
